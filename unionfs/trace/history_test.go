package trace

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestHistory(t *testing.T) {
	name := filepath.Join(t.TempDir(), "history")
	open := func() *History {
		t.Helper()
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		h, err := NewHistory(f)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	find := func(p string) (Copied, bool) {
		t.Helper()
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		return FindCopied(f, p)
	}
	h := open()
	h.Add(Copied{Time: time.Unix(1, 0).UTC(), Path: "/a/b/c", Op: "open", Command: "first", Dirs: 1})
	h.Add(Copied{Path: "/a/b/c", Op: "open", Command: "second"})
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	h = open() // another server
	h.Add(Copied{Path: "/x", Command: "third\n"})
	for p, want := range map[string]string{"/a/b/c": "second", "/a/b": "first", "/a": "", "/x": "third\n", "/": "", "/y": ""} {
		if c, ok := find(p); c.Command != want || ok != (want != "") {
			t.Errorf("%s: %q, %v", p, c.Command, ok)
		}
	}

	// It never grows beyond the limit, and the newest lines stay.
	long := strings.Repeat("d/", 500)
	for i := range 3000 {
		h.Add(Copied{Path: fmt.Sprintf("/%s%d", long, i)})
	}
	st, err := os.Stat(name)
	if err != nil || st.Size() > MaxHistory || st.Size() < MaxHistory/3 {
		t.Errorf("%d bytes, %v", st.Size(), err)
	}
	if _, ok := find(fmt.Sprintf("/%s2999", long)); !ok {
		t.Error("the last line is gone")
	}
	if _, ok := find("/x"); ok {
		t.Error("the first line is still there")
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(b), "\n"); n < 300 || !strings.HasPrefix(string(b), "{") {
		t.Errorf("%d lines", n)
	}
	// Damage is passed over.
	if err := os.WriteFile(name, []byte("{\"path\":\"/a\n\x00garbage\n"+strings.Repeat("x", 3*maxHistoryLine)+"\n{\"path\":\"/b\",\"command\":\"x\"}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, ok := find("/b"); !ok || c.Command != "x" {
		t.Errorf("behind damage: %+v, %v", c, ok)
	}
}
