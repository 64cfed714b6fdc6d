package fsat

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOriginFindsTheFileAgain(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	d, err := OpenTrusted(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer Close(d)
	fs := FSUUID(d)
	o, err := Origin(d, "f", fs)
	if err == unix.EOPNOTSUPP {
		t.Skipf("%s has no file handles", dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "f"), filepath.Join(dir, "g")); err != nil {
		t.Fatal(err)
	}
	if again, err := Origin(d, "g", fs); err != nil || !bytes.Equal(o, again) {
		t.Errorf("after a rename: %x, %v; want %x", again, err, o)
	}
	if os.Getuid() != 0 {
		t.Skip("needs root to open by handle")
	}
	fd, err := OpenOrigin(d, fs, o)
	if err != nil {
		t.Fatal(err)
	}
	defer Close(fd)
	var a, b unix.Stat_t
	if err := Fstat(fd, &a); err != nil {
		t.Fatal(err)
	}
	if err := Stat(d, "g", &b); err != nil || a.Ino != b.Ino {
		t.Errorf("inode %d, want %d (%v)", a.Ino, b.Ino, err)
	}
	for name, bad := range map[string][]byte{
		"empty": nil, "short": o[:10], "cut": o[:len(o)-1], "magic": append([]byte{0, 1}, o[2:]...),
		"other file system": append(append(append([]byte{}, o[:5]...), make([]byte, 16)...), o[21:]...),
	} {
		if name == "other file system" && fs == (UUID{}) {
			continue
		}
		if fd, err := OpenOrigin(d, fs, bad); err != unix.ESTALE {
			Close(fd)
			t.Errorf("%s: %v, want ESTALE", name, err)
		}
	}
}
