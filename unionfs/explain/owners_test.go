package explain

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/override"
)

// TestWhatObjectsAre: owner, mode and type are those that the mount shows.
func TestWhatObjectsAre(t *testing.T) {
	dir := t.TempDir()
	for name, value := range map[string]string{"tool": "7:8:4755", "null": "0:5:666:char-1-3", "link": "3:4:777:symlink", "plain": ""} {
		p := dir + "/" + name
		if err := os.WriteFile(p, nil, 0o640); err != nil {
			t.Fatal(err)
		}
		if value == "" {
			continue
		}
		if err := unix.Setxattr(p, override.Containers.Attr(), []byte(value), 0); err != nil {
			t.Skipf("no user attributes here: %v", err)
		}
	}
	if err := unix.Setxattr(dir+"/link", override.TargetAttr, []byte("else/where"), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/bad", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(dir+"/bad", override.Containers.Attr(), []byte("nonsense"), 0); err != nil {
		t.Fatal(err)
	}
	l := Layer{Label: Label{Name: "layer 1"}}
	l.Path, l.Dialect, l.Override = dir, whiteout.UserXattr, override.Containers
	s, err := Open(Options{Lowers: []Layer{l}, Owners: unionfs.Owners{
		UIDs: unionfs.IDMap{Ranges: []unionfs.IDRange{{Stored: 0, Shown: 1000, Length: 10}}}, FilesOfRoot: true,
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for path, want := range map[string]string{
		"/tool": "file 4755 1007:8", "/null": "character device 0666 1000:5 1:3", "/link": "symlink 0777 1003:4 else/where", "/plain": "file 0640 1000:0",
	} {
		r, err := s.Explain(path)
		if err != nil || !r.Exists {
			t.Errorf("%s: %+v, %v", path, r, err)
			continue
		}
		a := r.Attr
		got := strings.TrimSpace(fmt.Sprintf("%s %v %d:%d %s%s", a.Kind, a.Mode, a.UID, a.GID, a.Rdev, a.Target))
		if got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
		if private := len(r.Entries[0].Private) > 0; private != (path != "/plain") {
			t.Errorf("%s: private attributes %v", path, r.Entries[0].Private)
		}
	}
	if r, err := s.Explain("/bad"); err != nil || r.Errno != "EIO" || r.Exists {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestOwnDirectory: a mount does not show its own upper, if that lies in a lower.
func TestOwnDirectory(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"/up", "/work", "/other"} {
		if err := os.Mkdir(dir+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	lower, upper := Layer{Label: Label{Name: "lower 1 of 1"}}, Layer{Label: Label{Name: "upper"}}
	lower.Path, lower.Dialect, upper.Path, upper.Dialect = dir, whiteout.AUFS, dir+"/up", whiteout.AUFS
	s, err := Open(Options{Lowers: []Layer{lower}, Upper: &upper, Work: dir + "/work"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for path, want := range map[string]string{"/up": "ELOOP", "/work": "ELOOP", "/work/x": "ELOOP", "/other": ""} {
		if r, err := s.Explain(path); err != nil || r.Errno != want {
			t.Errorf("%s: %+v, %v", path, r, err)
		}
	}
}

// TestOpenErrors: a layer that is none is an error with its path.
func TestOpenErrors(t *testing.T) {
	file := t.TempDir() + "/f"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]error{file: unix.ENOTDIR, file + "x": unix.ENOENT} {
		l := Layer{}
		l.Path = path
		if _, err := Open(Options{Lowers: []Layer{l}}); !errors.Is(err, want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := Open(Options{}); err == nil {
		t.Error("a stack of nothing")
	}
}

// TestRedirectsEverywhere: a stack that was made to take long is given up, and soon.
func TestRedirectsEverywhere(t *testing.T) {
	var o Options
	deep := strings.Repeat("/d", 8)
	for i := range 12 {
		dir := t.TempDir()
		l := Layer{Label: Label{Name: fmt.Sprintf("layer %d", i)}}
		l.Path, l.Dialect = dir, whiteout.UserXattr
		if err := os.MkdirAll(dir+deep, 0o755); err != nil {
			t.Fatal(err)
		}
		for p := dir + "/d"; len(p) <= len(dir+deep); p += "/d" {
			if err := unix.Setxattr(p, l.Dialect.Attr("redirect"), []byte(deep), 0); err != nil {
				t.Skipf("no user attributes here: %v", err)
			}
		}
		o.Lowers = append(o.Lowers, l)
	}
	o.Redirect = unionfs.RedirectFollow
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Explain(deep); !errors.Is(err, errTooMuch) {
		t.Errorf("%v", err)
	}
}
