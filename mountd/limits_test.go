package mountd

import (
	"errors"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/holder"
)

// TestMaxMounts: of many that mount at once no more get through than may, and a mount that
// has ended makes room for another.
func TestMaxMounts(t *testing.T) {
	f := newFixture(t)
	f.opts.MaxMounts = 2
	const tries = 5
	dirs := make([]string, tries)
	for i := range dirs {
		dirs[i] = mkdirs(t, "m") + "/m"
		t.Cleanup(func() { _ = unix.Unmount(dirs[i], unix.MNT_DETACH) }) // usually gone already
	}
	type result struct {
		dir string
		err error
	}
	results := make(chan result, tries)
	mount := func(dir string) error {
		_, err := f.Mount(t.Context(), MountRequest{Source: "localhost/img:1", Target: Path(dir), ReadOnly: true})
		return err
	}
	for _, d := range dirs {
		go func() { results <- result{d, mount(d)} }()
	}
	var mounted []string
	for range tries {
		switch r := <-results; {
		case r.err == nil:
			mounted = append(mounted, r.dir)
		case !errors.Is(r.err, layers.ErrInUse):
			t.Error(r.err)
		}
	}
	if len(mounted) != 2 {
		t.Fatalf("%d mounts, expected 2", len(mounted))
	}
	if _, err := f.Unmount(t.Context(), UnmountRequest{Name: Path(mounted[0]), Target: Path(mounted[0])}); err != nil {
		t.Fatal(err)
	}
	if err := mount(mounted[0]); err != nil {
		t.Error(err)
	}
	for _, d := range mounted {
		if _, err := f.Unmount(t.Context(), UnmountRequest{Name: Path(filepath.Base(d)), Target: Path(d)}); err != nil {
			t.Error(err)
		}
	}
}

func TestLimitsAreChecked(t *testing.T) {
	f := newFixture(t)
	for _, l := range []holder.Limits{{Memory: 1}, {Memory: -1}, {OpenFiles: 1}, {OpenFiles: -1}} {
		_, err := f.Mount(t.Context(), MountRequest{Source: "c", Target: Path(f.mnt), Limits: l})
		if !errors.Is(err, ErrUsage) {
			t.Errorf("%+v: %v", l, err)
		}
	}
}
