package trace

import (
	"encoding/binary"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/fuseop"
)

func TestMatchPath(t *testing.T) {
	for _, c := range []struct {
		pattern, path string
		want          bool
	}{
		{"/etc/passwd", "/etc/passwd", true},
		{"/etc/*", "/etc/passwd", true},
		{"/etc/*", "/etc/ssl/cert", false},
		{"/etc/*", "/etc", false},
		{"/etc/**", "/etc", true},
		{"/etc/**", "/etc/ssl/cert", true},
		{"/etc/**", "/etcetera", false},
		{"/*/x/**", "/a/x/y/z", true},
		{"/**", "/", true},
		{"/**", "/a/b", true},
		{"/", "/", true},
		{"/", "/a", false},
		{"*.conf", "/etc/a.conf", true},
		{"*.conf", "/etc/a.conf/b", false},
		{"*.conf", "/", false},
		{"cache/**", "/var/cache/x/y", true},
		{"cache/**", "/var/cache", true},
		{"cache/**", "/var/caches", false},
		{"*", "", false},
		{"/srv/**", "", false},
		{"/srv/**", "python3.11", false}, // where a link leads
		{"/srv/**", "../x/y", false},
		{"srv/**", "x/y", false},
		{"/**", "x", false},
		{"*", ".", false},
		{"[ab]", "/x/a", true},
		{"/a\\*", "/a*", true},
		{"/a\\*", "/ab", false},
	} {
		if err := ValidatePath(c.pattern); err != nil {
			t.Errorf("%q: %v", c.pattern, err)
		}
		if got := MatchPath(c.pattern, c.path); got != c.want {
			t.Errorf("%q matches %q: %v", c.pattern, c.path, got)
		}
	}
	for _, bad := range []string{"etc/passwd", "/[", "a/b/**"} {
		if ValidatePath(bad) == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestFilterValidate(t *testing.T) {
	for _, f := range []Filter{{Layers: []string{"lower:0"}}, {Layers: []string{"lower:x"}}, {Layers: []string{"lowers"}}, {Errors: []string{"ENOSUCH"}}, {Errors: []string{""}}, {Ops: []string{"fdatasync"}}, {Slower: -1}} {
		if f.Validate([]string{"open"}) == nil {
			t.Errorf("%+v was taken", f)
		}
	}
	f := Filter{Layers: []string{"upper", "lower", "lower:12"}, Errors: []string{"enoent", "EIO", "any", "none"}, Ops: []string{"open", "sync"}}
	if err := f.Validate([]string{"open"}); err != nil {
		t.Error(err)
	}
	readlink := Event{Op: "readlink", Path: "/l", To: "/srv/x"}
	f = Filter{Path: "/srv/**"}
	if f.Match(&readlink) {
		t.Error("where a link leads counts for a path")
	}
}

func TestFilter(t *testing.T) {
	e := Event{
		Op: "rename2", Path: "/a", To: "/b/c", Pid: 7, Thread: 8, Command: "mv", Error: "EXDEV", Latency: time.Millisecond,
		Layer: "lower:2", Label: "layer 1 of 2", CopiedUp: false,
	}
	for name, c := range map[string]struct {
		f    Filter
		want bool
	}{
		"all":            {Filter{}, true},
		"operation":      {Filter{Ops: []string{"rename"}}, true},
		"group":          {Filter{Ops: []string{"data", "change"}}, true},
		"another":        {Filter{Ops: []string{"data"}}, false},
		"path":           {Filter{Path: "/a"}, true},
		"new path":       {Filter{Path: "/b/**"}, true},
		"another path":   {Filter{Path: "/c"}, false},
		"process":        {Filter{Pids: []uint32{7}}, true},
		"thread":         {Filter{Pids: []uint32{1, 8}}, true},
		"another one":    {Filter{Pids: []uint32{9}}, false},
		"program":        {Filter{Commands: []string{"mv"}}, true},
		"another prog.":  {Filter{Commands: []string{"cp"}}, false},
		"error":          {Filter{Errors: []string{"exdev"}}, true},
		"any error":      {Filter{Errors: []string{"any"}}, true},
		"no error":       {Filter{Errors: []string{"none"}}, false},
		"slow":           {Filter{Slower: time.Millisecond}, true},
		"slower":         {Filter{Slower: time.Second}, false},
		"lower":          {Filter{Layers: []string{"lower"}}, true},
		"that lower":     {Filter{Layers: []string{"lower:2"}}, true},
		"by its name":    {Filter{Layers: []string{"layer 1 of 2"}}, true},
		"another name":   {Filter{Layers: []string{"layer 2 of 2", "init layer"}}, false},
		"another lower":  {Filter{Layers: []string{"lower:1", "upper"}}, false},
		"copied":         {Filter{CopyUps: true}, false},
		"all conditions": {Filter{Ops: []string{"rename"}, Path: "/a", Pids: []uint32{7}, Errors: []string{"any"}, Slower: 1}, true},
	} {
		if got := c.f.Match(&e); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	link := Event{Op: "symlink", Path: "/l", To: "/etc/passwd"}
	if f := (Filter{Path: "/etc/*"}); f.Match(&link) {
		t.Error("what a link leads to was taken for a path")
	}
	ops := []string{"read"}
	for _, bad := range []Filter{{Ops: []string{"reed"}}, {Layers: []string{"middle"}}, {Slower: -1}, {Path: "a/b"}} {
		if bad.Validate(ops) == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
}

// tree is a Resolver of two objects.
type tree struct{ copied bool }

func (r *tree) Where(node uint64) (string, int) {
	switch {
	case node == 1:
		return "/", 0
	case node == 2 && r.copied:
		return "/dir/file", 0
	case node == 2:
		return "/dir/file", 2
	}
	return "", -1
}

func (r *tree) Child(node uint64, name string) uint64 {
	if node == 1 && name == "file" {
		return 2
	}
	return 0
}

func (r *tree) Lower(node uint64) (bool, int) { return node == 2 && !r.copied, 0 }

// request makes a request of a thread that does not exist.
func request(opcode uint32, node uint64, rest string) []byte {
	b := make([]byte, headerIn, headerIn+len(rest))
	binary.NativeEndian.PutUint32(b[4:], opcode)
	binary.NativeEndian.PutUint64(b[16:], node)
	return append(b, rest...)
}

func TestCall(t *testing.T) {
	var h Hub
	if h.On() {
		t.Error("somebody listens to nothing")
	}
	h.Name([]string{"init layer", "layer 1 of 1"})
	s := h.Listen(Filter{})
	defer s.Close()
	r := new(tree)
	c := h.Begin(fuseop.Unlink, "unlink", request(fuseop.Unlink, 1, "file\x00"), r)
	c.End(make([]byte, headerOut), 0)
	c = h.Begin(fuseop.Setattr, "setattr", request(fuseop.Setattr, 2, "\x01\x00\x00\x00"), r)
	r.copied = true
	c.End(make([]byte, headerOut), 0)
	c = h.Begin(fuseop.Lookup, "lookup", request(fuseop.Lookup, 1, "none\x00"), r)
	c.End(make([]byte, headerOut+8), syscall.ENOENT)
	for i, want := range []Event{
		{Op: "unlink", Path: "/file", Node: 2, Layer: "lower:2", Label: "layer 1 of 1"},
		{Op: "setattr", Path: "/dir/file", Node: 2, Layer: "lower:2", Label: "layer 1 of 1", CopiedUp: true, Detail: "mode=0000"},
		{Op: "lookup", Path: "/none", Node: 1, Error: "ENOENT"},
	} {
		got := <-s.Events()
		if got.Time.IsZero() || got.Latency <= 0 {
			t.Errorf("event %d without times", i)
		}
		got.Time, got.Latency = time.Time{}, 0
		if got != want {
			t.Errorf("event %d: %+v, want %+v", i, got, want)
		}
	}
	if c := h.Begin(fuseop.Forget, "forget", request(fuseop.Forget, 1, "\x00"), r); c != nil {
		t.Error("FORGET was told of")
	}
}

// TestFull: who does not listen to what he has asked for loses events, and nobody waits.
func TestFull(t *testing.T) {
	var h Hub
	s, other := h.Listen(Filter{}), h.Listen(Filter{Ops: []string{"link"}})
	const more = 10
	for range buffer + more {
		h.Begin(fuseop.Getattr, "getattr", request(fuseop.Getattr, 1, ""), new(tree)).End(nil, 0)
	}
	if n := s.Dropped(); n != more {
		t.Errorf("%d dropped, want %d", n, more)
	}
	if n := other.Dropped() + uint64(len(other.Events())); n != 0 {
		t.Errorf("%d events that nobody wanted", n)
	}
	s.Close()
	other.Close()
	if h.On() {
		t.Error("nobody listens")
	}
}

func TestContainerOf(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	for cgroup, want := range map[string]string{
		"0::/system.slice/docker-" + id + ".scope\n":                id,
		"0::/user.slice/libpod-" + id + ".scope/container\n":        id,
		"12:pids:/docker/" + id + "\n11:memory:/\n0::/\n":           id,
		"0::/kubepods.slice/pod1/cri-containerd-" + id + ".scope\n": id,
		"0::/user.slice/user-0.slice/session-1.scope\n":             "",
		"0::/" + strings.Repeat("g", 64) + "\n":                     "",
		"":                                                          "",
		"garbage":                                                   "",
		"0::/plyfs/" + id + "/init\n0::/other/" + strings.Repeat("f", 64) + "": id,
	} {
		if got := containerOf([]byte(cgroup)); got != want {
			t.Errorf("%q: %q", cgroup, got)
		}
	}
}

// FuzzCall: whatever a request says, nothing panics.
func FuzzCall(f *testing.F) {
	for op := range uint32(64) {
		f.Add(op, []byte("name\x00other\x00"), []byte{1, 2, 3})
	}
	f.Add(uint32(fuseop.Rename2), make([]byte, 16), []byte(nil))
	f.Fuzz(func(t *testing.T, op uint32, rest, reply []byte) {
		var h Hub
		s := h.Listen(Filter{})
		defer s.Close()
		in := request(op, 1, string(rest))
		if c := h.Begin(op, "x", in, new(tree)); c != nil {
			c.End(reply, 0)
			if len(s.Events()) != 1 {
				t.Error("no event")
			}
		}
		h.Begin(op, "x", in[:min(len(rest), headerIn)], new(tree))
	})
}

// TestPeople: a thread that executes another program is called as that one at once.
func TestPeople(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	self := uint32(unix.Gettid())
	was := commandOf(self)
	defer func() { _ = os.WriteFile("/proc/thread-self/comm", []byte(was), 0o600) }()
	var p people
	now := time.Now()
	for _, name := range []string{"first", "second", "a b\\\nc", "\xff"} {
		if err := os.WriteFile("/proc/thread-self/comm", []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		who := p.of(self, now)
		if who.command != name || who.pid != uint32(os.Getpid()) {
			t.Errorf("%q is told of as %q, process %d", name, who.command, who.pid)
		}
	}
	if who := p.of(0, now); who != (person{}) {
		t.Errorf("nobody is %+v", who)
	}
}
