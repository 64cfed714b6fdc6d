package confine

import (
	"errors"
	"fmt"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Root makes procfs, read-only, the root and working directory of this process. It takes
// CAP_SYS_ADMIN and CAP_SYS_CHROOT; after an error everything is as before. From then on paths
// begin where /proc was.
func Root() error {
	_, _ = time.Now().Zone() // reads /etc/localtime, once
	fd, err := unix.OpenTree(unix.AT_FDCWD, "/proc", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("private copy of /proc: %w", err)
	}
	defer unix.Close(fd)
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return fmt.Errorf("private copy of /proc: %w", err)
	}
	if fs.Type != unix.PROC_SUPER_MAGIC {
		return errors.New("private copy of /proc: it is no procfs")
	}
	// Root may write to files below /proc/sys without any capability (fs/proc/proc_sysctl.c:
	// test_perm), among them the name of the program that is given core dumps.
	attr := unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC,
		Propagation: unix.MS_PRIVATE,
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("private copy of /proc: %w", err)
	}
	// The root, unlike capabilities, is that of all threads (CLONE_FS).
	var old int
	if old, err = unix.Open(".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("working directory: %w", err)
	}
	defer unix.Close(old)
	if err := unix.Fchdir(fd); err != nil {
		return fmt.Errorf("enter the private copy of /proc: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		_ = unix.Fchdir(old) // where we come from
		return fmt.Errorf("make procfs the root: %w", err)
	}
	return nil
}

// DropChroot gives up CAP_SYS_CHROOT in all threads: with it, somebody who has a descriptor of
// a directory can make that the root. A program that is linked with C cannot do that for all of its
// threads (syscall.AllThreadsSyscall); EOPNOTSUPP.
func DropChroot() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Capget(&header, &have[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	const bit = 1 << unix.CAP_SYS_CHROOT
	have[0].Effective &^= bit
	have[0].Permitted &^= bit
	have[0].Inheritable &^= bit
	if err := capsetAll(&header, &have); err != 0 {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return nil
}

func capsetAll(header *unix.CapUserHeader, data *[2]unix.CapUserData) syscall.Errno {
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(header)), uintptr(unsafe.Pointer(data)), 0)
	return errno
}
