package layers

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func step(parent, config string, from ...string) BuildStep {
	return BuildStep{Parent: parent, Config: json.RawMessage(config), From: from}
}

// build makes an image of parent with one more file and the command in its history.
func build(t testing.TB, s *Store, parent, ref, command string) Image {
	t.Helper()
	c := create(t, s, parent, "")
	must(t, os.WriteFile(filepath.Join(c.Upper, "file-"+ref), []byte(command), 0o644))
	cmd, err := json.Marshal(strings.Fields(command))
	must(t, err)
	img, err := s.Commit(t.Context(), c.ID, ref, CommitOptions{Changes: []string{"CMD " + string(cmd)}})
	must(t, err)
	must(t, s.RemoveContainer(t.Context(), c.ID))
	return img
}

// TestBuildCache: the rule says what makes a step the same.
func TestBuildCache(t *testing.T) {
	s := openStore(t)
	load(t, s, outerTar(t, oldDocker(t, sample(t), img{refs: []string{"other"}, layers: [][]byte{layerTar(t, file("o", "1"))}})))
	base := firstImage(t, s)
	one := build(t, s, base, "one", "make all")
	const config = `{"Cmd":["make","all"],"Env":["A=1","B=2"],"Labels":{"x":"1","y":"2"},"Hostname":"a","Healthcheck":{"Test":["T"],"Retries":1}}`
	if _, err := s.FindBuild(t.Context(), step(base, config)); !errors.Is(err, ErrNotFound) {
		t.Fatal("before it was recorded:", err)
	}
	must(t, s.RecordBuild(t.Context(), step(base, config), "one"))
	for _, tc := range []struct {
		what   string
		step   BuildStep
		found  bool
		sentry error
	}{
		{"the same", step(base, config), true, nil},
		{"another order of keys, another host", step(base, `{"Hostname":"b","Image":"i","Labels":{"y":"2","x":"1"},"Healthcheck":{"Retries":1,"Test":["T"]},"Env":["A=1","B=2"],"Cmd":["make","all"],"Volumes":{}}`), true, nil},
		{"another order of the environment", step(base, strings.Replace(config, `"A=1","B=2"`, `"B=2","A=1"`, 1)), false, ErrNotFound},
		{"another command", step(base, strings.Replace(config, "all", "test", 1)), false, ErrNotFound},
		{"another label", step(base, strings.Replace(config, `"x":"1"`, `"x":"2"`, 1)), false, ErrNotFound},
		{"another user", step(base, strings.Replace(config, `{"Cmd"`, `{"User":"1","Cmd"`, 1)), false, ErrNotFound},
		{"another parent", step("other", config), false, ErrNotFound},
		{"no parent", step("", config), false, ErrNotFound},
		{"another platform", BuildStep{Parent: base, Config: json.RawMessage(config), Platform: "linux/s390x"}, false, ErrNotFound},
		{"an unknown parent", step("missing", config), false, ErrNotFound},
		{"no JSON", step(base, "{"), false, ErrInvalid},
		{"a list", step(base, "[]"), false, ErrInvalid},
	} {
		img, err := s.FindBuild(t.Context(), tc.step)
		if tc.found && (err != nil || img.ID != one.ID) || !tc.found && !errors.Is(err, tc.sentry) {
			t.Errorf("%s: %s %v", tc.what, img.ID, err)
		}
	}
	two := build(t, s, base, "two", "make all")
	must(t, s.RecordBuild(t.Context(), step(base, config), "two"))
	if img, err := s.FindBuild(t.Context(), step(base, config)); err != nil || img.ID != two.ID {
		t.Error("the last one counts:", img.ID, err)
	}
	if _, err := s.RemoveImage(t.Context(), "two", RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	if img, err := s.FindBuild(t.Context(), step(base, config)); !errors.Is(err, ErrNotFound) {
		t.Error("its image is gone:", img.ID, err)
	}
	clean(t, s)
}

// TestBuildCacheFrom finds steps in the history of an image that was loaded.
func TestBuildCacheFrom(t *testing.T) {
	s := openStore(t)
	load(t, s, outerTar(t, oldDocker(t, sample(t))))
	base := firstImage(t, s)
	build(t, s, base, "one", "make all")
	c := create(t, s, "one", "")
	must(t, os.WriteFile(filepath.Join(c.Upper, "installed"), nil, 0o644))
	_, err := s.Commit(t.Context(), c.ID, "two", CommitOptions{Author: "late"})
	must(t, err)
	must(t, s.RemoveContainer(t.Context(), c.ID))
	var archive bytes.Buffer
	must(t, s.Save(t.Context(), &archive, []string{"two", base}, SaveOptions{}))
	there := openStore(t)
	load(t, there, archive.Bytes())

	two, err := there.ResolveImage(t.Context(), "two")
	must(t, err)
	h := two.Config.History
	command := func(i int) string {
		raw, _ := json.Marshal(map[string]any{"Cmd": []string{h[i].CreatedBy}, "User": "nobody"})
		return string(raw)
	}
	n := len(h)
	if _, err := there.FindBuild(t.Context(), step(base, command(n-2))); !errors.Is(err, ErrNotFound) {
		t.Error("without --cache-from:", err)
	}
	if _, err := there.FindBuild(t.Context(), step(base, `{"Cmd":["something else"]}`, "two")); !errors.Is(err, ErrNotFound) {
		t.Error("another command:", err)
	}
	first, err := there.FindBuild(t.Context(), step(base, command(n-2), "two"))
	must(t, err)
	if len(first.Config.History) != n-1 || len(first.DiffIDs) != len(two.DiffIDs)-1 || first.Config.Config.User != "nobody" || first.Parent.String() != base {
		t.Errorf("the first step: %+v", first)
	}
	if a := first.Config.Author; a != "" {
		t.Errorf("the first step has the author of the last: %q", a)
	}
	// It is known from now on, and the next step is found on it.
	again, err := there.FindBuild(t.Context(), step(base, command(n-2)))
	must(t, err)
	second, err := there.FindBuild(t.Context(), step(first.ID.String(), command(n-1), "two"))
	must(t, err)
	if again.ID != first.ID || len(second.DiffIDs) != len(two.DiffIDs) || second.ChainID != two.ChainID {
		t.Errorf("again %s, first %s, second %+v", again.ID, first.ID, second)
	}
	clean(t, there)
}

// TestCopyDigest: what a copy takes over counts, and nothing else.
func TestCopyDigest(t *testing.T) {
	tree := func(t *testing.T) string {
		d := filepath.Join(t.TempDir(), "src")
		must(t, os.MkdirAll(filepath.Join(d, "a/b"), 0o755), os.WriteFile(filepath.Join(d, "a/b/f"), []byte("1"), 0o644),
			os.WriteFile(filepath.Join(d, "g"), []byte("2"), 0o755), os.Symlink("a/b/f", filepath.Join(d, "l")))
		return d
	}
	of := func(paths ...string) string {
		d, err := CopyDigest(paths...)
		must(t, err)
		return d
	}
	base := tree(t)
	want := of(base)
	if !strings.HasPrefix(want, "dir:") || len(want) != 68 || !strings.HasPrefix(of(base+"/g"), "file:") || !strings.HasPrefix(of(base, base+"/g"), "multi:") {
		t.Error(want)
	}
	if of(base, base+"/g") == of(base+"/g", base) {
		t.Error("the order of what is copied does not count")
	}
	for _, tc := range []struct {
		what   string
		change func(d string) error
		same   bool
	}{
		{"nothing", func(string) error { return nil }, true},
		{"times", func(d string) error { return os.Chtimes(d+"/g", time.Unix(1, 0), time.Unix(2, 0)) }, true},
		{"another top directory", func(d string) error { return os.Rename(d, d+"x") }, true},
		{"content", func(d string) error { return os.WriteFile(d+"/g", []byte("3"), 0o755) }, false},
		{"mode", func(d string) error { return os.Chmod(d+"/g", 0o700) }, false},
		{"name", func(d string) error { return os.Rename(d+"/g", d+"/h") }, false},
		{"place", func(d string) error { return os.Rename(d+"/g", d+"/a/g") }, false},
		{"target", func(d string) error { return errors.Join(os.Remove(d+"/l"), os.Symlink("g", d+"/l")) }, false},
		{"type", func(d string) error {
			return errors.Join(os.Remove(d+"/l"), os.WriteFile(d+"/l", []byte("a/b/f"), 0o777))
		}, false},
		{"empty directory", func(d string) error { return os.Mkdir(d+"/new", 0o755) }, false},
		{"fifo", func(d string) error { return unix.Mkfifo(d+"/p", 0o644) }, false},
	} {
		d := tree(t)
		must(t, tc.change(d))
		if _, err := os.Lstat(d); err != nil {
			d += "x"
		}
		if got := of(d); (got == want) != tc.same {
			t.Errorf("%s: %s, was %s", tc.what, got, want)
		}
	}
	if _, err := CopyDigest(base + "/missing"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
