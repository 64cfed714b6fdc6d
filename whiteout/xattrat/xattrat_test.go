package xattrat

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// All ways to reach an object lead to the same attributes.
func TestAllForms(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/f", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("f", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	dirfd := open(t, dir, unix.O_PATH|unix.O_DIRECTORY)
	if err := Set(dirfd, "f", "user.a", []byte("one"), 0); err != nil {
		t.Skipf("no attributes of users here: %v", err)
	}
	forms := map[string]struct {
		fd   int
		name string
	}{
		"name": {dirfd, "f"}, "O_PATH": {open(t, dir+"/f", unix.O_PATH), ""}, "open file": {open(t, dir+"/f", unix.O_RDONLY), ""},
	}
	for form, f := range forms {
		t.Run(form, func(t *testing.T) {
			buf := make([]byte, 100)
			if n, err := Get(f.fd, f.name, "user.a", buf); err != nil || string(buf[:n]) != "one" {
				t.Errorf("Get: %q, %v", buf[:n], err)
			}
			if n, err := Get(f.fd, f.name, "user.a", nil); err != nil || n != 3 {
				t.Errorf("Get without a buffer: %d, %v", n, err)
			}
			if _, err := Get(f.fd, f.name, "user.a", buf[:1]); err != unix.ERANGE {
				t.Errorf("Get into one byte: %v, want ERANGE", err)
			}
			if err := Set(f.fd, f.name, "user.b", []byte("x"), unix.XATTR_CREATE); err != nil {
				t.Errorf("Set: %v", err)
			}
			if err := Set(f.fd, f.name, "user.b", nil, unix.XATTR_CREATE); err != unix.EEXIST {
				t.Errorf("Set once more: %v, want EEXIST", err)
			}
			if n, err := List(f.fd, f.name, buf); err != nil || !strings.Contains(string(buf[:n]), "user.b\x00") {
				t.Errorf("List: %q, %v", buf[:n], err)
			}
			if err := Remove(f.fd, f.name, "user.b"); err != nil {
				t.Errorf("Remove: %v", err)
			}
			if _, err := Get(f.fd, f.name, "user.b", buf); err != unix.ENODATA {
				t.Errorf("Get of a removed attribute: %v, want ENODATA", err)
			}
		})
	}
	if n, err := Get(dirfd, "link", "user.a", nil); err == nil {
		t.Errorf("a symbolic link was followed: %d bytes", n)
	}
}

func open(t *testing.T, path string, flags int) int {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func TestImpossibleNames(t *testing.T) {
	dir, err := unix.Open(t.TempDir(), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dir)
	long := strings.Repeat("x", 256)
	for _, c := range []struct{ name, attr string }{{"a\x00b", "user.x"}, {"a", "user.\x00"}, {long, "user.x"}, {"a", "user." + long}} {
		_, get := Get(dir, c.name, c.attr, nil)
		set, remove := Set(dir, c.name, c.attr, nil, 0), Remove(dir, c.name, c.attr)
		for call, err := range map[string]error{"get": get, "set": set, "remove": remove} {
			if err != unix.EINVAL && err != unix.ENAMETOOLONG && err != unix.ERANGE {
				t.Errorf("%s %.10q %.10q: %v", call, c.name, c.attr, err)
			}
		}
	}
}
