package integration

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// agent starts an agent on a mount, which ends with the test.
func agent(t *testing.T, m harness.Mount) *oracle.Client {
	t.Helper()
	c, err := oracle.StartAgent(m.Target(), 1, *flagLimit)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Kill)
	return c
}

// mustDo executes an operation in text form and wants it to work.
func mustDo(t *testing.T, c *oracle.Client, line string) oracle.Result {
	t.Helper()
	r, err := c.Do(op(t, line))
	if err != nil {
		t.Fatal(err)
	}
	if r.Err != "" {
		t.Fatalf("%s: %s", line, r)
	}
	return r
}

// TestCopyUpElsewhere: while a large file is copied up, everything goes on in
// another directory, copy-ups of its files included.
func TestCopyUpElsewhere(t *testing.T) {
	needOracle(t)
	if testing.Short() {
		t.Skip("short run")
	}
	const names = 200
	lower := oracle.Layer{Entries: []oracle.Entry{
		{Path: "a", Kind: oracle.Dir},
		{Path: "a/large", Kind: oracle.File, Size: 256 << 20, Seed: 1},
		{Path: "b", Kind: oracle.Dir},
	}}
	for i := range names {
		lower.Entries = append(lower.Entries, oracle.Entry{Path: oracle.Name(fmt.Sprintf("b/%d", i)), Kind: oracle.File, Text: "lower"})
	}
	stack, target := tempStack(t, filepath.Join(base, "elsewhere"), lower)
	m, err := subject(t).Mount(stack, target)
	if err != nil {
		t.Fatal(err)
	}
	copier, other := agent(t, m), agent(t, m)
	mustDo(t, other, "readdir b")
	var started, done atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		defer done.Store(true)
		started.Store(true)
		if r, err := copier.Do(oracle.Op{Op: "open", Path: "a/large", Flags: "RDWR"}); err != nil || r.Err != "" {
			t.Errorf("copy-up: %v %v", r, err)
		}
	})
	during := 0
	for i := 0; !done.Load(); i++ {
		n := i % names
		for _, line := range []string{
			fmt.Sprintf("chmod b/%d mode=0600", n),
			fmt.Sprintf("put b/new%d text=x", i),
			fmt.Sprintf("rename b/new%d b/%d", i, n),
			fmt.Sprintf("cat b/%d", n),
			fmt.Sprintf("mkdir b/dir%d mode=0755", i),
			fmt.Sprintf("rmdir b/dir%d", i),
			"lstat a/large",
			"readdir a",
			"count b",
		} {
			before := started.Load()
			r, err := other.Do(op(t, line))
			if err != nil {
				t.Fatal(err)
			}
			if r.Err != "" {
				t.Errorf("%s: %s", line, r)
			}
			if before && !done.Load() {
				during++
			}
		}
	}
	wg.Wait()
	t.Logf("%d operations during the copy-up", during)
	if during == 0 {
		t.Error("no operation was completed while the large file was copied up")
	}
	if err := errors.Join(copier.Close(), other.Close(), m.Unmount()); err != nil {
		t.Error(err)
	}
	workSwept(t, stack.Work)
}

// TestChmodDuringCompletion: what is changed about a file while its data follows a
// copy-up without data stays changed.
func TestChmodDuringCompletion(t *testing.T) {
	needOracle(t)
	lower := oracle.Layer{Entries: []oracle.Entry{{Path: "large", Kind: oracle.File, Size: 64 << 20, Seed: 1, Mode: 0o4755}}}
	stack, target := tempStack(t, filepath.Join(base, "completion"), lower)
	stack.Options = []string{"redirect_dir=on", "metacopy=on"}
	m, err := subject(t).Mount(stack, target)
	if err != nil {
		t.Fatal(err)
	}
	writer, other := agent(t, m), agent(t, m)
	mustDo(t, other, "utimens large atime=1000000000.5 mtime=1000000000.5")
	var wg sync.WaitGroup
	wg.Go(func() {
		if r, err := writer.Do(oracle.Op{Op: "open", Path: "large", Flags: "WRONLY"}); err != nil || r.Err != "" {
			t.Errorf("open: %v %v", r, err)
		}
	})
	<-time.After(10 * time.Millisecond) // into the copy, with luck; right in any case
	mustDo(t, other, "chmod large mode=0755")
	mustDo(t, other, "utimens large atime=500000000.5 mtime=500000000.5")
	mustDo(t, other, "setxattr large attr=user.a value=1")
	wg.Wait()
	const want = "file 0755 0:0 nlink=1 size=67108864 mtime=500000000.000000005"
	if got := mustDo(t, other, "lstat large").Out; got != want {
		t.Errorf("%s, not %s", got, want)
	}
	mustDo(t, other, "getxattr large attr=user.a")
	if err := errors.Join(writer.Close(), other.Close(), m.Unmount()); err != nil {
		t.Error(err)
	}
}

