package sandbox

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// capNames are the capabilities in the order of their numbers.
var capNames = []string{
	"CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE",
	"NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT",
	"SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE",
	"AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ",
	"PERFMON", "BPF", "CHECKPOINT_RESTORE",
}

// defaultCaps are what the engines give: enough to install packages.
var defaultCaps = []string{
	"AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW", "SETFCAP", "SETGID",
	"SETPCAP", "SETUID", "SYS_CHROOT",
}

// Caps is a set of capabilities, one bit each.
type Caps uint64

// ParseCaps returns the default set with changes. Names are in either case, with
// or without CAP_; ALL is all of them.
func ParseCaps(add, drop []string) (Caps, error) {
	set, err := capsOf(defaultCaps)
	if err != nil {
		return 0, err
	}
	more, err := capsOf(add)
	if err != nil {
		return 0, err
	}
	less, err := capsOf(drop)
	if err != nil {
		return 0, err
	}
	all := Caps(1)<<len(capNames) - 1
	switch { // what is named wins over ALL
	case less == all:
		return more, nil
	case more == all:
		return all &^ less, nil
	}
	return (set | more) &^ less, nil
}

func capsOf(names []string) (set Caps, err error) {
	for _, n := range names {
		name := strings.TrimPrefix(strings.ToUpper(n), "CAP_")
		i := slices.Index(capNames, name)
		switch {
		case name == "ALL":
			set = 1<<len(capNames) - 1
		case i < 0:
			return 0, fmt.Errorf("no capability is called %q: see capabilities(7)", n)
		default:
			set |= 1 << i
		}
	}
	return set, nil
}

// names returns the set in the form of the runtime specification.
func (c Caps) names() []string {
	var names []string
	for i, n := range capNames {
		if c&(1<<i) != 0 {
			names = append(names, "CAP_"+n)
		}
	}
	return names
}

// limitThread makes what the calling thread starts have no more than these
// capabilities, whatever is set-user-id. The thread itself keeps its own, so
// that what it starts cannot trace it.
func (c Caps) limitThread() error {
	for i := uintptr(0); ; i++ {
		have, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, i, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) { // the kernel has no more
			break
		}
		if err != nil {
			return fmt.Errorf("capability %d: %w", i, err)
		}
		if have == 0 || i < 64 && c&(1<<i) != 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, i, 0, 0, 0); err != nil {
			return fmt.Errorf("drop capability %d: %w", i, err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&head, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	if err := unix.Capset(&head, &data[0]); err != nil {
		return fmt.Errorf("clear inheritable capabilities: %w", err)
	}
	return nil
}
