// Package unionfs is the union file system: read-only lower directories and, if
// there is one, a writable upper directory, shown as one tree through FUSE's
// raw protocol. It knows directories and options, never a store or a database.
//
// # Parts
//
//	options.go          what a caller says
//	fs.go layer.go      opening and closing the union
//	lower.go            the read-only tree below the upper, of which there are two kinds:
//	scan.go             the tree of live directories
//	scan_read.go prefetch.go reading them, in advance while a program walks
//	indexed.go          reading the index of a chain of layers
//	lowers.go           opening the layers' directories
//	inomap.go           one space of inode numbers for all layers
//	indirect.go         redirects and metacopies: content that is elsewhere
//	origin.go index.go  where copies come from; hard links that stay together
//	inode.go memory.go  objects known to the kernel, the table of them, their memory
//	real.go orphan.go   where an object really is, with and without a name
//	dir.go              one directory's names: merged lowers plus what the upper changed
//	lookup.go readdir.go attr.go xattr.go file.go      requests that read
//	create.go link.go remove.go rename.go setattr.go   requests that change names or attributes
//	flags.go            inode flags (chattr)
//	marker.go           whiteouts and opaque directories without devices and attributes
//	owners.go           ids as stored and as shown; what an object is
//	override.go         owners, modes and types that are written down instead of given to files
//	atime.go            access times
//	acl.go caller.go    what new objects inherit; what a request does not tell of its caller
//	copyup.go           when and in what order package cow is called
//	io.go               how file data reaches programs
//	stale.go            what the kernel has to be told to forget
//	fdcache.go          descriptors, a bounded cache
//	space.go            no space, but some is about to be free
//	records.go keep.go  what another server has to know; what it cannot find any more
//	past.go resume.go   going on with the mount of a server that has died
//	where.go where_xattr.go  telling those who watch where objects are
//	errno.go            the only place that makes a FUSE status
//
// Requests, copy-ups and opens are counted by package counters; package trace tells of single
// requests, package inject makes them fail, and package explain says why a name shows what it does,
// without a mount.
//
// # Identity
//
// A node id names an inode, not a name. Objects born in the lowers have the
// slot of the lower tree as node id, and keep it when they are copied up while
// the kernel knows them; objects born in the upper have ids from a disjoint
// range that is counted up and never reused. Hard links share an inode. Those of
// lower files do so by the link index (linkIndex), which also keeps them
// together when one is copied up; without it (Options.NoIndex) they are separate
// objects, as on kernel overlayfs with index=off.
//
// The inode number of a copy is that of its original, also after a remount: the
// attribute "origin" on the copy describes the original by its file handle, in
// the kernel's form. A renamed copy needs CAP_DAC_READ_SEARCH to be traced back;
// without, it gets a number of its own at the next mount. A merged directory has
// the number of its lowest part.
//
// # Content that is elsewhere
//
// A directory that has lower content can be renamed where Options.Redirect is
// RedirectOn: it is given the attribute "redirect", always as an absolute path in
// the lowers' merged tree. Changing only the attributes of a lower file leaves
// its data behind where Options.Metacopy is set: the copy has the attribute
// "metacopy" until its data follows, at the first open for writing. Such
// attributes of others are followed in the upper and in lowers, but only names of
// the lowers' merged trees can be reached through them: never a link's target,
// ".." or anything outside; where they are not to be believed, the object
// is refused (EPERM).
//
// File handles carry nothing but how the file is open (fileIO): every READ and WRITE
// is served from the node id alone, so that another process can go on with them. With
// IONoOpen there are none (OPEN answers ENOSYS). Directory handles
// do not exist (OPENDIR answers ENOSYS): a directory position is a cookie that
// can be resumed at any time. Cookies of names that the lowers have are their
// position in the sorted merged listing, which never changes; those of others are a
// hash of the name, above all of those. So another process finds the same.
//
// # Coherence
//
// We are the only writer of the upper and the lowers do not change, so the
// kernel may cache names, missing names, attributes, links and pages for ever;
// what a request changes, the kernel itself drops; what it cannot know it is told
// (stale.go). An open lower file of a writable union always goes through the page
// cache of its one FUSE inode, so a reader that opened before a copy-up sees what is
// written after it, and locks, which the kernel keeps per inode, meet. Files of the
// upper that nobody has open in this way, and all files of a read-only union, may be
// passed through: the kernel reads and writes the real file itself (IOPassthrough).
// A small lower file whose data is in memory is put into the page cache when it is
// first opened; nobody can have it open then.
//
// With Options.Complete the kernel keeps nothing: every name, attribute and link is asked for each time,
// and files are read and written by requests alone, as is a file that a rule of package inject names.
//
// # Another server
//
// What cannot be found out again is in the ledger (package ledger), if there is one, and
// objects without a name are with the Keeper. Both know it before the kernel does. The
// next server makes the same objects with the same node ids and inode numbers before it
// answers anything.
//
// The kernel sends a request again that the old server has not answered. Most can be
// carried out twice. A change of names cannot, and needs nothing but a look at the names:
// the kernel holds the directories locked until it is answered, so nobody else has changed
// them. When everything is checked the request is armed in the ledger (ledger.Op);
// from then on, if the names are as they should be after it, it has been carried out:
//
//	create, mkdir, mknod, symlink   the name is there
//	link                            the name is there, and leads to the object
//	unlink, rmdir                   the name is not there
//	rename                          the old name has no object of the upper, the new one has
//	exchange                        each name has the inode number of the other
//	setxattr that must create       it has none before it is armed: set it
//	removexattr                     it has one before it is armed: it is gone, or remove it
//	open, release                   the count in the ledger includes it, if it says so
//
// # Locks
//
// In this order; a goroutine that holds one takes only those further down:
//
//	inodeExtra.copyMu
//	                one copy-up of this object; held while its data is copied, and
//	                while attributes of a file without its data are changed
//	fileIO.mu       how a file is open; held while it is decided, while the file is
//	                registered, and while a small one is handed to the kernel
//	dirState.opMu   one name-changing request in this directory at a time; of two
//	                directories the ancestor's first, else the lower node id's
//	inode.mu        where the object is; shared while a call by name on it runs,
//	                exclusive while its name changes. Of two, the lower node id's first
//	dirState.mu     the names in memory; of the directory that an object lies in,
//	                after the object's inode.mu, but before the directory's own
//	FS.renameMu     shared while a directory is opened by path; exclusive while
//	                one moves
//	scanSub.reading one read of a directory of the lowers
//	table shards, fdCache.mu, linkIndex.mu, prefetcher.mu, indexed.mu, keeping.mu,
//	Ledger.mu       leaves
//
// No lock that another object's requests need is held while file data is copied
// or read: a copy-up holds its own copyMu, and the directory's opMu only for the
// final rename. A directory's mu is held while its listing is read for the first
// time, which everybody who needs the directory has to wait for anyway.
//
// That two renames never lock two directories each in opposite order is owed to
// the kernel, which sends one rename between directories at a time.
//
// # Name changes and crashes
//
// Every request that changes names makes the change visible with one system
// call on the upper; what it replaces ends up in the workdir, what it adds is
// complete before it gets its name:
//
//	request                    steps on the upper                               a crash leaves
//	create, owner is ours      open(O_CREAT|O_EXCL)                             old or new
//	create, other owner        build in workdir, rename(NOREPLACE)              old or new (+ litter)
//	create over a whiteout     build in workdir, rename over it                 old or new (+ litter)
//	mkdir over a whiteout      build opaque in workdir, rename(EXCHANGE)        old or new (+ litter)
//	unlink of a lower name     whiteout in workdir, link to the name            old or new
//	unlink, lower exists       whiteout in workdir, rename over the file        old or new (+ litter)
//	the same, whiteouts are    marker beside the name, then as without a lower  old or new
//	markers (marker.go)
//	rmdir, lower exists        whiteout in workdir, rename(EXCHANGE)            old or new (+ litter)
//	rename over a directory    empty one in workdir, rename(EXCHANGE); rename   old or new (+ litter)
//	that hides names
//	the same, where the file   old one to workdir, rename(NOREPLACE); rename    old or new, or the old name
//	system cannot swap                                                          alone (+ litter)
//	chown of a link, if files  empty file in workdir, rename over the link      old or new (+ litter)
//	belong to root
//	rename                     renameat2, RENAME_WHITEOUT if a lower exists     old or new
//	rename of lower content    attribute redirect, then as rename               old or new
//	the same, where the file   rename, then whiteout over the old name          new, and the lower name
//	system has no such flag                                                     shows again
//
//	copy-up of a hard link     build, rename to index/, link to the name        old, or new at all names
//	unlink of one of them      copy up as above, attribute nlink, as unlink     old or new; an entry of
//	                                                                            index/ without names is
//	                                                                            removed at the next mount
//	data of a metacopy         copy in place, sync, remove the attribute        data still from the lower
//
// Litter lies in the workdir only and is swept at the next mount.
package unionfs
