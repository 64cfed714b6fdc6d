package fsat

import (
	"golang.org/x/sys/unix"
)

// Rename renames with the RENAME_* flags of renameat2(2). RENAME_NOREPLACE works on
// file systems that have no flags too, as NFS, for callers who are the only ones to
// make newname.
func Rename(olddir int, oldname string, newdir int, newname string, flags uint) error {
	err := retry(func() error { return unix.Renameat2(olddir, oldname, newdir, newname, flags) })
	if err == unix.EINVAL && flags == unix.RENAME_NOREPLACE {
		return renameNoReplace(olddir, oldname, newdir, newname)
	}
	return err
}

// renameNoReplace is Rename without flags, if there is nothing under newname.
func renameNoReplace(olddir int, oldname string, newdir int, newname string) error {
	var st unix.Stat_t
	switch err := Stat(newdir, newname, &st); {
	case err == nil:
		return unix.EEXIST
	case err != unix.ENOENT:
		return err
	}
	return retry(func() error { return unix.Renameat(olddir, oldname, newdir, newname) })
}

// Mknod makes a node of any type but a directory or symbolic link.
func Mknod(dirfd int, name string, mode uint32, rdev uint64) error {
	return retry(func() error { return unix.Mknodat(dirfd, name, mode, int(rdev)) })
}

// Mkdir makes a directory.
func Mkdir(dirfd int, name string, mode uint32) error {
	return retry(func() error { return unix.Mkdirat(dirfd, name, mode) })
}

// Symlink makes a symbolic link.
func Symlink(target string, dirfd int, name string) error {
	return retry(func() error { return unix.Symlinkat(target, dirfd, name) })
}

// Link makes another name for olddir/oldname, which is not followed.
func Link(olddir int, oldname string, newdir int, newname string) error {
	return retry(func() error { return unix.Linkat(olddir, oldname, newdir, newname, 0) })
}

// LinkFd gives the object behind fd, which may have no name (O_TMPFILE), a
// name.
func LinkFd(fd, newdir int, newname string) error {
	return retry(func() error {
		return unix.Linkat(unix.AT_FDCWD, ProcPath(fd), newdir, newname, unix.AT_SYMLINK_FOLLOW)
	})
}

// Unlink removes a name that is not a directory.
func Unlink(dirfd int, name string) error {
	return retry(func() error { return unix.Unlinkat(dirfd, name, 0) })
}

// Rmdir removes an empty directory.
func Rmdir(dirfd int, name string) error {
	return retry(func() error { return unix.Unlinkat(dirfd, name, unix.AT_REMOVEDIR) })
}

// Syncfs writes out the whole file system that fd lies on.
func Syncfs(fd int) error {
	return retry(func() error { return unix.Syncfs(fd) })
}
