package integration

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plyfs/plyfs/cow/fault"
	"github.com/plyfs/plyfs/integration/crash"
	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

var flagEveryArrival = flag.Bool("crash.all", false, "kill the server at every arrival at a fault point")

// crashFiles is how many lower files there are; each worker owns a part.
const (
	crashFiles   = 40
	crashWorkers = 4
	crashRounds  = 5
)

// TestKillServer kills the mount server with SIGKILL at random moments while
// several processes write, mounts the upper again, and expects everything that
// was acknowledged and nothing that is half made, from plyfs and from the
// kernel.
func TestKillServer(t *testing.T) {
	needOracle(t)
	dir := t.TempDir()
	stack := harness.Stack{Lowers: []string{filepath.Join(dir, "lower")}, Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work")}
	target := filepath.Join(dir, "merged")
	for _, d := range append(stack.Lowers, stack.Upper, stack.Work, target) {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var lower oracle.Layer
	lower.Entries = append(lower.Entries, oracle.Entry{Path: "low", Kind: oracle.Dir})
	state := make([]*crashState, crashWorkers)
	for w := range state {
		state[w] = &crashState{content: make(map[string]string)}
	}
	for i := range crashFiles {
		p := fmt.Sprintf("low/%02d", i)
		lower.Entries = append(lower.Entries, oracle.Entry{Path: oracle.Name(p), Kind: oracle.File, Size: 300000, Seed: int64(i)})
		state[i%crashWorkers].content[p] = string(oracle.Pattern(int64(i), 300000))
	}
	if err := lower.Build(stack.Lowers[0]); err != nil {
		t.Fatal(err)
	}
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(uint64(seed), 0))
	sub := subject(t)
	for round := range crashRounds {
		m, err := sub.Mount(stack, target)
		if err != nil {
			t.Fatal(err)
		}
		crashRound(t, m, state, rng, round)
		for _, by := range []harness.Mounter{sub, harness.Kernel{}} {
			m, err := by.Mount(stack, target)
			if err != nil {
				t.Fatalf("round %d: mount again by %s: %v", round, by.Name(), err)
			}
			crashCheck(t, m, by.Name(), state)
			if err := m.Unmount(); err != nil {
				t.Error(err)
			}
		}
		workSwept(t, stack.Work)
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
		for _, s := range state {
			s.settle()
		}
	}
}

// crashState is what one worker knows about its files.
type crashState struct {
	content map[string]string   // acknowledged
	maybe   map[string][]string // what an operation that was cut off may have left; absent is "-"
	next    int
	actual  map[string]string // found by the check
}

func (s *crashState) settle() {
	for p, c := range s.actual {
		if c == absent {
			delete(s.content, p)
		} else {
			s.content[p] = c
		}
	}
	s.maybe, s.actual = nil, nil
}

const absent = "\x00absent"

// crashRound lets workers write until the server dies.
func crashRound(t *testing.T, m harness.Mount, state []*crashState, rng *rand.Rand, round int) {
	t.Helper()
	var wg sync.WaitGroup
	var clients []*oracle.Client
	acks := make(chan struct{}, 1<<16) // one for each operation that was answered
	for w, s := range state {
		c, err := oracle.StartAgent(m.Target(), 1, 30*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
		wr := rand.New(rand.NewPCG(rng.Uint64(), uint64(w)))
		wg.Go(func() { s.work(c, wr, w, round, acks) })
	}
	for range 10 + rng.IntN(400) {
		<-acks
	}
	if err := m.Kill(); err != nil {
		t.Error(err)
	}
	wg.Wait()
	for _, c := range clients {
		c.Kill()
	}
}

// work changes files until an operation fails.
func (s *crashState) work(c *oracle.Client, r *rand.Rand, w, round int, acks chan<- struct{}) {
	// An end for any other reason must not leave the other side waiting.
	defer func() {
		for range 500 {
			select {
			case acks <- struct{}{}:
			default:
			}
		}
	}()
	var mine []string
	for p := range s.content {
		mine = append(mine, p)
	}
	// step executes one operation; what it makes of the files is taken for
	// true when it is acknowledged, and for possible when not.
	step := func(op oracle.Op, after map[string]string, between ...string) bool {
		res, err := c.Do(op)
		if err == nil && res.Err == "" {
			acks <- struct{}{}
			for p, text := range after {
				if text == absent {
					delete(s.content, p)
				} else {
					s.content[p] = text
				}
			}
			return true
		}
		s.maybe = make(map[string][]string)
		for p, text := range after {
			old, ok := s.content[p]
			if !ok {
				old = absent
			}
			s.maybe[p] = append([]string{old, text}, between...)
		}
		return false
	}
	for {
		switch r.IntN(4) {
		case 0: // a new file, synced
			p := fmt.Sprintf("new-%d-%d-%d", w, round, s.next)
			s.next++
			text := string(oracle.Pattern(int64(s.next), 5000))
			ok := step(oracle.Op{Op: "put", Path: oracle.Name(p), Len: 5000, Seed: int64(s.next)}, map[string]string{p: text}, "") &&
				step(oracle.Op{Op: "open", FD: 0, Path: oracle.Name(p), Flags: "RDWR"}, nil) &&
				step(oracle.Op{Op: "fsync", FD: 0}, nil)
			if !ok {
				return
			}
			mine = append(mine, p)
		case 1: // write into a lower file: copy-up
			p := mine[r.IntN(len(mine))]
			old, there := s.content[p]
			if !there || len(old) < 100 {
				continue
			}
			mark := fmt.Sprintf("<%d>", s.next)
			s.next++
			text := old[:50] + mark + old[50+len(mark):]
			ok := step(oracle.Op{Op: "open", FD: 1, Path: oracle.Name(p), Flags: "RDWR"}, nil) &&
				step(oracle.Op{Op: "pwrite", FD: 1, Off: 50, Text: mark}, map[string]string{p: text})
			if !ok {
				return
			}
		case 2: // rename, which copies up and leaves a whiteout
			p := mine[r.IntN(len(mine))]
			text, there := s.content[p]
			if !there {
				continue
			}
			to := fmt.Sprintf("moved-%d-%d-%d", w, round, s.next)
			s.next++
			if !step(oracle.Op{Op: "rename", Path: oracle.Name(p), To: oracle.Name(to)}, map[string]string{p: absent, to: text}) {
				return
			}
			mine = append(mine, to)
		case 3: // attributes: copy-up without change; sometimes unlink
			p := mine[r.IntN(len(mine))]
			if _, there := s.content[p]; !there {
				continue
			}
			op, after := oracle.Op{Op: "chmod", Path: oracle.Name(p), Mode: 0o600}, map[string]string(nil)
			if r.IntN(6) == 0 {
				op, after = oracle.Op{Op: "unlink", Path: oracle.Name(p)}, map[string]string{p: absent}
			}
			if !step(op, after) {
				return
			}
		}
	}
}

// crashCheck reads every file through a mount.
func crashCheck(t *testing.T, m harness.Mount, by string, state []*crashState) {
	t.Helper()
	for w, s := range state {
		found := make(map[string]string)
		for p, want := range s.content {
			found[p] = s.check(t, m, by, w, p, want)
		}
		for p := range s.maybe {
			if _, done := found[p]; !done {
				found[p] = s.check(t, m, by, w, p, absent)
			}
		}
		for p, c := range s.actual {
			if found[p] != c {
				t.Errorf("%s sees another %s than the mount before", by, p)
			}
		}
		s.actual = found
	}
	// The listing of the root has no name that is not known.
	known := map[string]bool{"low": true}
	for _, s := range state {
		for p, c := range s.actual {
			known[p] = c != absent
		}
	}
	ents, err := os.ReadDir(m.Target())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range ents {
		if !known[e.Name()] {
			t.Errorf("%s: unexpected name %s", by, e.Name())
		}
	}
}

func (s *crashState) check(t *testing.T, m harness.Mount, by string, w int, p, want string) string {
	t.Helper()
	got := absent
	b, err := os.ReadFile(filepath.Join(m.Target(), p))
	if err == nil {
		got = string(b)
	}
	if got == want {
		return got
	}
	// A write(2) that was cut off before it was answered may have left any
	// part from its beginning, as it may on every file system.
	beginning := slices.Contains(s.maybe[p], "") && got != absent
	for _, may := range s.maybe[p] {
		if got == may || beginning && may != absent && strings.HasPrefix(may, got) {
			return got
		}
	}
	t.Errorf("%s: worker %d: %s: %d bytes (%v), not what was acknowledged (%d bytes) nor what an operation in flight may leave", by, w, p, len(b), err, len(want))
	return got
}

// workSwept says whether anything is left in a workdir of what was being built.
func workSwept(t *testing.T, work string) {
	t.Helper()
	if err := crash.Swept(work); err != nil {
		t.Error(err)
	}
}

// killCases are the stories that are played with a server that dies, by the
// options of their mounts.
func killCases() map[string][]*crash.Trial {
	full := []string{"index=on", "redirect_dir=on", "metacopy=on"}
	cases := make(map[string][]*crash.Trial)
	add := func(name string, stories []*crash.Story, t crash.Trial) {
		for _, s := range stories {
			c := t
			c.Story = s
			cases[name] = append(cases[name], &c)
		}
	}
	add("data", crash.Stories(0), crash.Trial{Options: full})
	add("names", crash.NameStories(), crash.Trial{Options: full})
	add("plain", crash.Stories(0), crash.Trial{Options: []string{"index=on", "redirect_dir=on"}})
	add("lame", crash.LameStories(), crash.Trial{Options: []string{"index=on", "redirect_dir=on"}, Lame: true})
	add("litter", crash.NameStories()[:1], crash.Trial{Options: full, Litter: true})
	return cases
}

// TestKillServerAtEveryStep kills the mount server between any two changes that
// it makes to the upper for a request, and expects the state before or after the
// request from plyfs and from the kernel, and that work can go on from there.
func TestKillServerAtEveryStep(t *testing.T) {
	k := atEveryStep(t, func(tr *crash.Trial, a crash.Arrival) error {
		by := []harness.Mounter{tr.Subject, harness.Kernel{}}
		switch {
		case tr.Lame:
			by[1] = tr.Subject
		case rand.IntN(2) == 0:
			slices.Reverse(by)
		}
		return tr.Kill(a, by...)
	})
	total := 0
	for _, p := range fault.Points {
		if k.count[p.Name] == 0 && !strings.Contains(flag.Lookup("test.run").Value.String(), "/") {
			t.Errorf("no story reaches the point %s", p.Name)
		}
		total += k.count[p.Name]
	}
	t.Logf("killed %d times at %d points; -crash.all kills at every arrival", total, len(k.count))
}

// TestSurviveAtEveryStep kills the mount server between any two changes that it makes to
// the upper for a request, and expects that the program that plays the story does not
// notice: every operation has happened once.
func TestSurviveAtEveryStep(t *testing.T) {
	atEveryStep(t, func(tr *crash.Trial, a crash.Arrival) error {
		switch {
		case a.Point == "work.swept" || a.Point == "close.synced":
			return nil // before or after all requests
		case tr.Lame:
			return tr.Survive(a, tr.Subject)
		}
		return tr.Survive(a, harness.Kernel{})
	})
}

// atEveryStep plays the stories and calls kill for the arrivals at fault points.
func atEveryStep(t *testing.T, kill func(*crash.Trial, crash.Arrival) error) *kills {
	needOracle(t)
	sub, ok := subject(t).(harness.FUSE)
	if !ok || sub.Name() != "plyfs" {
		harness.Skip(t, "needs the fault points of plyfs")
	}
	fastDir(t) // made here, not by several stories at once
	k := &kills{count: make(map[string]int)}
	t.Run("stories", func(t *testing.T) {
		for name, trials := range killCases() {
			for _, tr := range trials {
				t.Run(name+"/"+tr.Story.Name, func(t *testing.T) {
					t.Parallel()
					tr.Subject, tr.Dir = sub, fastTempDir(t)
					arrivals, err := tr.Trace()
					if err != nil {
						t.Fatal(err)
					}
					for _, a := range k.choose(arrivals) {
						if err := kill(tr, a); err != nil {
							t.Error(err)
						}
					}
				})
			}
		}
	})
	return k
}

func startsWithAny(s string, prefixes []string) bool {
	return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(s, p) })
}

// kills counts what the stories have been killed at.
type kills struct {
	mu    sync.Mutex
	count map[string]int // by point; guarded by mu
}

// choose takes some of a story's arrivals: those at points that no other story
// had many of, and a few more.
func (k *kills) choose(arrivals []crash.Arrival) []crash.Arrival {
	k.mu.Lock()
	defer k.mu.Unlock()
	var some []crash.Arrival
	for _, a := range arrivals {
		if *flagEveryArrival || k.count[a.Point] < 8 || rand.IntN(8) == 0 {
			k.count[a.Point]++
			some = append(some, a)
		}
	}
	return some
}

// fastTempDir is a directory of the test in fastDir, removed if the test passes.
func fastTempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(fastDir(t), "crash-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if len(harness.MountsBelow(dir)) == 0 {
			_ = os.RemoveAll(dir) // what is left is reported and removed at the end
		}
	})
	return dir
}
