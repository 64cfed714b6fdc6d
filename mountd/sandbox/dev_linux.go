package sandbox

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// devNodes are the devices of a root, bound from the machine's /dev: nobody in a
// user namespace can make any, and one that was made would not work.
var devNodes = []struct {
	name         string
	major, minor uint32
}{
	{"null", 1, 3},
	{"zero", 1, 5},
	{"full", 1, 7},
	{"random", 1, 8},
	{"urandom", 1, 9},
	{"tty", 5, 0},
}

// devLinks are the names that programs expect beside them.
var devLinks = []struct{ name, target string }{
	{"fd", "/proc/self/fd"},
	{"stdin", "/proc/self/fd/0"},
	{"stdout", "/proc/self/fd/1"},
	{"stderr", "/proc/self/fd/2"},
	{"ptmx", "pts/ptmx"},
}

// ttyGroup is the group of terminals, everywhere.
const ttyGroup = 5

// mountDev makes a /dev of its own. Its files are nodev, so that a node that
// somebody makes there does not work; a bound node is a mount of its own.
func (r *root) mountDev(at int) (err error) {
	r.dev, err = mountOver(at, "tmpfs", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC,
		option{"mode", "0755"}, option{"size", "64m"})
	if err != nil {
		return err
	}
	for _, n := range devNodes {
		if err := r.bindNode(n.name, unix.Mkdev(n.major, n.minor)); err != nil {
			return fmt.Errorf("node %s: %w", n.name, err)
		}
	}
	for _, l := range devLinks {
		if err := fsat.Symlink(l.target, r.dev, l.name); err != nil {
			return fmt.Errorf("link %s: %w", l.name, err)
		}
	}
	ptsOptions := []option{{"newinstance", ""}, {"ptmxmode", "0666"}, {"mode", "0620"}}
	if ok, err := mapped("/proc/self/gid_map", ttyGroup); err != nil {
		return err
	} else if ok {
		ptsOptions = append(ptsOptions, option{"gid", fmt.Sprint(ttyGroup)})
	}
	r.pts, err = r.devMount("pts", "devpts", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC, ptsOptions...)
	if err != nil {
		return err
	}
	fd, err := r.devMount("shm", "tmpfs", inert, option{"mode", "1777"}, option{"size", "64m"})
	if err != nil {
		return err
	}
	_ = unix.Close(fd)
	if fd, err = r.devMount("mqueue", "mqueue", inert); err == nil { // not every kernel has it
		_ = unix.Close(fd)
	}
	return nil
}

// devMount mounts on a new directory of /dev.
func (r *root) devMount(name, fstype string, attr int, opts ...option) (fd int, err error) {
	at, err := makeIn(r.dev, name, true)
	if err != nil {
		return -1, fmt.Errorf("%s: %w", name, err)
	}
	defer unix.Close(at)
	fd, err = mountOver(at, fstype, attr, opts...)
	if err != nil {
		return -1, fmt.Errorf("%s: %w", name, err)
	}
	return fd, nil
}

// bindNode binds a device node of the machine, if it is the one that we mean.
func (r *root) bindNode(name string, rdev uint64) error {
	fd, err := unix.Open("/dev/"+name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || uint64(st.Rdev) != rdev {
		return fmt.Errorf("/dev/%s of this machine is another device", name)
	}
	return r.bindInDev(name, fd)
}

// bindInDev binds what fd holds on a new file of /dev.
func (r *root) bindInDev(name string, fd int) error {
	at, err := makeIn(r.dev, name, false)
	if err != nil {
		return err
	}
	defer unix.Close(at)
	return bindOver(at, fd, "", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC, false)
}
