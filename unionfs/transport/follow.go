package transport

import (
	"bytes"
	"encoding/binary"
	"runtime"
	"strconv"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// follower lets the reader serve a client from the client's own processor. A
// program that waits for each of its requests leaves its processor idle
// meanwhile, and to wake an idle processor from another one costs several times
// what a request costs, in a virtual machine above all (measured: 24 of 36 us of
// a LOOKUP's round trip). If both are on one processor, the scheduler just
// switches between them.
//
// The scheduler by itself would wake the client on an idle processor, away from a
// server that runs. So the reader takes the policy SCHED_IDLE: a processor that
// runs nothing else counts as idle, the client stays, and takes its processor back
// as soon as it is awake. The price is that the reader gets little of a processor
// that others keep busy: the watch looks after that, and takes the policy back when
// a request waits. This takes the right to raise a thread's priority again
// (CAP_SYS_NICE), and is not done without.
//
// A thread with such a policy must not hand it down: the reader's goroutine is
// locked to it, which makes the runtime start further threads from another.
type follower struct {
	able bool           // immutable once the loop runs
	attr unix.SchedAttr // the thread's own policy; immutable
	mask unix.CPUSet    // the processors that we may use; immutable

	// thread is the one that follows, 0 if none. Whoever sets it to 0 gives the
	// thread its own policy back.
	thread atomic.Int32
	// beats counts what the following reader does, for the watch.
	beats atomic.Uint64
	// patience is how many requests in a row a client must have made for it
	// to be followed. The watch raises it when it had to step in.
	patience atomic.Int64

	// Of the reader, which alone uses them:
	client uint32 // the thread that made the last request
	run    int64  // how many in a row it has made
	cpu    int    // which we are on when we follow
	locked bool   // the goroutine is locked to its thread
	looks  int    // how often we had to look for the last few requests
}

const (
	followAfter   = 32      // requests
	followAtMost  = 1 << 20 // requests
	followRecheck = 256     // requests between two looks at where the client is
	// followLooks is how often a following reader looks for the next request
	// before it sleeps. While its client runs it does not run at all.
	followLooks = 60

	schedIdle = 5
)

func (f *follower) init() {
	f.patience.Store(followAfter)
	attr, err := unix.SchedGetAttr(0, 0)
	if err != nil || runtime.NumCPU() == 1 || unix.SchedGetaffinity(0, &f.mask) != nil {
		return
	}
	f.attr = *attr
	f.able = mayRaise()
}

// mayRaise reports whether threads of ours can go back from SCHED_IDLE. It is tried
// with a thread that is thrown away.
func mayRaise() bool {
	result := make(chan bool)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends
		attr, err := unix.SchedGetAttr(0, 0)
		if err == nil {
			err = unix.SchedSetAttr(0, idleAttr(), 0)
		}
		if err == nil {
			err = unix.SchedSetAttr(0, attr, 0)
		}
		result <- err == nil
	}()
	return <-result
}

func idleAttr() *unix.SchedAttr {
	return &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: schedIdle, Flags: unix.SCHED_FLAG_RESET_ON_FORK}
}

func (f *follower) following() bool { return f.thread.Load() != 0 }

// see notes a request of the kernel's caller pid, 0 if it comes from nobody, and
// begins or ends to follow. It is the reader's.
func (f *follower) see(pid uint32) {
	if !f.able || pid == 0 {
		return
	}
	if pid != f.client {
		f.client, f.run = pid, 0
		f.leave()
		return
	}
	f.run++
	f.beats.Add(1)
	switch {
	case f.run < f.patience.Load():
	case !f.following():
		f.enter()
	case f.run%followRecheck == 0:
		// Where it is with us we find its next request at once.
		if f.looks > followRecheck*2 {
			if cpu := cpuOf(pid); cpu >= 0 && cpu != f.cpu {
				f.leave()
				f.enter()
			}
		}
		f.looks = 0
		if p := f.patience.Load(); p > followAfter {
			f.patience.CompareAndSwap(p, max(p/2, followAfter)) // it goes well
		}
	}
}

// enter makes this thread follow the client.
func (f *follower) enter() {
	cpu := cpuOf(f.client)
	if cpu < 0 || !f.mask.IsSet(cpu) {
		f.run = 0
		return
	}
	var set unix.CPUSet
	set.Set(cpu)
	if !f.locked {
		runtime.LockOSThread()
		f.locked = true
	}
	if unix.SchedSetaffinity(0, &set) != nil || unix.SchedSetAttr(0, idleAttr(), 0) != nil {
		f.restore(0)
		f.unlock()
		f.run = 0
		return
	}
	f.cpu, f.looks = cpu, 0
	f.thread.Store(int32(unix.Gettid()))
}

// leave makes this thread an ordinary one again. It is the reader's.
func (f *follower) leave() {
	f.giveBack()
	f.unlock()
}

func (f *follower) unlock() {
	if f.locked {
		runtime.UnlockOSThread()
		f.locked = false
	}
}

// giveBack restores the policy of the thread that follows; anybody may call it.
func (f *follower) giveBack() {
	if tid := f.thread.Swap(0); tid != 0 {
		f.restore(int(tid))
	}
}

func (f *follower) restore(tid int) {
	_ = unix.SchedSetAttr(tid, &f.attr, 0)
	_ = unix.SchedSetaffinity(tid, &f.mask)
}

// starved makes it harder to be followed, after it went wrong.
func (f *follower) starved() {
	f.giveBack()
	if p := f.patience.Load(); p < followAtMost {
		f.patience.Store(p * 4)
	}
}

// cpuOf returns the processor that a thread was on last, -1 if that cannot be
// found out.
func cpuOf(tid uint32) int {
	fd, err := unix.Open("/proc/"+strconv.FormatUint(uint64(tid), 10)+"/stat", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1
	}
	defer unix.Close(fd)
	var buf [1024]byte
	n, err := unix.Read(fd, buf[:])
	if err != nil {
		return -1
	}
	// Field 39 (proc_pid_stat(5)); the second can contain anything.
	const field = 39 - 3
	fields := bytes.Fields(buf[bytes.LastIndexByte(buf[:n], ')')+1 : n])
	if len(fields) <= field {
		return -1
	}
	cpu, err := strconv.Atoi(string(fields[field]))
	if err != nil {
		return -1
	}
	return cpu
}

// callerOf returns the thread that made a request.
func callerOf(in []byte) uint32 { return binary.NativeEndian.Uint32(in[32:]) }
