package trace

import (
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Event is one request that has been answered.
type Event struct {
	Time time.Time `json:"time"`
	// Latency is how long making the answer took, in nanoseconds.
	Latency time.Duration `json:"latency"`
	// Op is the name of the operation, as in the counters: "lookup", "open", "rename".
	Op string `json:"op"`
	// Thread is who has asked, 0: nobody, or somebody of another pid namespace. Pid is the
	// process of the thread, Command its name.
	Thread  uint32 `json:"thread,omitempty"`
	Pid     uint32 `json:"pid,omitempty"`
	Command string `json:"command,omitempty"`
	// Container is the name of the innermost control group that looks like that of a
	// container: an ID of 64 hexadecimal digits, or a systemd scope of one.
	Container string `json:"container,omitempty"`
	UID       uint32 `json:"uid"`
	GID       uint32 `json:"gid"`

	// Path is the object in the mount, "/" its root. Empty: an object without a name, or
	// one that the kernel knows and we do not.
	Path string `json:"path,omitempty"`
	// To is the new name of a rename or link, or what a symbolic link leads to.
	To string `json:"to,omitempty"`
	// Node is the number of the object between the kernel and us.
	Node uint64 `json:"node"`
	// Layer is where the object was when the request came, or a new one is now: "upper",
	// "lower:1" (the topmost), "lower:2"…; empty: there is none, or it is not known.
	Layer string `json:"layer,omitempty"`
	// Label is what people call that layer, if it has a name of its own: "layer 3 of 5".
	Label string `json:"label,omitempty"`
	// CopiedUp: after the request the object, or the directory that a new one is in, is in the
	// upper, and was not before.
	CopiedUp bool `json:"copiedUp,omitempty"`
	// Dirs is how many directories above it were copied up for that.
	Dirs int `json:"dirs,omitempty"`

	// Detail is what else the request says: flags, modes, the name of an attribute.
	Detail string `json:"detail,omitempty"`
	// Offset and Size are of data that was asked for, Bytes how many were read or written.
	Offset int64 `json:"offset,omitempty"`
	Size   int64 `json:"size,omitempty"`
	Bytes  int64 `json:"bytes,omitempty"`

	// Error is the name of the error that was answered, as ENOENT; empty: none.
	Error string `json:"error,omitempty"`
	// Injected: the answer, or its delay, is that of a fault that somebody has asked for.
	Injected bool `json:"injected,omitempty"`
}

// ErrnoOf returns the number of an error by its name, in small letters, too; 0 if there is none.
func ErrnoOf(name string) syscall.Errno {
	for e := syscall.Errno(1); e < 134; e++ { // the last one of Linux
		if n := unix.ErrnoName(e); n != "" && strings.EqualFold(n, name) {
			return e
		}
	}
	return 0
}

// errorName returns ENOENT for ENOENT.
func errorName(errno syscall.Errno) string {
	if errno == 0 {
		return ""
	}
	if n := unix.ErrnoName(errno); n != "" {
		return n
	}
	return errno.Error()
}
