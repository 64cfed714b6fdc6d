package oracle

// Difference is something in which plyfs and kernel overlayfs may differ
// without either being wrong, and which is therefore never compared.
type Difference struct {
	What, Why string
}

// Accepted is the complete list. Each line has its place in the code that
// makes a result comparable (compare.go, identity.go, snapshot.go) or in the generator,
// which does not make such operations.
var Accepted = []Difference{
	{"st_dev, st_ino, f_fsid, f_type", "numbers of another file system; only which of them are equal is compared: between names of one file, before and after a copy-up, a rename, a remount, and to the d_ino of listings"},
	{"st_nlink of directories", "overlayfs says 1 for a merged directory and what the upper says for others"},
	{"st_size, st_blocks, st_blksize of directories; st_blocks, st_blksize of files", "allocation is the business of the file system below"},
	{"where holes are", "a copy-up of the kernel fills small holes, plyfs keeps them; what SEEK_DATA and SEEK_HOLE say must be true"},
	{"st_atime of a file that is large, empty, or read and changed by turns through open descriptors", "the kernel does not tell a FUSE server of reads from its cache. plyfs makes the first read after an open for reading reach the server, if the time is due and the file has at most 1 MiB; later ones, those of a descriptor that can write, and of a directory whose attributes alone have changed, may not"},
	{"st_atime of a symbolic link that was followed", "the kernel caches targets and does not tell a FUSE server when it follows one"},
	{"st_ctime", "cannot be set, always recent"},
	{"order of a listing", "unspecified; types, completeness and cookies are compared"},
	{"whiteouts in a listing", "the kernel lists a whiteout in a directory that only one layer has, though lookup says ENOENT; plyfs does not"},
	{"changes through a descriptor to a lower object that was unlinked", "the kernel would have to copy it up, fails with EEXIST, ENOTDIR or ENOENT, and says that the object still has links; plyfs does what was asked"},
	{"st_ino of a link made of a copied-up file, and its d_ino", "the kernel gives the two names different numbers until the next mount, and lists the upper's number in a directory of the upper; plyfs gives them one. Where the lowers have no file handles, the kernel's numbers stay different, each with attributes of its own"},
	{"st_ino of a copied-up file after a remount in a user namespace", "the kernel may not look for the original by its file handle there and shows a new number; plyfs finds it by its name"},
	{"chown(-1, -1) of a file that somebody has open for writing", "FUSE sends what it sends before a write, so setuid may go although the caller does not own the file"},
	{"st_mtime of a file whose attributes were changed under metacopy=on, once it is opened for writing", "the kernel copies the data up then and leaves the time of that; plyfs restores the file's own"},
	{"rename of an object whose path in the lowers has more than 255 bytes, under redirect_dir=on", "the kernel says EXDEV, its redirects are no longer (redirect_max); plyfs stops at PATH_MAX"},
	{"st_mtime of a directory from which a directory could not be renamed over one that is not empty, under redirect_dir=on", "the kernel has begun by then and changes it; plyfs looks first"},
	{"ENOTEMPTY or EEXIST for a directory that is not empty", "the kernel passes on what the upper's file system says; plyfs says ENOTEMPTY"},
	{"rmdir of, or rename over, an upper directory with whiteouts that hide nothing", "overlayfs says ENOTEMPTY; plyfs takes it for the empty directory that it shows"},
	{"mmap of a descriptor opened read-only before the copy-up", "kernel overlayfs shows old data through it for ever; plyfs shows the new"},
	{"copy_file_range between a file of a lower and one of an upper on another file system", "the kernel says EXDEV; plyfs copies"},
	{"EPERM for an immutable file or another error, if there are two reasons", "the kernel looks at flags first; in front of a FUSE server it knows of none and looks at permissions and types"},
	{"EPERM of access(W_OK) of an immutable file, and of copy_file_range of nothing into one", "FUSE has no word for immutable, and the kernel answers both without asking the server; opening and writing give EPERM"},
	{"COLLAPSE_RANGE, INSERT_RANGE and others of fallocate", "the FUSE protocol has KEEP_SIZE, PUNCH_HOLE and ZERO_RANGE only"},
	{"f_bfree, f_bavail, f_ffree, f_files of statfs", "they change between two calls"},
	{"O_DIRECT with unaligned buffers", "EINVAL comes from the file system below; FUSE has no such limit"},
}
