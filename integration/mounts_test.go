package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/archive"
	"github.com/plyfs/plyfs/integration/harness"
)

// mountField is a store with an image and places to mount it on.
type mountField struct {
	*store
	dir string
}

func newMountField(t *testing.T) *mountField {
	t.Helper()
	harness.NeedFUSE(t)
	f := &mountField{newStore(t), t.TempDir()}
	file := filepath.Join(f.dir, "a.tar")
	must(t, imageOf(t, "app:1", imageRecipe(11)).Write(file, archive.Options{}))
	f.run("load", "-i", file)
	return f
}

// left says what the store and the machine still have of mounts. What has ended a moment
// ago may take another.
func (f *mountField) left() (what []string) {
	var rows []struct{ State, Target string }
	if err := json.Unmarshal([]byte(f.run("ps", "--json")), &rows); err != nil {
		return []string{err.Error()}
	}
	for _, r := range rows {
		if r.State != "created" {
			what = append(what, r.State+" "+r.Target)
		}
	}
	for _, m := range harness.MountsBelow(f.dir) {
		what = append(what, "mounted: "+m)
	}
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return append(what, err.Error())
	}
	for _, p := range processes {
		if b, err := os.ReadFile(p); err == nil && strings.Contains(string(b), "\x00mount-") && strings.Contains(string(b), f.dir) {
			what = append(what, "process: "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	return what
}

func (f *mountField) clean() {
	f.t.Helper()
	var what []string
	waitFor(f.t, "the end of all mounts", func() bool { what = f.left(); return len(what) == 0 })
	f.run("check")
}

// TestManyMounts mounts one image at many places at once, most of them writable.
func TestManyMounts(t *testing.T) {
	f := newMountField(t)
	many := 40
	if os.Getenv("SOAK_DURATION") != "" {
		many = 200
	}
	errs := make(chan error, 2*many)
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8) // of commands at a time
	each := func(do func(i int, dir string) error) {
		for i := range many {
			wg.Go(func() {
				slots <- struct{}{}
				defer func() { <-slots }()
				if err := do(i, filepath.Join(f.dir, fmt.Sprint(i))); err != nil {
					errs <- fmt.Errorf("%d: %w", i, err)
				}
			})
		}
		wg.Wait()
	}
	command := func(args ...string) error {
		out, err := f.try(args...)
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	each(func(i int, dir string) error {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if i%4 == 0 {
			return command("mount", "--ro", "app:1", dir)
		}
		if err := command("mount", "--rm", "--name", fmt.Sprint("c", i), "app:1", dir); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, "mine"), []byte(fmt.Sprint(i)), 0o644)
	})
	each(func(i int, dir string) error {
		b, err := os.ReadFile(filepath.Join(dir, "mine"))
		if i%4 > 0 && (err != nil || string(b) != fmt.Sprint(i)) {
			return fmt.Errorf("%q, %w", b, err)
		}
		return command("umount", dir)
	})
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	f.clean()
}

// TestSoakMounts mounts and unmounts for as long as SOAK_DURATION says, in three ways, and
// looks that nothing of it is left.
func TestSoakMounts(t *testing.T) {
	s := os.Getenv("SOAK_DURATION")
	if s == "" {
		t.Skip("SOAK_DURATION is not set")
	}
	d, err := time.ParseDuration(s)
	must(t, err)
	f := newMountField(t)
	f.run("create", "app:1", "box")
	target := filepath.Join(f.dir, "m")
	for _, n := range []string{"m", "l", "u", "w"} {
		must(t, os.Mkdir(filepath.Join(f.dir, n), 0o755))
	}
	raw := fmt.Sprintf("lowerdir=%[1]s/l,upperdir=%[1]s/u,workdir=%[1]s/w", f.dir)
	n, start := 0, time.Now()
	for time.Since(start) < d && !t.Failed() {
		for _, mount := range [][]string{{"mount", "box", target}, {"mount", "--ro", "app:1", target}, {"overlay", "-o", raw, target}} {
			f.run(mount...)
			if _, err := os.ReadDir(target); err != nil {
				t.Error(err)
			}
			f.run("umount", target)
			n++
		}
	}
	t.Logf("%d mounts, %.0f a minute", n, float64(n)/time.Since(start).Minutes())
	f.clean()
}
