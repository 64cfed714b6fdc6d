package cow

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fault"
	"github.com/plyfs/plyfs/cow/fsat"
)

// Xattr is one extended attribute, under its name on disk.
type Xattr struct {
	Name  string
	Value []byte
}

// Source describes the object to build.
type Source struct {
	Mode     uint32 // type and permission bits
	Uid, Gid int
	Rdev     uint64
	Target   string // of a symbolic link
	Xattrs   []Xattr

	// AnyOwner says that it is no error if the owner cannot be set.
	AnyOwner bool

	// Flags are inode flags (FS_IOC_SETFLAGS) of a regular file or directory,
	// where the file system has any.
	Flags uint32

	// Atime and Mtime are set if SetTimes is.
	Atime, Mtime unix.Timespec
	SetTimes     bool

	// Data is what a regular file's content is copied from, -1 for none.
	// Size bytes are copied; without Data the file is a hole of that size.
	Data int
	Size int64

	// Unnamed allows a regular file to have no name until it is published, with
	// RENAME_NOREPLACE: that changes one directory less, which a sync would have to
	// write, and leaves no litter.
	Unnamed bool
	// Anonymous asks for a regular file without any name (O_TMPFILE); it can
	// be linked later. The file system says EOPNOTSUPP if it has none.
	Anonymous bool
}

// Who this process is; it never changes that.
var euid, egid = unix.Geteuid(), unix.Getegid()

// Temp is a finished object that nobody sees yet.
type Temp struct {
	w    *Work
	name string
	fd   int // regular file: open for reading and writing, with O_NOATIME; else -1
	// late is a mode to be set when the directory is in its place; 0: none.
	late uint32
}

// Build makes the object in the scratch directory.
func (w *Work) Build(src Source) (*Temp, error) {
	t := &Temp{w: w, fd: -1}
	if src.Unnamed && src.Mode&unix.S_IFMT == unix.S_IFREG && w.unnamed() {
		src.Anonymous = true
	}
	if !src.Anonymous {
		t.name = w.TempName()
	}
	if err := t.create(src); err != nil {
		return nil, err
	}
	fault.Point("build.created")
	if err := t.fill(src); err != nil {
		t.Discard()
		return nil, err
	}
	return t, nil
}

// probeUnnamed finds out whether a file without a name can be made, and be given one.
func (w *Work) probeUnnamed() bool {
	fd, err := fsat.OpenName(w.fd, ".", unix.O_RDWR|unix.O_TMPFILE, 0o600)
	if err != nil {
		return false
	}
	defer fsat.Close(fd)
	name := w.TempName()
	if fsat.LinkFd(fd, w.fd, name) != nil {
		return false
	}
	return fsat.Unlink(w.fd, name) == nil
}

func (t *Temp) create(src Source) (err error) {
	dir := t.w.fd
	switch src.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if src.Anonymous {
			t.fd, err = fsat.OpenName(dir, ".", unix.O_RDWR|unix.O_TMPFILE|unix.O_NOATIME, 0o600)
			break
		}
		t.fd, err = fsat.OpenName(dir, t.name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOATIME, 0o600)
	case unix.S_IFDIR:
		err = fsat.Mkdir(dir, t.name, 0o700)
	case unix.S_IFLNK:
		err = fsat.Symlink(src.Target, dir, t.name)
	default:
		if src.Mode&unix.S_IFMT == unix.S_IFCHR && src.Rdev == 0 {
			// In a lower of the aufs dialect this is a device; in an upper it
			// would be a whiteout.
			err = unix.EPERM
			break
		}
		err = fsat.Mknod(dir, t.name, src.Mode&unix.S_IFMT|0o600, src.Rdev)
	}
	if err != nil {
		return fmt.Errorf("create in workdir: %w", err)
	}
	return nil
}

