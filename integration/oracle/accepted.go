package oracle

// Difference is something in which plyfs and kernel overlayfs may differ
// without either being wrong, and which is therefore never compared.
type Difference struct {
	What, Why string
}

// Accepted is the complete list. Each line has its place in the code that
// makes a result comparable (result.go, snapshot.go) or in the generator,
// which does not make such operations.
var Accepted = []Difference{
	{"st_dev, st_ino, f_fsid, f_type", "numbers of another file system; only that they are stable and equal between names of one file is compared"},
	{"st_nlink of directories", "overlayfs says 1 for a merged directory and what the upper says for others"},
	{"st_size, st_blocks, st_blksize of directories; st_blocks, st_blksize of files", "allocation is the business of the file system below"},
	{"where holes are", "a copy-up of the kernel fills small holes, plyfs keeps them; what SEEK_DATA and SEEK_HOLE say must be true"},
	{"st_atime, except right after it was set", "a FUSE server reads ahead, and relatime depends on when"},
	{"st_ctime", "cannot be set, always recent"},
	{"order of a listing", "unspecified; types, completeness and cookies are compared"},
	{"whiteouts in a listing", "the kernel lists a whiteout in a directory that only one layer has, though lookup says ENOENT; plyfs does not"},
	{"changes through a descriptor to a lower object that was unlinked", "the kernel would have to copy it up, fails with EEXIST, ENOTDIR or ENOENT, and says that the object still has links; plyfs does what was asked"},
	{"st_ino of a link made of a copied-up file", "the kernel gives the two names different numbers until the next mount; plyfs gives them one"},
	{"chown(-1, -1) of a file that somebody has open for writing", "FUSE sends what it sends before a write, so setuid may go although the caller does not own the file"},
	{"rmdir of an upper directory with whiteouts that hide nothing", "overlayfs says ENOTEMPTY; plyfs removes it"},
	{"mmap of a descriptor opened read-only before the copy-up", "kernel overlayfs shows old data through it for ever; plyfs shows the new"},
	{"COLLAPSE_RANGE, INSERT_RANGE and others of fallocate", "the FUSE protocol has KEEP_SIZE, PUNCH_HOLE and ZERO_RANGE only"},
	{"f_bfree, f_bavail, f_ffree, f_files of statfs", "they change between two calls"},
	{"O_DIRECT with unaligned buffers", "EINVAL comes from the file system below; FUSE has no such limit"},
}
