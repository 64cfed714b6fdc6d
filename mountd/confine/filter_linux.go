//go:build amd64 || arm64

package confine

import (
	"fmt"
	"math"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data (include/uapi/linux/seccomp.h); both architectures are
// little endian, so the low half of an argument comes first.
const (
	offNr   = 0
	offArch = 4
	offArgs = 16
)

// x32 marks the calls of that way to use the processor on amd64 (__X32_SYSCALL_BIT).
const x32 = 0x40000000

// rule allows a call by one argument.
type rule struct {
	call uint32
	arg  uint32
	mask uint32   // of the low half; the high half is not looked at
	want []uint32 // any of these
}

// rules are the calls whose arguments decide.
func rules(o Options) []rule {
	self := uint32(os.Getpid())
	rs := []rule{
		{unix.SYS_CLONE, 0, unix.CLONE_THREAD | newNamespaces, []uint32{unix.CLONE_THREAD}},
		{unix.SYS_TGKILL, 0, math.MaxUint32, []uint32{self}},
		{unix.SYS_PRCTL, 0, math.MaxUint32, []uint32{unix.PR_SET_NAME, unix.PR_GET_NAME, unix.PR_SET_VMA}},
		{unix.SYS_PRLIMIT64, 0, math.MaxUint32, []uint32{0, self}},
	}
	if !o.Kill {
		rs = append(rs, rule{unix.SYS_KILL, 0, math.MaxUint32, []uint32{self}})
	}
	return rs
}

// newNamespaces are the flags of clone(2) that make namespaces.
const newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER |
	unix.CLONE_NEWPID | unix.CLONE_NEWNET

// program builds the filter. refuse is what happens to calls that are not allowed.
func program(o Options, refuse uint32) []unix.SockFilter {
	ret := func(action uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
	}
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	// unless skips n instructions unless the loaded word is k.
	unless := func(k uint32, n uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: n, K: k}
	}
	p := []unix.SockFilter{
		load(offArch),
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 1, K: auditArch},
		ret(unix.SECCOMP_RET_KILL_PROCESS),
		load(offNr),
		{Code: unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K, Jf: 1, K: x32},
		ret(unix.SECCOMP_RET_KILL_PROCESS),
	}
	for _, r := range rules(o) {
		// The number is not loaded again behind a rule: each ends with an answer.
		body := []unix.SockFilter{load(offArgs + 8*r.arg), {Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: r.mask}}
		for _, w := range r.want {
			body = append(body, unless(w, 1), ret(unix.SECCOMP_RET_ALLOW))
		}
		body = append(body, ret(refuse))
		p = append(append(p, unless(r.call, uint8(len(body)))), body...)
	}
	list := append(calls(), moreCalls...)
	if o.Unmount {
		list = append(list, unix.SYS_UMOUNT2)
	}
	if o.Kill {
		list = append(list, unix.SYS_KILL)
	}
	for _, c := range list {
		p = append(p, unless(c, 1), ret(unix.SECCOMP_RET_ALLOW))
	}
	return append(p, ret(refuse))
}

// Filter refuses, from now on and in all threads, the calls that no mount server needs. It
// sets no_new_privs. Nothing can be taken back.
func Filter(o Options) error {
	return install(program(o, unix.SECCOMP_RET_ERRNO|uint32(unix.ENOSYS)))
}

func install(p []unix.SockFilter) error {
	runtime.LockOSThread() // no_new_privs is that of a thread
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	prog := unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}
	for _, flags := range []uintptr{unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_LOG, unix.SECCOMP_FILTER_FLAG_TSYNC} {
		thread, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
		switch {
		case errno == unix.EINVAL && flags&unix.SECCOMP_FILTER_FLAG_LOG != 0: // before Linux 4.14
		case errno != 0:
			return fmt.Errorf("%w: %w", ErrUnavailable, errno)
		case thread != 0:
			return fmt.Errorf("%w: thread %d has a filter of its own", ErrUnavailable, thread)
		default:
			return nil
		}
	}
	return ErrUnavailable
}
