package unionfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// inMountNamespace calls fn on a thread whose mounts nobody else sees, and which ends
// with it.
func inMountNamespace(t *testing.T, fn func() error) {
	t.Helper()
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread is not used again
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err != nil {
			failed <- fmt.Errorf("%w: %w", errNoNamespace, err)
			return
		}
		failed <- fn()
	}()
	err := <-failed
	if errors.Is(err, errNoNamespace) {
		t.Skip(err)
	}
	if err != nil {
		t.Error(err)
	}
}

var errNoNamespace = errors.New("needs a mount namespace")

func TestNesting(t *testing.T) {
	dir := t.TempDir()
	p := func(name string) string { return filepath.Join(dir, name) }
	for _, d := range []string{"u/in/deep", "w/in", "u2", "l/sub", "bound", "l/bound"} {
		if err := os.MkdirAll(p(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{"tou": "u", "l/toin": "../u/in", "tol": "l"} {
		if err := os.Symlink(target, p(link)); err != nil {
			t.Fatal(err)
		}
	}
	type nested struct {
		name               string
		upper, work, lower string
		ok                 bool
	}
	check := func(cases []nested) error {
		var errs []error
		for _, tc := range cases {
			err := checkNesting(Options{Upper: p(tc.upper), Work: p(tc.work), Lowers: []Layer{{Path: p("l/sub")}, {Path: p(tc.lower)}}})
			if tc.ok != (err == nil) || err != nil && !errors.Is(err, ErrInvalid) {
				errs = append(errs, fmt.Errorf("%s: %v; want it taken: %v", tc.name, err, tc.ok))
			}
		}
		return errors.Join(errs...)
	}
	if err := check([]nested{
		{"side by side", "u", "w", "l", true},
		{"a name that begins like another", "u", "w", "u2", true},
		{"upper and workdir in a lower", "u", "w", "", true}, // see trap
		{"a lower in the upper", "u", "w", "u/in", false},
		{"a lower deep in the upper", "u", "w", "u/in/deep", false},
		{"a lower in the workdir", "u", "w", "w/in", false},
		{"a lower is the workdir", "u", "w", "w", false},
		{"the workdir in the upper", "u", "u/in", "l", false},
		{"the upper in the workdir", "w/in", "w", "l", false},
		{"they are one", "u", "u", "l", false},
		{"through a link", "u", "w", "tou/in", false},
		{"through a link elsewhere", "u", "w", "l/toin/deep", false},
		{"the upper through a link", "tou", "w", "u/in", false},
		{"the workdir through a link", "u", "tou/in", "l", false},
		{"a link to something else", "u", "w", "tol", true},
		{"up and down again", "u", "w", "l/../u/in", false},
	}); err != nil {
		t.Error(err)
	}
	inMountNamespace(t, func() error {
		bind := func(from, to string) error { return unix.Mount(p(from), p(to), "", unix.MS_BIND, "") }
		if err := errors.Join(bind("u", "bound"), bind("u/in", "l/bound")); err != nil {
			return err
		}
		return check([]nested{
			{"the upper by another name", "u", "w", "bound", false},
			{"a lower in the upper by another name", "u", "w", "bound/in/deep", false},
			{"the upper is named by its other name", "bound", "w", "u/in", false},
			{"the workdir in it by another name", "u", "bound/in", "l", false},
			// Only a part of the upper is there; nothing above it tells.
			{"a lower that a part of the upper is mounted in", "u", "w", "l", true},
		})
	})
}
