package holder

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// needed are the capabilities without which a union of root's could not do what the
// kernel does in an overlay: it acts for everybody.
var needed = []int{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH, unix.CAP_FOWNER, unix.CAP_FSETID,
	unix.CAP_LINUX_IMMUTABLE, // inode flags
	unix.CAP_MKNOD,
	unix.CAP_SETFCAP,                          // security.capability
	unix.CAP_MAC_ADMIN, unix.CAP_MAC_OVERRIDE, // labels
	unix.CAP_SYS_ADMIN,    // trusted.*, files passed through, unmounting without a holder
	unix.CAP_SYS_RESOURCE, // the blocks that a file system reserves for root
	unix.CAP_LEASE,
}

// capabilities are given to the kernel for every thread: they must not lie on a stack,
// which moves.
var capabilities struct {
	header unix.CapUserHeader
	data   [2]unix.CapUserData
}

// dropPrivileges gives up what a mount server of root does not need: whoever finds a way to
// make it execute something is to have no more than files. It is not for users' servers,
// which have nothing and may have to run fusermount3.
func dropPrivileges() error {
	if os.Geteuid() != 0 {
		return nil
	}
	var keep uint64
	for _, c := range needed {
		keep |= 1 << c
	}
	last, err := lastCapability()
	if err != nil {
		return err
	}
	for c := 0; c <= last; c++ {
		if keep&(1<<c) == 0 {
			if err := allThreads(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0); err != nil {
				return fmt.Errorf("drop capability %d: %w", c, err)
			}
		}
	}
	c := &capabilities
	c.header.Version = unix.LINUX_CAPABILITY_VERSION_3
	if err := unix.Capget(&c.header, &c.data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	for i := range c.data {
		part := uint32(keep >> (32 * i))
		c.data[i].Effective &= part
		c.data[i].Permitted &= part
		c.data[i].Inheritable &= part
	}
	if err := allThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&c.header)), uintptr(unsafe.Pointer(&c.data[0])), 0); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	if err := allThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}

// allThreads makes a call in every thread: capabilities are those of threads.
func allThreads(call, a, b, c uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall6(call, a, b, c, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// lastCapability is the highest number that the kernel knows.
func lastCapability() (int, error) {
	b, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		return 0, fmt.Errorf("capabilities of the kernel: %w", err)
	}
	n := 0
	if _, err := fmt.Sscan(strings.TrimSpace(string(b)), &n); err != nil || n < 0 || n > 63 {
		return 0, fmt.Errorf("capabilities of the kernel: %q", b)
	}
	return n, nil
}