func (t *Temp) fill(src Source) error {
	at, name := t.at()
	if t.fd >= 0 && src.Data < 0 && src.Size > 0 {
		if err := unix.Ftruncate(t.fd, src.Size); err != nil {
			return fmt.Errorf("set size: %w", err)
		}
	}
	if t.fd >= 0 && src.Data >= 0 && src.Size > 0 {
		if err := copyData(t.fd, src.Data, src.Size); err != nil {
			return fmt.Errorf("copy data: %w", err)
		}
	}
	fault.Point("build.filled")
	if src.Uid != euid || src.Gid != egid {
		if err := fsat.Chown(at, name, src.Uid, src.Gid); err != nil && !(src.AnyOwner && (err == unix.EPERM || err == unix.EINVAL)) {
			return fmt.Errorf("set owner: %w", err)
		}
	}
	// An ordinary user needs write permission for user attributes, and to
	// move a directory; and the mode goes with the ACLs, which come after it.
	if err := t.setXattrs(src, func(attr string) bool { return strings.HasPrefix(attr, "user.") }); err != nil {
		return err
	}
	if src.Mode&unix.S_IFMT != unix.S_IFLNK {
		mode := src.Mode & 0o7777
		if src.Mode&unix.S_IFMT == unix.S_IFDIR && mode&0o200 == 0 && euid != 0 {
			t.late, mode = mode, mode|0o200
		}
		if err := fsat.Chmod(at, name, mode); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	if err := t.setXattrs(src, func(attr string) bool { return !strings.HasPrefix(attr, "user.") }); err != nil {
		return err
	}
	if src.SetTimes {
		if err := fsat.Utimes(at, name, [2]unix.Timespec{src.Atime, src.Mtime}); err != nil {
			return fmt.Errorf("set times: %w", err)
		}
	}
	if src.Flags != 0 {
		if err := t.flag(src.Flags); err != nil {
			return fmt.Errorf("set inode flags: %w", err)
		}
	}
	fault.Point("build.dressed")
	if t.fd >= 0 && src.Size > 0 && src.Data >= 0 && !t.w.volatile {
		if err := unix.Fsync(t.fd); err != nil {
			return fmt.Errorf("sync: %w", err)
		}
	}
	fault.Point("build.synced")
	return nil
}

// setXattrs sets those attributes that are wanted now.
func (t *Temp) setXattrs(src Source, now func(attr string) bool) error {
	at, name := t.at()
	for _, x := range src.Xattrs {
		if !now(x.Name) {
			continue
		}
		if err := fsat.Setxattr(at, name, x.Name, x.Value, 0); err != nil {
			if err == unix.EOPNOTSUPP && !mustKeep(x.Name, src) {
				continue
			}
			return fmt.Errorf("set attribute %s: %w", x.Name, err)
		}
	}
	return nil
}

// flag adds inode flags. A file system that has none is no error (kernel:
// ovl_copy_fileattr).
func (t *Temp) flag(flags uint32) (err error) {
	fd := t.fd
	if fd < 0 {
		if fd, err = fsat.OpenName(t.w.fd, t.name, unix.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
			return err
		}
		defer fsat.Close(fd)
	}
	err = fsat.AddFlags(fd, flags)
	if err == unix.ENOTTY || err == unix.EINVAL || err == unix.EOPNOTSUPP {
		return nil
	}
	return err
}

// at names the object for calls that take a directory and a name.
func (t *Temp) at() (dirfd int, name string) {
	if t.fd >= 0 {
		return t.fd, ""
	}
	return t.w.fd, t.name
}

// mustKeep tells the attributes without which a copy would grant more than its
// original (kernel: ovl_must_copy_xattr), or would be taken for complete.
func mustKeep(name string, src Source) bool {
	return src.Data < 0 && src.Size > 0 || name == "system.posix_acl_access" || name == "system.posix_acl_default" ||
		len(name) > 9 && name[:9] == "security."
}

// Name is the object's name in the scratch directory.
func (t *Temp) Name() string { return t.name }

// Publish moves the object under its final name; flags are those of
// renameat2(2), RENAME_NOREPLACE for an unnamed one. With RENAME_EXCHANGE what was there before is removed.
func (t *Temp) Publish(dirfd int, name string, flags uint) error {
	if t.name == "" {
		if err := fsat.LinkFd(t.fd, dirfd, name); err != nil {
			return err
		}
		fault.Point("build.published")
		return nil
	}
	if err := fsat.Rename(t.w.fd, t.name, dirfd, name, flags); err != nil {
		return err
	}
	fault.Point("build.published")
	if t.late != 0 {
		if err := fsat.Chmod(dirfd, name, t.late); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	if flags&unix.RENAME_EXCHANGE != 0 {
		t.w.Remove(t.name)
	}
	t.name = ""
	return nil
}

// Stat describes the finished object, which Publish does not change.
func (t *Temp) Stat(st *unix.Stat_t) error {
	at, name := t.at()
	return fsat.Stat(at, name, st)
}

// TakeFd hands over the descriptor of a regular file, open for reading and
// writing, or -1.
func (t *Temp) TakeFd() int {
	fd := t.fd
	t.fd = -1
	return fd
}

// Discard removes an unpublished object and closes what is open.
func (t *Temp) Discard() {
	if t.name != "" {
		t.w.Remove(t.name)
		t.name = ""
	}
	fsat.Close(t.fd)
	t.fd = -1
}
