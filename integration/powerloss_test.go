package integration

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/crash"
	"github.com/plyfs/plyfs/integration/harness"
)

var flagCuts = flag.Int("powerloss.cuts", 0, "losses of power in each run of TestPowerLoss; 0: a few")

// init, not TestMain, since these processes need nothing of what the tests set
// up.
func init() {
	for env, run := range map[string]func(string) error{crash.RecorderEnv: crash.RunRecorder, crash.LameEnv: crash.RunLame} {
		arg := os.Getenv(env)
		if arg == "" {
			continue
		}
		if err := run(arg); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// notByKernel names stories in which kernel overlayfs breaks a promise on ext4:
// fdatasync(2) of a file that has just been copied up makes its data durable, but
// not the rename that gave the copy its name.
var notByKernel = []string{"datasync"}

// TestPowerLoss lets a workload run on a union whose upper lies on a recorded
// disk, cuts the power at many moments, and expects on what is left: every
// copy-up complete, what was synced there, everything else old or new. Kernel
// overlayfs goes through the same, which shows that the test asks for no more
// than can be had; a volatile mount, which promises nothing, must be caught.
func TestPowerLoss(t *testing.T) {
	needOracle(t)
	if err := crash.Available(fastDir(t)); err != nil {
		harness.Skip(t, "needs loop devices: %v", err)
	}
	all := []string{"index=on", "redirect_dir=on", "metacopy=on"}
	runs := []struct {
		name  string
		fs    crash.FileSystem
		by    harness.Mounter
		opts  []string
		extra []string
		cuts  int
		loses bool
		// without leaves stories out, by the beginning of their names.
		without []string
	}{
		{name: "plyfs", fs: crash.Ext4, by: subject(t), opts: all, cuts: 30},
		{name: "plain", fs: crash.Ext4, by: subject(t), opts: all[:2], cuts: 20},
		{name: "kernel", fs: crash.Ext4, by: harness.Kernel{}, opts: all, cuts: 12, without: notByKernel},
		{name: "volatile", fs: crash.Ext4, by: subject(t), opts: all, extra: []string{"volatile"}, cuts: 40, loses: true},
		{name: "xfs", fs: crash.XFS, by: subject(t), opts: all, cuts: 12},
	}
	for _, r := range runs {
		t.Run(r.name, func(t *testing.T) {
			if miss := r.fs.Missing(); miss != "" {
				harness.Skip(t, "needs %s", miss)
			}
			if r.loses {
				mustFail(t, func() (*plug, *crash.Recording) {
					p := newPlug(t, r.fs, r.by, r.without)
					p.stack.Options, p.stack.Extra, p.noSync = r.opts, r.extra, true
					rec := p.record(t)
					p.stack.Extra = nil
					return p, rec
				}, r.cuts)
				return
			}
			p := newPlug(t, r.fs, r.by, r.without)
			p.stack.Options, p.stack.Extra = r.opts, r.extra
			rec := p.record(t)
			n := r.cuts
			if *flagCuts > 0 {
				n = *flagCuts
			}
			p.stack.Extra = nil
			for i, c := range rec.Log.Cuts(p.rng, rec.Log.Find(crash.Started), n) {
				for _, b := range p.cut(t, rec, c, i) {
					t.Errorf("%s: %s", c, b)
				}
			}
		})
	}
}

// mustFail expects that losses of power on a disk that was not synced are
// noticed in both forms: data that nobody wrote, and data that was promised and
// is not there. What can be lost depends on what the system happens to have
// written by itself, so there are several recordings.
func mustFail(t *testing.T, record func() (*plug, *crash.Recording), cuts int) {
	t.Helper()
	const recordings = 5
	wrong, lost := "", ""
	for range recordings {
		p, rec := record()
		for i, c := range rec.Log.Cuts(p.rng, rec.Log.Find(crash.Started), cuts) {
			for _, b := range p.cut(t, rec, c, i) {
				switch {
				case strings.Contains(b, crash.Never):
					wrong = fmt.Sprintf("%s: %s", c, b)
				case strings.Contains(b, crash.Lost):
					lost = fmt.Sprintf("%s: %s", c, b)
				}
			}
			if wrong != "" && lost != "" {
				t.Logf("noticed %s\nand %s", wrong, lost)
				return
			}
		}
	}
	t.Errorf("%d losses of power on mounts that sync nothing; noticed wrong data %q, lost data %q", recordings*cuts, wrong, lost)
}

// plug is a union on a disk whose power can fail.
type plug struct {
	dir     string
	fs      crash.FileSystem
	by      harness.Mounter
	stack   harness.Stack // upper and work are added when there is a disk
	target  string
	stories []*crash.Story
	rng     *rand.Rand
	noSync  bool // the mount syncs nothing
}

func newPlug(t *testing.T, fs crash.FileSystem, by harness.Mounter, without []string) *plug {
	t.Helper()
	dir := fastTempDir(t)
	p := &plug{dir: dir, fs: fs, by: by, target: filepath.Join(dir, "merged")}
	seed := *flagSeed
	if seed == 0 {
		seed = time.Now().UnixNano()
	}
	t.Logf("seed %d", seed)
	p.rng = rand.New(rand.NewPCG(uint64(seed), 0))
	lower, scratch := filepath.Join(dir, "lower"), filepath.Join(dir, "scratch")
	for _, d := range []string{lower, scratch, p.target, p.disk()} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p.stack.Lowers = []string{lower}
	for i := range 2 {
		p.stories = append(p.stories, crash.Stories(i)...)
	}
	p.stories = slices.DeleteFunc(p.stories, func(s *crash.Story) bool { return startsWithAny(s.Name, without) })
	for _, s := range p.stories {
		if err := s.Prepare(lower, scratch); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func (p *plug) disk() string { return filepath.Join(p.dir, "disk") }

// mount mounts the union with its upper on the file system in root.
func (p *plug) mount(by harness.Mounter, root string) (harness.Mount, error) {
	s := p.stack
	s.Upper, s.Work = filepath.Join(root, "upper"), filepath.Join(root, "work")
	return by.Mount(s, p.target)
}

// mountLimit is how long a union may be used in one go before it is taken for
// hanging and aborted.
const mountLimit = 60 * time.Second

// within calls fn and aborts the mount if that takes too long.
func within(m harness.Mount, fn func() error) error {
	said := make(chan string, 1)
	timer := time.AfterFunc(mountLimit, func() { said <- m.Abort() })
	err := fn()
	if !timer.Stop() {
		return errors.Join(err, fmt.Errorf("hangs for %s; the server says: %s", mountLimit, <-said))
	}
	return errors.Join(err, m.Unmount())
}

// record runs the workload on a fresh disk.
func (p *plug) record(t *testing.T) *crash.Recording {
	t.Helper()
	d, err := crash.NewDisk(p.disk(), p.fs)
	if err != nil {
		t.Fatal(err)
	}
	err = p.runOn(d)
	if err != nil {
		t.Fatal(errors.Join(err, d.Abort()))
	}
	rec, err := d.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("recorded %s", rec.Log)
	return rec
}

func (p *plug) runOn(d *crash.Disk) error {
	for _, dir := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(d.Root(), dir), 0o755); err != nil {
			return err
		}
	}
	m, err := p.mount(p.by, d.Root())
	if err != nil {
		return err
	}
	stop, stopped := make(chan struct{}), make(chan error, 1)
	rng := rand.New(rand.NewPCG(p.rng.Uint64(), 0))
	go func() { stopped <- crash.Neighbour(filepath.Join(d.Root(), "neighbour"), !p.noSync, rng, stop) }()
	return within(m, func() error {
		err := crash.Run(p.target, p.stories, 1+p.rng.IntN(3), p.rng, d.Mark)
		close(stop)
		return errors.Join(err, <-stopped)
	})
}

// cut mounts what a loss of power leaves, with plyfs and then with the kernel,
// or the other way round, and returns what is wrong.
func (p *plug) cut(t *testing.T, rec *crash.Recording, c crash.Cut, i int) (bad []string) {
	t.Helper()
	path, err := rec.Build(c)
	if err != nil {
		t.Fatal(err)
	}
	order := []harness.Mounter{subject(t), harness.Kernel{}}
	if i%2 == 1 {
		slices.Reverse(order)
	}
	err = rec.Attach(path, func(root string) error {
		for _, d := range []string{"upper", "work"} {
			// Made, and forgotten, before the first promise.
			if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
				return err
			}
		}
		// A volatile mount that has left its mark is not mounted again.
		if err := os.RemoveAll(filepath.Join(root, "work", "work", "incompat")); err != nil {
			return err
		}
		for _, by := range order {
			m, err := p.mount(by, root)
			if err != nil {
				bad = append(bad, fmt.Sprintf("mount by %s: %v", by.Name(), err))
				continue
			}
			err = within(m, func() error {
				for _, b := range crash.Verdict(rec.Log, c, p.stories, p.target) {
					bad = append(bad, "seen by "+by.Name()+": "+b)
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatalf("%s: %v", c, err)
	}
	return bad
}
