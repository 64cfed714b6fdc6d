package integration

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fault"
	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// killServers kills the servers of a mount at random moments until stop, and says how
// many.
func killServers(holder int, stop <-chan struct{}) (kills int) {
	for i := 0; ; i++ {
		pause := time.Duration(5+rand.IntN(100)) * time.Millisecond
		if i%6 == 5 {
			pause = 1200 * time.Millisecond // who dies at once too often is not started again
		}
		select {
		case <-stop:
			return kills
		case <-time.After(pause):
		}
		if harness.KillServer(holder) {
			kills++
		}
	}
}

func survive(t *testing.T, target string, holder int, d time.Duration) {
	t.Helper()
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	stop, stopKills := make(chan struct{}), make(chan struct{})
	killed := make(chan int)
	go func() { killed <- killServers(holder, stopKills) }()
	var wg sync.WaitGroup
	for name, work := range survivors {
		wg.Go(func() {
			ops, err := work(filepath.Join(target, name), rand.New(rand.NewPCG(uint64(seed), uint64(len(name)))), stop)
			if err != nil {
				t.Errorf("%s, after %d operations: %v", name, ops, err)
			} else if ops == 0 {
				t.Errorf("%s: not one operation", name)
			}
			t.Logf("%s: %d operations", name, ops)
		})
	}
	time.AfterFunc(d, func() { close(stop) })
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(d + time.Minute):
		t.Errorf("a program hangs")
	}
	close(stopKills)
	kills := <-killed
	if t.Logf("%d kills", kills); kills < int(d/time.Second) {
		t.Errorf("only %d kills", kills)
	}
}

// surviveFor is how long a test of this kind takes.
func surviveFor(t *testing.T) time.Duration {
	if s := os.Getenv("SOAK_DURATION"); s != "" {
		d, err := time.ParseDuration(s)
		must(t, err)
		return d
	}
	return 8 * time.Second
}

// TestContainerSurvives: nothing that works in a container notices that servers of its
// mount are killed.
func TestContainerSurvives(t *testing.T) {
	m := newImageMount(t, oracle.Recipe{Lowers: []oracle.Layer{workshop()}})
	holder, _ := m.pids()
	survive(t, m.target, holder, surviveFor(t))
	if h, _ := m.pids(); h != holder {
		t.Errorf("holder %d, before %d", h, holder)
	}
	if os.Geteuid() != 0 { // whoever looks at everything changes its root
		return
	}
	before := snapshotOf(t, m.target)
	m.s.run("umount", m.target)
	m.s.run("mount", strings.Fields(m.s.run("ps", "-q"))[0], m.target)
	if after := snapshotOf(t, m.target); before.Out != after.Out {
		t.Errorf("the tree is another one after a remount: %s", cmp.Diff(before.Out, after.Out))
	}
}

