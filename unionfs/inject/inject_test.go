package inject

import (
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/plyfs/plyfs/unionfs/trace"
)

var ops = []string{"read", "write", "lookup", "fsync", "rename", "rename2", "release", "create"}

func TestValidate(t *testing.T) {
	for name, r := range map[string]Rule{
		"no operation":    {Errno: "EIO"},
		"no such":         {Ops: []string{"reed"}, Errno: "EIO"},
		"no fault":        {Ops: []string{"read"}},
		"release":         {Ops: []string{"release"}, Errno: "EIO"},
		"no such error":   {Ops: []string{"read"}, Errno: "EWHAT"},
		"ENOSYS":          {Ops: []string{"read"}, Errno: "enosys"},
		"too slow":        {Ops: []string{"read"}, Latency: time.Hour},
		"negative":        {Ops: []string{"read"}, Latency: -1},
		"short names":     {Ops: []string{"lookup"}, Short: 1},
		"short and error": {Ops: []string{"read"}, Short: 1, Errno: "EIO"},
		"probability":     {Ops: []string{"read"}, Errno: "EIO", Prob: 2},
		"too long":        {Ops: []string{"read"}, Errno: "EIO", For: 25 * time.Hour},
		"which of both":   {Ops: []string{"read"}, Errno: "EIO", Nth: 1, From: 2},
		"pattern":         {Ops: []string{"read"}, Errno: "EIO", Path: "a/b"},
	} {
		if r.Validate(ops) == nil {
			t.Errorf("%s was taken: %+v", name, r)
		}
	}
	for _, r := range []Rule{
		{Ops: []string{"read"}, Errno: "eio"}, {Ops: []string{"data"}, Latency: 1}, {Ops: []string{"write"}, Short: 1, Path: "*.x", Prob: 0.5, Nth: 2, For: time.Hour},
	} {
		if err := r.Validate(ops); err != nil {
			t.Errorf("%+v: %v", r, err)
		}
	}
}

// hits says which of n equal requests meet a fault.
func hits(f *Faults, e trace.Event, n int) (which []int) {
	for i := 1; i <= n; i++ {
		if _, hit := f.Decide(&e, true); hit {
			which = append(which, i)
		}
	}
	return which
}

func add(t *testing.T, f *Faults, rules ...Rule) []Rule {
	t.Helper()
	added, err := f.Add(rules)
	if err != nil {
		t.Fatal(err)
	}
	return added
}

func TestDecide(t *testing.T) {
	var f Faults
	if f.On() {
		t.Error("faults without rules")
	}
	write := trace.Event{Op: "write", Path: "/db/log", Pid: 5, Command: "db"}
	add(t, &f, Rule{Ops: []string{"write"}, Errno: "ENOSPC", Nth: 3})
	if got := hits(&f, write, 5); !slices.Equal(got, []int{3}) {
		t.Errorf("the third: %v", got)
	}
	f.Clear(nil)
	add(t, &f, Rule{Ops: []string{"write"}, Errno: "ENOSPC", From: 3})
	if got := hits(&f, write, 5); !slices.Equal(got, []int{3, 4, 5}) {
		t.Errorf("from the third on: %v", got)
	}
	f.Clear(nil)
	add(t, &f, Rule{Ops: []string{"write"}, Errno: "ENOSPC", Nth: 3})
	for _, other := range []trace.Event{{Op: "read", Path: "/db/log"}, {Op: "release", Path: "/db/log"}} {
		if got := hits(&f, other, 5); got != nil {
			t.Errorf("%+v: %v", other, got)
		}
	}
	f.Clear(nil)

	for name, c := range map[string]struct {
		r    Rule
		want bool
	}{
		"path":         {Rule{Path: "/db/**"}, true},
		"another path": {Rule{Path: "/x"}, false},
		"process":      {Rule{Pid: 5}, true},
		"another one":  {Rule{Pid: 6}, false},
		"program":      {Rule{Command: "db"}, true},
		"another":      {Rule{Command: "sh"}, false},
		"all of them":  {Rule{Path: "log", Pid: 5, Command: "db"}, true},
	} {
		c.r.Ops, c.r.Errno = []string{"data"}, "EIO"
		add(t, &f, c.r)
		if got := hits(&f, write, 1) != nil; got != c.want {
			t.Errorf("%s: %v", name, got)
		}
		f.Clear(nil)
	}

	// Several rules come together; the older error counts.
	add(t, &f, Rule{Ops: []string{"write"}, Latency: time.Second}, Rule{Ops: []string{"write"}, Errno: "EIO", Latency: time.Second},
		Rule{Ops: []string{"write"}, Errno: "ENOSPC"}, Rule{Ops: []string{"write"}, Short: 10}, Rule{Ops: []string{"write"}, Short: 5})
	got, hit := f.Decide(&write, true)
	if !hit || got.Errno != syscall.EIO || got.Latency != 2*time.Second || got.Short != 5 {
		t.Errorf("several rules: %+v", got)
	}
	if !f.HasData() || !f.Direct("/x") {
		t.Error("rules about data are not obeyed when a file is opened")
	}
	if got, _ := f.Decide(&write, false); got.Short != 0 || got.Errno == 0 {
		t.Errorf("the page cache would take it for the end of the file: %+v", got)
	}
	f.Clear(nil)
	add(t, &f, Rule{Ops: []string{"fsync"}, Errno: "EIO"})
	if f.HasData() {
		t.Error("fsync is not about data")
	}
	f.Clear(nil)

	add(t, &f, Rule{Ops: []string{"write"}, Errno: "EIO", Prob: 0.5})
	if n := len(hits(&f, write, 1000)); n < 350 || n > 650 {
		t.Errorf("half of 1000: %d", n)
	}
}

