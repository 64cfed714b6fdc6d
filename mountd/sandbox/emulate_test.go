package sandbox

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

// runFilter executes a filter on a system call.
func runFilter(t *testing.T, prog []unix.SockFilter, arch, nr uint32, args ...uint64) uint32 {
	t.Helper()
	data := binary.LittleEndian.AppendUint32(nil, nr)
	data = binary.LittleEndian.AppendUint32(data, arch)
	data = binary.LittleEndian.AppendUint64(data, 0) // instruction pointer
	for i := range 6 {
		var a uint64
		if i < len(args) {
			a = args[i]
		}
		data = binary.LittleEndian.AppendUint64(data, a)
	}
	var acc uint32
	for pc := 0; pc < len(prog); pc++ {
		switch in := prog[pc]; in.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			acc = binary.LittleEndian.Uint32(data[in.K:])
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			if acc == in.K {
				pc += int(in.Jt)
			} else {
				pc += int(in.Jf)
			}
		case unix.BPF_RET | unix.BPF_K:
			return in.K
		default:
			t.Fatalf("instruction %d: %+v", pc, in)
		}
	}
	t.Fatal("the filter does not end")
	return 0
}

func TestIDFilter(t *testing.T) {
	const arch, other = 7, 8
	calls := []idCall{{100, []int{1, 2}}, {101, []int{0}}, {102, nil}}
	prog := idFilter(arch, calls)
	const (
		keep  = 1<<32 - 1       // (uid_t)-1
		minus = ^uint64(0)      // the same, sign extended
		done  = uint32(0x50000) // SECCOMP_RET_ERRNO, 0
		allow = uint32(unix.SECCOMP_RET_ALLOW)
	)
	for _, c := range []struct {
		arch, nr uint32
		args     []uint64
		want     uint32
	}{
		{arch, 99, []uint64{5, 5, 5}, allow},
		{arch, 103, []uint64{5, 5, 5}, allow},
		{arch, 100, []uint64{5, 0, 0}, allow},
		{arch, 100, []uint64{5, keep, 0}, allow},
		{arch, 100, []uint64{5, minus, keep}, allow},
		{arch, 100, []uint64{5, 33, 0}, done},
		{arch, 100, []uint64{5, 0, 42}, done},
		{arch, 100, []uint64{5, keep, 42}, done},
		{arch, 100, []uint64{0, 1 << 32, 0}, allow}, // the kernel takes 32 bits
		{arch, 101, []uint64{0, 9}, allow},
		{arch, 101, []uint64{9, 0}, done},
		{arch, 102, []uint64{0, 0}, done},
		{other, 100, []uint64{5, 33, 0}, allow},
		{other, 102, nil, allow},
	} {
		if got := runFilter(t, prog, c.arch, c.nr, c.args...); got != c.want {
			t.Errorf("arch %d call %d %v: %#x, want %#x", c.arch, c.nr, c.args, got, c.want)
		}
	}
}