// nameOwner is a process of TestManyProcesses, and what it knows of its names.
type nameOwner struct {
	id   int
	have map[string]string // name to content
	next int
}

// step changes one name of the owner.
func (o *nameOwner) step(r *rand.Rand) oracle.Op {
	fresh := func() string {
		o.next++
		return fmt.Sprintf("dir/w%d-new%d", o.id, o.next)
	}
	some := func() string {
		for name := range o.have { // in random order
			return name
		}
		return ""
	}
	name := some()
	switch k := r.IntN(10); {
	case k < 3 || name == "":
		name = fresh()
		o.have[name] = name
		return oracle.Op{Op: "put", Path: oracle.Name(name), Text: name, Flags: "CREAT|EXCL"}
	case k < 6:
		to := fresh()
		if k == 5 {
			to = some()
		}
		if to == name {
			return oracle.Op{Op: "cat", Path: oracle.Name(name)}
		}
		o.have[to] = o.have[name]
		delete(o.have, name)
		return oracle.Op{Op: "rename", Path: oracle.Name(name), To: oracle.Name(to)}
	case k < 8:
		delete(o.have, name)
		return oracle.Op{Op: "unlink", Path: oracle.Name(name)}
	case k < 9:
		return oracle.Op{Op: "chmod", Path: oracle.Name(name), Mode: 0o600}
	}
	return oracle.Op{Op: "count", Path: "dir"}
}

// TestManyProcesses lets processes create, rename, remove and list in one
// directory of some hundred names, each with names of its own. At the end every
// name is there that should be, with its content, and no other; after a remount
// as well, and under the kernel.
func TestManyProcesses(t *testing.T) {
	needOracle(t)
	const processes, names, steps = 12, 40, 150
	lower := oracle.Layer{Entries: []oracle.Entry{{Path: "dir", Kind: oracle.Dir, Mode: 0o777}}}
	owners := make([]*nameOwner, processes)
	for i := range owners {
		owners[i] = &nameOwner{id: i, have: make(map[string]string)}
		for n := range names {
			p := fmt.Sprintf("dir/w%d-low%d", i, n)
			owners[i].have[p] = p
			lower.Entries = append(lower.Entries, oracle.Entry{Path: oracle.Name(p), Kind: oracle.File, Text: p})
		}
	}
	stack, target := tempStack(t, filepath.Join(fastDir(t), "processes"), lower)
	stack.Options = []string{"index=on"}
	m, err := subject(t).Mount(stack, target)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, o := range owners {
		c := agent(t, m)
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(o.id), 1))
			for range steps {
				op := o.step(r)
				res, err := c.Do(op)
				if err != nil {
					t.Errorf("%v\nserver: %s", err, m.Abort())
					return
				}
				var entries, distinct int
				if res.Err != "" {
					t.Errorf("%s: %s", op, res)
				} else if op.Op == "count" {
					if _, err := fmt.Sscanf(res.Out, "%d entries, %d names", &entries, &distinct); err != nil || entries != distinct {
						t.Errorf("%s: %s: a name is listed twice", op, res)
					}
				}
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	want := make(map[string]string)
	for _, o := range owners {
		for name, content := range o.have {
			want[name] = content
		}
	}
	verify := func(by string, m harness.Mount) {
		t.Helper()
		c := agent(t, m)
		if got, want := mustDo(t, c, "count dir").Out, fmt.Sprintf("%d entries, %d names", len(want)+2, len(want)+2); got != want {
			t.Errorf("%s: %s, not %s", by, got, want)
		}
		for name, content := range want {
			if r := mustDo(t, c, "cat "+name); r.Out != fmt.Sprintf("%q", content) {
				t.Errorf("%s: %s contains %s, not %q", by, name, r, content)
			}
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	verify("at the end", m)
	mountAgain(t, m, stack, verify)
}
