package fault

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Env is the environment variable that asks for a fault.
const Env = "PLYFS_FAULT"

// Points are the names of all points, each with what has just been done there.
var Points = []struct{ Name, After string }{
	{"build.created", "an object is in the workdir, empty"},
	{"build.filled", "it has its data"},
	{"build.dressed", "it has its attributes"},
	{"build.synced", "it is durable"},
	{"build.published", "it has its name; what was there before may be in the workdir"},
	{"complete.copied", "a metacopied file has its data"},
	{"complete.restored", "it has its attributes again"},
	{"complete.synced", "it is durable"},
	{"complete.done", "it is no metacopy any more"},
	{"copyup.impure", "the directory says that it holds a copy"},
	{"copyup.done", "the copy has its name, the directory its time"},
	{"copyup.indexed", "the copy is in the link index, without a name"},
	{"linkup.counted", "the attribute nlink expects one more name of the copy"},
	{"linkup.linked", "the copy has one more name"},
	{"create.done", "a new object has its name"},
	{"link.marked", "a file that gets another name has its redirect"},
	{"link.counted", "the attribute nlink expects the name"},
	{"link.built", "the new name is in the workdir"},
	{"link.done", "the new name is there"},
	{"unlink.counted", "the attribute nlink expects the name to go"},
	{"unlink.done", "the name is gone"},
	{"unlink.last", "the last name of an object in the link index is gone"},
	{"rmdir.moved", "a directory with whiteouts is in the workdir"},
	{"whiteout.made", "the whiteout that others are linked to is in the workdir"},
	{"whiteout.linked", "one more whiteout is in the workdir or in its place"},
	{"whiteout.placed", "the whiteout is in its place; what was there may be in the workdir"},
	{"rename.cleared", "the directory to be replaced is empty"},
	{"rename.replaced", "a whiteout at the new name has the form that can be moved"},
	{"rename.marked", "what moves has its redirect, or is opaque"},
	{"rename.prepared", "everything that moves has its attributes"},
	{"rename.swapped", "a whiteout from the new name lies at the old one"},
	{"rename.moved", "without RENAME_WHITEOUT: the old name has no whiteout yet"},
	{"rename.done", "the names have changed"},
	{"work.swept", "one thing that an earlier mount left behind is gone"},
	{"close.synced", "the mount is gone, the upper synced, the workdir not emptied"},
}

// trap is what happens at the points.
type trap struct {
	name  string
	left  atomic.Int64 // arrivals until the end
	both  bool         // of the parent, too
	crash bool         // every time
	trace *os.File     // nil: none
}

var armed atomic.Pointer[trap]

// Arm reads the environment; first says that no other process has served the mount
// before. What is wrong there is said on standard error, and no fault is armed.
func Arm(first bool) {
	t, err := parse(os.Getenv(Env))
	if err != nil {
		fmt.Fprintf(os.Stderr, "plyfs: %s: %v\n", Env, err)
		return
	}
	if t != nil && t.trace == nil && !t.crash && !first {
		t = nil
	}
	armed.Store(t)
}

// parse makes a trap of the value of the environment variable, nil if it is
// empty.
func parse(value string) (*trap, error) {
	if value == "" {
		return nil, nil
	}
	value, crash := strings.CutPrefix(value, "crash:")
	value, both := strings.CutPrefix(value, "mount:")
	name, arg, hasArg := strings.Cut(value, ":")
	if name == "trace" {
		f, err := os.OpenFile(arg, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		return &trap{trace: f}, err
	}
	if !known(name) {
		return nil, fmt.Errorf("no point %q", name)
	}
	t := &trap{name: name, both: both, crash: crash}
	t.left.Store(1)
	if hasArg {
		n, err := strconv.ParseInt(arg, 10, 32)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("arrival %q: expected a number from 1 on", arg)
		}
		t.left.Store(n)
	}
	return t, nil
}

func known(name string) bool {
	for _, p := range Points {
		if p.Name == name {
			return true
		}
	}
	return false
}

// Point is a place where the process may be asked to end.
func Point(name string) {
	if t := armed.Load(); t != nil {
		t.arrive(name)
	}
}

func (t *trap) arrive(name string) {
	if t.trace != nil {
		_, _ = t.trace.WriteString(name + "\n") // a test that misses it says so
		return
	}
	if t.name == name && t.crash {
		os.Exit(70)
	}
	if t.name != name || t.left.Add(-1) != 0 {
		return
	}
	if t.both {
		_ = unix.Kill(unix.Getppid(), unix.SIGKILL) // it may have ended
	}
	_ = unix.Kill(unix.Getpid(), unix.SIGKILL)
	select {} // the signal arrives before another system call would
}
