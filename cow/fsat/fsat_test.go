package fsat

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func root(t *testing.T) (fd int, dir string) {
	t.Helper()
	dir = t.TempDir()
	fd, err := OpenTrusted(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Close(fd) })
	return fd, dir
}

func TestOpenBeneath(t *testing.T) {
	fd, dir := root(t)
	outside := t.TempDir()
	for _, p := range []string{"a/b", "sub"} {
		if err := os.MkdirAll(filepath.Join(dir, p), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{"abs": outside, "up": "..", "in": "a", "magic": "/proc/self/root"} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		path string
		want error
	}{
		{"", nil},
		{"a/b", nil},
		{"a/../a", nil},
		{"..", unix.EXDEV},
		{"a/../../x", unix.EXDEV},
		{"/etc", unix.EXDEV},
		{"abs", unix.ELOOP},
		{"abs/x", unix.ELOOP},
		{"in/b", unix.ELOOP},
		{"up", unix.ELOOP},
		{"magic/etc", unix.ELOOP},
		{"none", unix.ENOENT},
	} {
		got, err := OpenBeneath(fd, tc.path, unix.O_PATH|unix.O_DIRECTORY)
		if err != tc.want && !(tc.want == unix.ELOOP && err == unix.ENOTDIR) {
			t.Errorf("OpenBeneath(%q): %v, want %v", tc.path, err, tc.want)
		}
		if err == nil {
			Close(got)
		}
	}
}

func TestOpenBeneathLongPath(t *testing.T) {
	fd, _ := root(t)
	name := strings.Repeat("d", 200)
	at, path := fd, ""
	for range 30 { // 6 000 bytes, more than PATH_MAX
		if err := Mkdir(at, name, 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := OpenName(at, name, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if at != fd {
			Close(at)
		}
		at, path = next, filepath.Join(path, name)
	}
	defer Close(at)
	got, err := OpenBeneath(fd, path, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		t.Fatalf("path of %d bytes: %v", len(path), err)
	}
	defer Close(got)
	var a, b unix.Stat_t
	if Fstat(at, &a) != nil || Fstat(got, &b) != nil || a.Ino != b.Ino {
		t.Error("the long path leads elsewhere")
	}
	if err := RemoveAll(fd, name); err != nil {
		t.Errorf("RemoveAll: %v", err)
	}
}

func TestOpenRegularRefusesOthers(t *testing.T) {
	fd, dir := root(t)
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"fifo", "link", "."} {
		if got, err := OpenRegular(fd, name, unix.O_RDONLY); err != unix.ESTALE {
			t.Errorf("OpenRegular(%q) = %d, %v; want ESTALE", name, got, err)
		}
	}
	got, err := OpenRegular(fd, "file", unix.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	Close(got)
}

func TestReadDir(t *testing.T) {
	fd, dir := root(t)
	want := []string{}
	for i := range 3000 {
		n := strings.Repeat("n", i%250) + strconv.Itoa(i)
		if err := os.WriteFile(filepath.Join(dir, n), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		want = append(want, n)
	}
	var got []string
	if err := ReadDirBeneath(fd, func(e Dirent) error { got = append(got, e.Name); return nil }); err != nil {
		t.Fatal(err)
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(want, got) {
		t.Errorf("read %d names, want %d", len(got), len(want))
	}
}

// TestObjectsThemselves checks that attribute calls act on a symbolic link and
// not on what it leads to.
func TestObjectsThemselves(t *testing.T) {
	fd, dir := root(t)
	target := filepath.Join(t.TempDir(), "target")
	if err := os.WriteFile(target, nil, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	link, err := OpenName(fd, "link", unix.O_PATH, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer Close(link)
	ts := [2]unix.Timespec{{Sec: 10}, {Sec: 20}}
	for _, at := range []struct {
		dirfd int
		name  string
	}{{fd, "link"}, {link, ""}} {
		if err := Chmod(at.dirfd, at.name, 0o777); err == nil {
			t.Error("chmod of a symbolic link succeeded")
		}
		if err := Utimes(at.dirfd, at.name, ts); err != nil {
			t.Errorf("utimes: %v", err)
		}
		if err := Chown(at.dirfd, at.name, os.Getuid(), os.Getgid()); err != nil {
			t.Errorf("chown: %v", err)
		}
		if os.Getuid() == 0 {
			if err := Setxattr(at.dirfd, at.name, "trusted.x", []byte("v"), 0); err != nil {
				t.Errorf("setxattr: %v", err)
			}
			if v, err := GetxattrValue(at.dirfd, at.name, "trusted.x"); err != nil || string(v) != "v" {
				t.Errorf("getxattr: %q, %v", v, err)
			}
			if names, err := Listxattr(at.dirfd, at.name); err != nil || !slices.Contains(names, "trusted.x") {
				t.Errorf("listxattr: %q, %v", names, err)
			}
			if err := Removexattr(at.dirfd, at.name, "trusted.x"); err != nil {
				t.Errorf("removexattr: %v", err)
			}
		}
	}
	var st unix.Stat_t
	if err := unix.Lstat(target, &st); err != nil {
		t.Fatal(err)
	}
	if st.Mode&0o777 != 0o640 || st.Mtim.Sec == 20 {
		t.Errorf("the target changed: mode %o, mtime %d", st.Mode&0o777, st.Mtim.Sec)
	}
	if err := Stat(fd, "link", &st); err != nil || st.Mtim.Sec != 20 {
		t.Errorf("the link's mtime is %d, %v", st.Mtim.Sec, err)
	}
}
