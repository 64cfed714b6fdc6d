package sandbox

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// Attributes of the mounts of a root. All but /dev/pts and the bound nodes are nodev.
const (
	quiet    = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV
	inert    = quiet | unix.MOUNT_ATTR_NOEXEC
	readOnly = inert | unix.MOUNT_ATTR_RDONLY
)

// option is one key and value of a file system; without a value it is a flag.
type option struct{ key, value string }

// newMount makes a mount of a file system that lies nowhere yet.
func newMount(fstype string, attr int, opts ...option) (fd int, err error) {
	fs, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("file system %s: %w", fstype, err)
	}
	defer unix.Close(fs)
	for _, o := range append([]option{{"source", fstype}}, opts...) {
		if o.value == "" {
			err = unix.FsconfigSetFlag(fs, o.key)
		} else {
			err = unix.FsconfigSetString(fs, o.key, o.value)
		}
		if err != nil {
			return -1, fmt.Errorf("file system %s: option %s=%s: %w%s", fstype, o.key, o.value, err, fsLog(fs))
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("file system %s: %w%s", fstype, err, fsLog(fs))
	}
	fd, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return -1, fmt.Errorf("mount %s: %w", fstype, err)
	}
	return fd, nil
}

// fsLog returns what the kernel had to say about a file system, for a message.
func fsLog(fd int) string {
	var b strings.Builder
	buf := make([]byte, 1024)
	for {
		n, err := unix.Read(fd, buf)
		if err != nil || n <= 0 {
			return b.String()
		}
		b.WriteString(": " + strings.TrimSpace(string(buf[:n])))
	}
}

// clone makes a mount of its own, with attributes added, of what lies at path
// below dirFd; of dirFd itself if path is empty.
func clone(dirFd int, path string, attr uint64, recursive bool) (fd int, err error) {
	flags, setFlags := uint(unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC), uint(unix.AT_EMPTY_PATH)
	if path == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	if recursive {
		flags |= unix.AT_RECURSIVE
		setFlags |= unix.AT_RECURSIVE
	}
	fd, err = unix.OpenTree(dirFd, path, flags)
	if err != nil {
		return -1, fmt.Errorf("bind: %w", err)
	}
	set := unix.MountAttr{Attr_set: attr, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(fd, "", setFlags, &set); err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("set attributes of a bind mount: %w", err)
	}
	return fd, nil
}

// attach puts a mount on what the descriptor at holds, which may be a link.
func attach(mount, at int) error {
	if err := unix.MoveMount(mount, "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach a mount: %w", err)
	}
	return nil
}

// mountOver makes a mount and attaches it to at. The mount stays open.
func mountOver(at int, fstype string, attr int, opts ...option) (fd int, err error) {
	fd, err = newMount(fstype, attr, opts...)
	if err != nil {
		return -1, err
	}
	if err := attach(fd, at); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// bindOver attaches a clone of what lies at path below dirFd to at.
func bindOver(at, dirFd int, path string, attr uint64, recursive bool) error {
	fd, err := clone(dirFd, path, attr, recursive)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return attach(fd, at)
}

// protect makes paths of one of our own mounts read-only or hides them; those
// that this kernel does not have are passed over.
func protect(mount int, paths []string, hide bool) error {
	for _, p := range paths {
		if err := protectOne(mount, p, hide); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("protect %q: %w", p, err)
		}
	}
	return nil
}

func protectOne(mount int, path string, hide bool) error {
	at, err := fsat.OpenBeneath(mount, path, unix.O_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(at)
	if !hide {
		return bindOver(at, at, "", unix.MOUNT_ATTR_RDONLY, true)
	}
	var st unix.Stat_t
	if err := unix.Fstat(at, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return bindOver(at, unix.AT_FDCWD, "/dev/null", unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOEXEC, false)
	}
	fd, err := mountOver(at, "tmpfs", readOnly)
	fsat.Close(fd)
	return err
}