func TestRulesEnd(t *testing.T) {
	var f Faults
	short := add(t, &f, Rule{Ops: []string{"write"}, Errno: "EIO", For: 30 * time.Millisecond}, Rule{Ops: []string{"read"}, Errno: "EIO"})
	if until := time.Until(short[1].Expires); until > Default || until < Default-time.Minute {
		t.Errorf("a rule without a time ends in %v", until)
	}
	for deadline := time.Now().Add(10 * time.Second); len(f.List()) == 2; <-time.After(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a rule does not end")
		}
	}
	if got := hits(&f, trace.Event{Op: "write"}, 1); got != nil {
		t.Error("a rule that has ended")
	}
	if gone := f.Clear([]int{short[0].ID, 77}); len(gone) != 0 {
		t.Errorf("cleared what was not there: %+v", gone)
	}
	if gone := f.Clear([]int{short[1].ID}); len(gone) != 1 || f.On() {
		t.Errorf("cleared %+v", gone)
	}
	if _, err := f.Add(make([]Rule, MostRules+1)); err == nil || f.On() {
		t.Error("any number of rules")
	}
	// The last one ends by itself, also if nobody asks.
	add(t, &f, Rule{Ops: []string{"write"}, Errno: "EIO", For: 10 * time.Millisecond})
	for deadline := time.Now().Add(10 * time.Second); f.On(); <-time.After(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the last rule does not end")
		}
	}
}

// TestWait: who waits is let go when the rule is cleared or ends.
func TestWait(t *testing.T) {
	var f Faults
	for name, c := range map[string]struct {
		rules []Rule
		clear bool
	}{
		"cleared":            {[]Rule{{Ops: []string{"lookup"}, Latency: LongestLatency}}, true},
		"several":            {[]Rule{{Ops: []string{"lookup"}, Latency: LongestLatency}, {Ops: []string{"name"}, Latency: LongestLatency}}, true},
		"ended":              {[]Rule{{Ops: []string{"lookup"}, Latency: LongestLatency, For: 20 * time.Millisecond}}, false},
		"over by themselves": {[]Rule{{Ops: []string{"lookup"}, Latency: 20 * time.Millisecond}, {Ops: []string{"lookup"}, Latency: time.Millisecond}}, false},
		"none":               {[]Rule{{Ops: []string{"lookup"}, Errno: "EIO"}}, false},
	} {
		f.Clear(nil)
		add(t, &f, c.rules...)
		fault, hit := f.Decide(&trace.Event{Op: "lookup"}, false)
		if !hit {
			t.Fatal(name)
		}
		if c.clear {
			time.AfterFunc(20*time.Millisecond, func() { f.Clear(nil) })
		}
		done := make(chan struct{})
		go func() { fault.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: it waits", name)
		}
	}
}
