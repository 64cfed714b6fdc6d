package sandbox

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// idCall is a system call that is given user or group ids.
type idCall struct {
	nr   uint32
	args []int // which arguments they are; none: always about others
}

// keepID is the id that leaves an owner or a user as it is.
const keepID = 0xffffffff

// Offsets of struct seccomp_data.
const (
	dataNr   = 0
	dataArch = 4
	dataArgs = 16
)

// emulateThread lets what the calling thread starts believe that owners and users
// can be changed, where there is one id only. The kernel refuses any other before the
// file system is asked, and packages whose files belong to a group could not be
// installed. What is about the one id is done; anything else is answered with success
// and changes nothing, so that new files belong to root. Programs of another
// architecture than ours get the kernel's own answer.
func emulateThread() error {
	if auditArch == 0 {
		return nil
	}
	prog := idFilter(auditArch, idCalls)
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	// CAP_SYS_ADMIN of our namespace allows it without no_new_privs.
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&fprog)))
	runtime.KeepAlive(prog)
	if errno != 0 && !errors.Is(errno, unix.ENOSYS) && !errors.Is(errno, unix.EINVAL) { // a kernel without
		return fmt.Errorf("seccomp: %w", errno)
	}
	return nil
}

// idFilter is the program of the filter.
func idFilter(arch uint32, calls []idCall) []unix.SockFilter {
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	equal := func(k uint32, yes, no int) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: uint8(yes), Jf: uint8(no), K: k}
	}
	ret := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k} }
	const done = unix.SECCOMP_RET_ERRNO // with errno 0: success
	prog := []unix.SockFilter{
		load(dataArch), equal(arch, 1, 0), ret(unix.SECCOMP_RET_ALLOW),
		load(dataNr),
	}
	for _, c := range calls {
		var block []unix.SockFilter
		for _, arg := range c.args { // the low half: an id has 32 bits
			block = append(block, load(dataArgs+8*uint32(arg)+lowHalf), equal(0, 2, 0), equal(keepID, 1, 0), ret(done))
		}
		if len(c.args) == 0 {
			block = append(block, ret(done))
		} else {
			block = append(block, ret(unix.SECCOMP_RET_ALLOW))
		}
		prog = append(prog, equal(c.nr, 0, len(block)))
		prog = append(prog, block...)
	}
	return append(prog, ret(unix.SECCOMP_RET_ALLOW))
}

// lowHalf is where the low 32 bits of an argument are: first, on the machines that
// have an auditArch.
const lowHalf = 0

// aptConfig is a configuration for apt where there is one id: it would download as
// another user, and makes sure that it is one.
const (
	aptConfigFile = "apt.conf"
	aptConfigText = "APT::Sandbox::User \"root\";\n"
)

// writeAptConfig puts the configuration where no image has anything.
func (r *root) writeAptConfig() error {
	fd, err := fsat.OpenName(r.dev, aptConfigFile, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o644)
	if err != nil {
		return fmt.Errorf("configuration of apt: %w", err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(aptConfigText)); err != nil {
		return fmt.Errorf("configuration of apt: %w", err)
	}
	return nil
}
