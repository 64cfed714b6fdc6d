// Package cow makes upper copies of lower objects so that a crash at any moment
// leaves either no copy or a complete one.
//
// # How
//
// An object is built under a private name in the workdir, which lies on the
// upper's file system: data, then owner, mode, attributes, times, in this order
// (chown clears setuid bits and capabilities, writing attributes changes
// nothing else, and times come last because everything before touches them).
// Then, unless the union is volatile, its data is synced. Publish moves it
// under its final name with one rename. A regular file that replaces nothing has no
// name while it is built (O_TMPFILE), and is linked to its final one. The caller
// serialises copies of one object and updates its own state after Publish has returned.
//
// Data is copied by reflink where the file systems can (FICLONE), else with
// copy_file_range, else by read and write; holes stay holes (SEEK_DATA).
//
// # Crash table
//
//	stopped after                    on disk                      at the next mount
//	unnamed file, in any state       nothing                      nothing to do
//	temp created, being filled       litter in workdir/work       swept
//	temp filled, not synced          litter                       swept
//	temp synced, not renamed         litter                       swept
//	renamed, directory not synced    old or new state, complete   nothing to do
//	renamed, mode not set (only a    new state, the owner may     nothing to do
//	user's read-only directory)      write
//	replaced object in workdir       litter                       swept
//	Complete: data copied            file marked as metacopy,     its data is still the lower's
//	                                 times and capabilities lost
//	Complete: restored               file marked as metacopy      its data is still the lower's
//	Complete: synced                 same                         same
//	Complete: mark removed           complete                     nothing to do
//
// # Layout on disk
//
//	WORKDIR/work/           private, mode 0700, emptied by OpenWork
//	WORKDIR/work/#HEX       an object being built, or one taken out of the upper
//	WORKDIR/work/whiteout   a whiteout that others are linked to
//	WORKDIR/index/          links to copies of hard links; package unionfs
//	WORKDIR/work/incompat/volatile/dirty
//	                        a volatile mount is at work, or ended without a sync:
//	                        OpenWork refuses
//
// kernel overlayfs uses the same directory in the same way, so either can
// follow the other on one workdir.
package cow
