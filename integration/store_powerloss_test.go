package integration

import (
	"context"
	"errors"
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

// storeStory is what happens to a store before the power fails.
var storeStory = [][]string{
	{"load", "-i", "base.tar"},
	{"load", "-i", "single.tar"},
	{"tag", "base:1", "alias:1"},
	{"create", "base:1", "box"},
	{"commit", "box", "mine:1"},
	{"rmi", "alias:1"},
	{"load", "-i", "new.tar"},
	{"load", "-i", "again.tar"},
	{"gc"},
	{"store", "copy"},
	{"rm", "box"},
	{"rmi", "mine:1", "new:1"},
	{"store", "compact"},
	{"import", "flat.tar", "flat:1"},
	{"prune", "--all"},
	{"load", "-i", "base.tar"},
}

// TestStorePowerLoss cuts the power of a disk on which commands change a store. What a
// command has done before it ended is there afterwards, whole; of the one that was at work
// all or nothing. Commands whose syncs do nothing must be caught.
func TestStorePowerLoss(t *testing.T) {
	harness.NeedRoot(t)
	if err := crash.Available(fastDir(t)); err != nil {
		harness.Skip(t, "needs loop devices: %v", err)
	}
	for _, r := range []struct {
		name string
		fs   crash.FileSystem
		cuts int
		lies bool
	}{
		{"ext4", crash.Ext4, 40, false},
		{"xfs", crash.XFS, 12, false},
		{"without syncs", crash.Ext4, 60, true},
	} {
		t.Run(r.name, func(t *testing.T) {
			if miss := r.fs.Missing(); miss != "" {
				harness.Skip(t, "needs %s", miss)
			}
			dir := fastTempDir(t)
			files := filepath.Join(dir, "files")
			disk := filepath.Join(dir, "disk")
			must(t, errors.Join(os.Mkdir(files, 0o700), os.Mkdir(disk, 0o700)))
			newFaultStore(t, files)
			seed := uint64(*flagSeed)
			if seed == 0 {
				seed = uint64(time.Now().UnixNano())
			}
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 0))
			d, err := crash.NewDisk(disk, r.fs)
			must(t, err)
			states, err := tellStory(t, d, files, r.lies)
			if err != nil {
				t.Fatal(errors.Join(err, d.Abort()))
			}
			rec, err := d.Close()
			must(t, err)
			t.Logf("recorded %s", rec.Log)
			n := r.cuts
			if *flagCuts > 0 {
				n = *flagCuts
			}
			wrong := 0
			for _, c := range rec.Log.Cuts(rng, rec.Log.Find("done -1"), n) {
				bad := powerless(t, rec, c, files, states)
				for _, b := range bad {
					if !r.lies {
						t.Errorf("%s: %s", c, b)
					}
				}
				if wrong += min(len(bad), 1); r.lies && wrong > 2 {
					break
				}
			}
			if r.lies && wrong == 0 {
				t.Errorf("%d losses of power, no sync did anything, and nothing was noticed", n)
			}
		})
	}
}

// onDisk is the store on a disk; archives are elsewhere.
func onDisk(t testing.TB, root, files string) *faultStore {
	t.Helper()
	bin, err := harness.Binary()
	must(t, err)
	return &faultStore{&store{t: t, bin: bin, root: filepath.Join(root, "root")}, files}
}

// tellStory executes the story and returns what the state was before, and after each step.
func tellStory(t *testing.T, d *crash.Disk, files string, lies bool) (states [][]string, err error) {
	s := onDisk(t, d.Root(), files)
	if _, err := s.try("images"); err != nil { // makes it
		return nil, err
	}
	states = [][]string{nil}
	if err := d.Mark("done -1"); err != nil {
		return nil, err
	}
	for i, args := range storeStory {
		if err := d.Mark(fmt.Sprintf("begun %d", i)); err != nil {
			return nil, err
		}
		decide := func(c crash.Call) crash.Fate {
			if lies && strings.Contains(c.Name, "sync") {
				return crash.Lies
			}
			return crash.Passes
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		cmd := s.cmd(args...)
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		err := crash.Calls(ctx, cmd, d.Root(), decide)
		cancel()
		if err != nil {
			return nil, fmt.Errorf("%q: %w: %s", args, err, &out)
		}
		if err := d.Mark(fmt.Sprintf("done %d", i)); err != nil {
			return nil, err
		}
		now, err := s.state()
		if err != nil {
			return nil, err
		}
		states = append(states, now)
	}
	return states, nil
}

// powerless says what is wrong with what a loss of power leaves.
func powerless(t *testing.T, rec *crash.Recording, c crash.Cut, files string, states [][]string) (bad []string) {
	t.Helper()
	done, begun := 0, 0
	for i := range storeStory {
		if at := rec.Log.Find(fmt.Sprintf("done %d", i)); at < c.At {
			done = i + 1
		}
		if at := rec.Log.Find(fmt.Sprintf("begun %d", i)); at < c.At {
			begun = i + 1
		}
	}
	path, err := rec.Build(c)
	must(t, err)
	err = rec.Attach(path, func(root string) error {
		s := onDisk(t, root, files)
		tell := func(format string, a ...any) {
			what := "after everything"
			if begun > 0 {
				what = fmt.Sprintf("%q, done %v", storeStory[begun-1], done == begun)
			}
			bad = append(bad, fmt.Sprintf(what+": "+format, a...))
		}
		open, err := s.findings()
		if err != nil {
			tell("%v", err)
			return nil
		}
		for _, o := range open {
			// The disk is another device: indexes know it.
			if !transient.MatchString(o) && !strings.HasPrefix(o, "K23 ") && !strings.HasPrefix(o, "K24 ") {
				tell("check: %s", o)
			}
		}
		now, err := s.state()
		if err != nil {
			tell("%v", err)
			return nil
		}
		if d := between(states[done], states[begun], now); len(d) > 0 {
			tell("%q, there is %q", d, now)
		}
		if open, err := s.findings("--repair"); err != nil || len(open) > 0 {
			tell("after a repair: %q %v", open, err)
		}
		again, err := s.state()
		if err != nil || !slices.Equal(now, again) {
			tell("the repair changes %q to %q: %v", now, again, err)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("%s: %v", c, err)
	}
	return bad
}