// TestPlainDirectoriesSurvive: so it is with a mount that no store knows, under each way in
// which data reaches programs.
func TestPlainDirectoriesSurvive(t *testing.T) {
	needOracle(t)
	for _, policy := range []string{"", "io=cache", "io=noopen"} {
		t.Run(policy, func(t *testing.T) {
			dir := t.TempDir()
			stack := harness.Stack{Lowers: []string{filepath.Join(dir, "lower")}, Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work")}
			target := filepath.Join(dir, "merged")
			for _, d := range append(stack.Lowers, stack.Upper, stack.Work, target) {
				must(t, os.Mkdir(d, 0o755))
			}
			must(t, workshop().Build(stack.Lowers[0]))
			m, err := policySubject(t, policy).Mount(stack, target)
			must(t, err)
			survive(t, target, m.Pid(), surviveFor(t)/2)
			must(t, m.Unmount())
			workSwept(t, stack.Work)
		})
	}
}

// TestRemovedDirectoriesSurvive: a directory that is removed while somebody is in it is the same
// one afterwards, wherever it came from.
func TestRemovedDirectoriesSurvive(t *testing.T) {
	needOracle(t)
	dir := t.TempDir()
	stack := harness.Stack{Lowers: []string{filepath.Join(dir, "lower")}, Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work")}
	target := filepath.Join(dir, "merged")
	for _, d := range append(stack.Lowers, stack.Upper, stack.Work, target) {
		must(t, os.Mkdir(d, 0o755))
	}
	for _, d := range []string{"low", "changed", "filled"} {
		must(t, os.Mkdir(filepath.Join(stack.Lowers[0], d), 0o751))
	}
	must(t, os.WriteFile(filepath.Join(stack.Lowers[0], "filled", "x"), nil, 0o600))
	m, err := subject(t).Mount(stack, target)
	must(t, err)
	defer func() { must(t, m.Unmount()) }()
	must(t, os.Mkdir(filepath.Join(target, "new"), 0o751))
	must(t, os.Chown(filepath.Join(target, "changed"), 5, 6))
	must(t, os.Remove(filepath.Join(target, "filled", "x")))
	var open []*os.File
	var before []unix.Stat_t
	for _, d := range []string{"low", "changed", "filled", "new"} {
		f, err := os.Open(filepath.Join(target, d))
		must(t, err)
		defer f.Close()
		must(t, os.Remove(f.Name()))
		var st unix.Stat_t
		must(t, unix.Fstat(int(f.Fd()), &st))
		open, before = append(open, f), append(before, st)
	}
	harness.KillServer(m.Pid())
	for i, f := range open {
		must(t, unix.Fchmod(int(f.Fd()), 0o711))
		var st unix.Stat_t
		must(t, unix.Fstat(int(f.Fd()), &st))
		was := before[i]
		if strings.HasSuffix(f.Name(), "filled") {
			was.Mtim = st.Mtim // its whiteouts go after it
		}
		if st.Ino != was.Ino || st.Uid != was.Uid || st.Gid != was.Gid || st.Mtim != was.Mtim || st.Nlink != 0 || st.Mode != unix.S_IFDIR|0o711 {
			t.Errorf("%s: %+v, before %+v", f.Name(), st, was)
		}
		if err := unix.Mkdirat(int(f.Fd()), "x", 0o700); !errors.Is(err, unix.ENOENT) {
			t.Errorf("a new name in it: %v", err)
		}
	}
}

// TestRequestRefused: a request that ends two servers by an error of theirs is answered with
// EIO. Those that were under way with it are not, and nothing else is in the way.
func TestRequestRefused(t *testing.T) {
	t.Setenv(fault.Env, "crash:complete.copied")
	m := newImageMount(t, oracle.Recipe{Lowers: []oracle.Layer{workshop()}})
	poisoned := filepath.Join(m.target, "data", "low1")
	must(t, os.Chmod(poisoned, 0o600)) // without its data
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := surviveExclusive(filepath.Join(m.target, "exclusive"), nil, stop)
		done <- err
	}()
	if _, err := os.OpenFile(poisoned, os.O_RDWR, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("the request that ends servers: %v", err)
	}
	close(stop)
	if err := <-done; err != nil {
		t.Errorf("other requests: %v", err)
	}
	if b, err := os.ReadFile(poisoned); err != nil || !bytes.Equal(b, []byte(oracle.Pattern(1, 20000))) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if out := m.s.run("ps"); !strings.Contains(out, "(restarted 2 times) (1 requests refused)") {
		t.Errorf("ps does not tell: %s", out)
	}
	if out := m.s.run("events", "--since", "1h", "--until", "0s", "--filter", "event=refuse"); strings.Count(out, " mount refuse ") != 1 || !strings.Contains(out, "refused=1") {
		t.Errorf("events do not tell: %s", out)
	}
}

// TestLimitsSurvive: the next server keeps to the limits of the first one.
func TestLimitsSurvive(t *testing.T) {
	m := newImageMount(t, oracle.Recipe{Lowers: []oracle.Layer{workshop()}}, "--nofile", "333")
	_, server := m.pids()
	must(t, unix.Kill(server, unix.SIGKILL))
	must(t, os.WriteFile(filepath.Join(m.target, "new"), nil, 0o644)) // waits for it
	_, next := m.pids()
	var got unix.Rlimit
	must(t, unix.Prlimit(next, unix.RLIMIT_NOFILE, nil, &got))
	if next == server || got.Cur != 333 || got.Max != 333 {
		t.Errorf("process %d, before %d: limit %+v", next, server, got)
	}
}

// TestSpareKilled: without its spare a mount goes on, and where the holder is killed as well it
// is served until it is unmounted.
func TestSpareKilled(t *testing.T) {
	m := newImageMount(t, oracle.Recipe{Lowers: []oracle.Layer{workshop()}})
	holder, server := m.pids()
	spare := 0
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	must(t, err)
	for _, p := range processes {
		b, err := os.ReadFile(p)
		pid, perr := strconv.Atoi(filepath.Base(filepath.Dir(p)))
		if err == nil && perr == nil && strings.HasSuffix(string(b), "\x00mount-holder\x00"+m.target+"\x00") && pid != holder {
			spare = pid
		}
	}
	if spare == 0 {
		t.Fatal("there is no spare holder")
	}
	write := func(name string) {
		t.Helper()
		must(t, os.WriteFile(filepath.Join(m.target, name), []byte(name), 0o644))
	}
	must(t, unix.Kill(spare, unix.SIGKILL))
	write("without a spare")
	must(t, unix.Kill(holder, unix.SIGKILL))
	write("without a holder")
	if out := m.s.run("ps"); !strings.Contains(out, "mounted") {
		t.Errorf("ps: %s", out)
	}
	if h, s := m.pids(); h != server || s != server {
		t.Errorf("holder %d, server %d, which was %d", h, s, server)
	}
	m.s.run("umount", m.target)
	m.s.run("mount", strings.Fields(m.s.run("ps", "-q"))[0], m.target)
	for _, name := range []string{"without a spare", "without a holder"} {
		if b, err := os.ReadFile(filepath.Join(m.target, name)); err != nil || string(b) != name {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
}
