package holder

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"

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
	unix.CAP_SYS_CHROOT, // until it is confined, see confine.go
}

// startWithout starts a mount server, as root without what it does not need: whoever finds
// a way to make it execute something is to have no more than files. A user's has nothing,
// and may have to run fusermount3.
//
// Capabilities are those of threads, and a program in Go has several before it can do
// anything; to change them all stops it for milliseconds. So a thread of ours gives them up,
// starts the server, and ends. With no_new_privs executing a program as root gives nothing
// back (security/commoncap.c: cap_bprm_creds_from_file), so the bounding set can stay.
func startWithout(cmd *exec.Cmd) error {
	if os.Geteuid() != 0 {
		return cmd.Start()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this function
		_ = dropPrivileges()   // not where a container lets nobody drop any: then it keeps them
		done <- cmd.Start()
	}()
	return <-done
}

// dropPrivileges gives up what is not needed, in the calling thread.
func dropPrivileges() error {
	var keep uint64
	for _, c := range needed {
		keep |= 1 << c
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Capget(&header, &have[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	for i := range have {
		part := uint32(keep >> (32 * i))
		have[i].Effective &= part
		have[i].Permitted &= part
		have[i].Inheritable &= part
	}
	if err := unix.Capset(&header, &have[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}
