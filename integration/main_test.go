package integration

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/engine"
	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

var (
	flagSeed     = flag.Int64("oracle.seed", 0, "first seed of the random runs; 0: 1, and of the soak one from the clock")
	flagDuration = flag.Duration("oracle.duration", 30*time.Second, "length of the random runs")
	flagReplay   = flag.String("oracle.replay", "", "saved run to execute")
	flagTrace    = flag.Bool("oracle.trace", false, "log every operation with the kernel's result")
	flagLimit    = flag.Duration("oracle.limit", time.Minute, "how long one operation may take")
	flagReduce   = flag.Bool("oracle.reduce", false, "reduce failing runs before they are saved")
)

// base is the directory of this test process; everything lives below it.
var base string

// helpers are what the test binary becomes, each if its variable is set.
var helpers = []struct {
	env string
	run func(value string) error
}{
	{oracle.AgentEnv, oracle.RunAgent},
	{harness.LikeNFSEnv, harness.RunLikeNFS},
	{engine.HostEnv, engine.RunHost},
	{harness.JanitorEnv, func(string) error { return harness.RunJanitor(os.Stdin) }},
}

func TestMain(m *testing.M) {
	for _, h := range helpers {
		value := os.Getenv(h.env)
		if value == "" {
			continue
		}
		if err := h.run(value); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var err error
	if janitor, err = harness.StartJanitor(); err != nil {
		return fail(err)
	}
	base, err = os.MkdirTemp(os.Getenv("PLYFS_TEST_DIR"), "plyfs-test-")
	if err != nil {
		return fail(err)
	}
	if base, err = filepath.Abs(base); err != nil {
		return fail(err)
	}
	if err := errors.Join(janitor.Watch(base), os.Chmod(base, 0o755), os.Setenv("TMPDIR", base)); err != nil {
		return fail(err)
	}
	code := m.Run()
	dirs := []string{base}
	if fastBase != "" {
		dirs = append(dirs, fastBase)
	}
	for _, l := range harness.Leaks(dirs...) {
		fmt.Fprintln(os.Stderr, "integration: left behind:", l)
		code = 1
	}
	harness.RemoveBinary()
	if err := janitor.Close(); err != nil {
		code = fail(err)
	}
	if s := harness.SkipSummary(); s != "" {
		fmt.Println(s)
	}
	return code
}

// janitor removes base and fastBase at the end, whatever the end is.
var janitor *harness.Janitor

// fastBase is a directory in memory, or empty; see fastDir.
var fastBase string

// fastDir returns a directory on tmpfs where there is one, since a copy-up
// syncs, and base otherwise.
func fastDir(t testing.TB) string {
	t.Helper()
	if os.Getenv("PLYFS_TEST_DIR") != "" {
		return base
	}
	if fastBase == "" {
		d, err := os.MkdirTemp("/dev/shm", "plyfs-test-")
		if err != nil {
			return base
		}
		fastBase = d
		if err := errors.Join(janitor.Watch(d), os.Chmod(d, 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	return fastBase
}

// artifacts is where failing runs are kept.
func artifacts() string {
	if d := os.Getenv("PLYFS_ARTIFACTS"); d != "" {
		return d
	}
	return filepath.Join("testdata", "failures")
}

// subject is the mounter under test.
func subject(t testing.TB) harness.Mounter {
	t.Helper()
	name := os.Getenv("PLYFS_SUBJECT")
	if name == "" {
		name = "plyfs"
	}
	m, err := harness.NewMounter(name)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// needOracle skips where kernel overlayfs and FUSE cannot be mounted.
func needOracle(t testing.TB) {
	t.Helper()
	harness.NeedRoot(t)
	harness.NeedFUSE(t)
	harness.NeedKernelOverlay(t)
}

// runTrial runs a trial and fails the test, with a saved run, if the sides
// differ.
func runTrial(t *testing.T, tr *oracle.Trial, name string) {
	t.Helper()
	if tr.Model == nil {
		tr.Model = harness.Kernel{}
	}
	if tr.Subject == nil {
		tr.Subject = subject(t)
	}
	tr.Limit = *flagLimit
	if *flagTrace {
		tr.Trace = func(i int, op oracle.Op, model, _ oracle.Result) { t.Logf("op %d: %s\n\t%s", i, op, model) }
	}
	diffs, err := tr.Run()
	tr.Gen = nil // from here on the list counts
	if len(diffs) == 0 && err == nil {
		return
	}
	if errors.Is(err, harness.ErrNoPlace) {
		harness.Skip(t, "%v", err)
	}
	if *flagReduce {
		kind := oracle.Signature(diffs, err)
		small := oracle.Reduce(*tr, 3*time.Minute, func(c oracle.Trial) bool {
			return oracle.Signature(c.Run()) == kind
		})
		if d, e := small.Run(); len(d) > 0 || e != nil {
			tr, diffs, err = &small, d, e
		}
	}
	for _, d := range diffs {
		t.Error(d)
	}
	if err != nil {
		t.Error(err)
	}
	path, err := tr.Save(artifacts(), name, diffs, err)
	if err != nil {
		t.Error(err)
		return
	}
	if len(tr.Ops) < 30 {
		for i, op := range tr.Ops {
			t.Logf("op %d: %s", i, op)
		}
	}
	t.Logf("saved; again with: go test ./integration -run TestReplay -oracle.replay %s", path)
}
