package inject

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/trace"
)

// Limits of a rule.
const (
	// Longest is how long a rule lasts at most, Default if nothing else is said.
	Longest = 24 * time.Hour
	Default = 10 * time.Minute
	// LongestLatency keeps a mount from hanging for good.
	LongestLatency = 10 * time.Minute
	// MostRules is how many a mount has at once.
	MostRules = 256
)

// Rule is a fault and when it happens.
type Rule struct {
	// ID is the number by which a rule is cleared. The server gives it.
	ID int `json:"id,omitempty"`
	// Ops are operations, or groups of them (trace.Groups). At least one.
	Ops []string `json:"ops"`
	// Path is a pattern (trace.MatchPath) for the path or the new path of the request; empty: any.
	Path trace.Text `json:"path,omitempty"`
	// Pid is a process or a thread; Command the name of a process. Empty: any.
	Pid     uint32     `json:"pid,omitempty"`
	Command trace.Text `json:"command,omitempty"`

	// Errno is the name of the error to answer with; Latency how long to wait first. Short is
	// the most bytes that a read or write moves. At least one of the three.
	Errno   string        `json:"errno,omitempty"`
	Latency time.Duration `json:"latency,omitempty"`
	Short   int64         `json:"short,omitempty"`

	// Prob is the probability with which a request that matches meets the fault; 0 stands for 1.
	Prob float64 `json:"prob,omitempty"`
	// Nth leaves all requests alone that match, but this one; 1 is the first. From leaves alone those
	// before this one: a disk that is full stays full.
	Nth  uint64 `json:"nth,omitempty"`
	From uint64 `json:"from,omitempty"`

	// For is how long the rule lasts; 0: Default. Expires is when it ends, the server says it.
	For     time.Duration `json:"for,omitempty"`
	Expires time.Time     `json:"expires,omitzero"`

	// Matched and Hit are how many requests have matched, and have met the fault.
	Matched uint64 `json:"matched,omitempty"`
	Hit     uint64 `json:"hit,omitempty"`
}

// never are the operations that meet no faults: the kernel does not wait for them or does not
// ask, or nothing could be unmounted.
var never = []string{"other", "forget", "batch_forget", "init", "destroy", "interrupt", "notify_reply", "release", "releasedir", "flush", "getlk", "setlk", "setlkw", "bmap", "poll", "setupmapping", "removemapping"}

// dataOps are those that the kernel leaves out if it can.
var dataOps = []string{"read", "write"}

// Validate reports what makes no sense. ops are the names of all operations.
func (r *Rule) Validate(ops []string) error {
	if len(r.Ops) == 0 {
		return errors.New("no operation given: say which ones are to meet the fault")
	}
	for _, o := range r.Ops {
		if slices.Contains(never, o) {
			return fmt.Errorf("operation %q meets no faults: nobody asks, or waits for the answer", o)
		}
	}
	f := trace.Filter{Ops: r.Ops, Path: string(r.Path)}
	if err := f.Validate(ops); err != nil {
		return err
	}
	switch {
	case r.Errno == "" && r.Latency == 0 && r.Short == 0:
		return errors.New("no fault given: an error, a latency or a number of bytes")
	case r.Errno != "" && r.errno() == 0:
		return fmt.Errorf("unknown error %q: expected a name as EIO or ENOSPC", r.Errno)
	case r.errno() == unix.ENOSYS:
		return errors.New("ENOSYS cannot be injected: the kernel takes it for an operation that there is not, and never asks again")
	case r.Latency < 0 || r.Latency > LongestLatency:
		return fmt.Errorf("latency %v: expected at most %v", r.Latency, LongestLatency)
	case r.Short < 0:
		return errors.New("a negative number of bytes")
	case r.Short > 0 && (r.Errno != "" || !r.only(dataOps)):
		return errors.New("a number of bytes is for read and write alone, and does not go with an error")
	case r.Nth > 0 && r.From > 0:
		return errors.New("one match, or all from one on: not both")
	case r.Prob < 0 || r.Prob > 1:
		return fmt.Errorf("probability %v: expected more than 0, and 1 at most", r.Prob)
	case r.For < 0 || r.For > Longest:
		return fmt.Errorf("time %v: a rule lasts %v at most", r.For, Longest)
	}
	return nil
}

// only reports whether the rule is about nothing but these operations.
func (r *Rule) only(ops []string) bool {
	return !slices.ContainsFunc(r.Ops, func(o string) bool { return !slices.Contains(ops, o) })
}

// Data reports whether the rule is about data: it acts from the next open of a file on.
func (r *Rule) Data() bool {
	return slices.ContainsFunc(dataOps, func(o string) bool { return trace.HasOp(r.Ops, o) })
}

// errno is the number of the error; 0 if there is no such name.
func (r *Rule) errno() syscall.Errno { return trace.ErrnoOf(r.Errno) }

// matches reports whether a request is one that the rule is about.
func (r *Rule) matches(e *trace.Event) bool {
	return trace.HasOp(r.Ops, e.Op) && !slices.Contains(never, e.Op) &&
		(r.Path == "" || e.MatchPath(string(r.Path))) &&
		(r.Pid == 0 || r.Pid == e.Pid || r.Pid == e.Thread) &&
		(r.Command == "" || string(r.Command) == e.Command)
}
