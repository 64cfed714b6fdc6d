// Package snapshotter is a snapshotter for containerd: it keeps the layers of images
// and the writable layers of containers as directories, and has their unions mounted by
// plyfs. `plyfs snapshotter` serves it as containerd.services.snapshots.v1.Snapshots on a
// unix socket; containerd knows it as a proxy plugin.
//
// It has nothing to do with a store of plyfs (package layers): containerd unpacks layers
// itself, gives them names and decides when they go.
//
// # What lies where
//
//	ROOT/                      0711
//	  snapshots.db             rows; locked for the life of the process
//	  snapshots/<id>/
//	    fs/                    what the snapshot adds to its parents
//	    work/                  of an active snapshot: work directory of the union
//	    mnt/                   where the union is mounted, if one is needed
//	    run/                   state.json, log and exit.json of the mount (package holder)
//	  trash/<id>/              removed, being deleted
//
// Ids are random and never used twice; names are containerd's business and stand in the
// database only.
//
// # What a caller is told to mount
//
// Always a bind mount, so that containerd needs neither FUSE nor a helper:
//
//	kind       parents   id map   bind mount of
//	active     none      no       fs
//	view       none      no       fs, read-only
//	view       one       no       fs of the parent, read-only
//	any other                     mnt, a union: writable if active
//
// A union is served by a pair of processes of its own, which outlive this one. It is
// mounted by Prepare, View or Mounts, whichever first finds that it is not, and unmounted by
// Commit and Remove. In a union, directories can be renamed and files changed without
// their data (redirect_dir=on, metacopy=on): nobody but unions of this package reads
// layers that have parents.
//
// An id map (labels containerd.io/snapshot/uidmapping and gidmapping) makes the union show
// other owners than its layers have; what is written has the owners of the layers.
//
// # Invariants
//
//   - A directory is made, and known to the disk, before its row; a row is removed before its directory.
//   - A parent is committed, and is not removed before its children.
//   - A committed snapshot is never written: its union is read-only, unmounted, and its content
//     on the disk before its row says that it is committed.
//   - Whether a union is mounted is read from the mount table, and stored nowhere.
//   - What fails leaves no row.
//
// # Lock order
//
// The lock on a name (one call that changes a snapshot at a time), then a transaction of
// the database. In a transaction no file is touched. Store.mu is held for moments, with
// nothing below it.
//
// # Crash
//
//	step of Prepare, View                 crash here leaves            found and cured by
//	------------------------------------  ---------------------------  -----------------------------
//	1 make directory                      a directory without a row    start, Cleanup: trash
//	2 write row                           a row without a mount        containerd removes it, or Mounts mounts
//	3 mount                               the mount                    Mounts finds it
//
//	step of Commit
//	1 make read-only                      a union that is read-only    Mounts makes it writable
//	2 unmount (syncs), or syncfs          an active snapshot           Mounts mounts it again
//	3 write row: committed                a work directory             start
//	4 remove work, mnt, run               parts of them                start
//
//	step of Remove
//	1 unmount                             a snapshot without a mount   Mounts mounts it again
//	2 remove row                          a directory without a row    start, Cleanup: trash
//	3 move to trash                       trash                        start
//
// A union whose processes were killed is mounted again by the next call of Mounts;
// containers that run in it have lost their root. After a reboot containerd asks for
// the mounts of every container that it starts.
//
// # Unions in use
//
// Commit first makes the union read-only, for everybody who has it mounted, which fails
// while a file is open for writing. Then it does not matter who else keeps it alive (a bind
// mount, another mount namespace that has got a copy of the mount): the layer does not
// change any more, and the processes end with the last user. Remove asks nobody; what
// still runs in a removed snapshot sees its files go.
package snapshotter
