package fsat

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestResolver(t *testing.T) {
	dir := t.TempDir()
	// The directory for tests may be reached through a link itself.
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"a/b/c", "a/d", "other/b"} {
		if err := os.MkdirAll(filepath.Join(dir, p), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{
		"middle": "a/b", "last": "a/d", "abs": filepath.Join(dir, "a"), "chain": "middle", "loop": "loop", "dangling": "none",
		"a/up": "..", "a/b/away": "../../other",
	} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(filepath.Join(dir, "a"))
	cases := []struct {
		path string
		want string // below dir; "-": an error
	}{
		{dir + "/a/b", "a/b"},
		{dir + "/a/b/", "a/b"},
		{dir + "/a/b///", "a/b"},
		{dir + "//a//b", "a/b"},
		{dir + "/a/./b", "a/b"},
		{dir + "/a/b/.", "a/b"},
		{dir + "/a/b/..", "a"},
		{dir + "/a/b/../d", "a/d"},
		{dir + "/middle/c", "a/b/c"},
		{dir + "/middle", "a/b"},
		{dir + "/middle/", "a/b"},
		{dir + "/last", "a/d"},
		{dir + "/last/", "a/d"},
		{dir + "/abs/b/c", "a/b/c"},
		{dir + "/chain/c", "a/b/c"},
		{dir + "/chain", "a/b"},
		// ".." leads to where the link leads, not to where it lies.
		{dir + "/middle/..", "a"},
		{dir + "/middle/../d", "a/d"},
		{dir + "/a/b/away/../a", "a"},
		{dir + "/a/up/other", "other"},
		{"b", "a/b"},
		{"./b/c", "a/b/c"},
		{"../other", "other"},
		{"..", ""},
		{".", "a"},
		{"up/middle/../d", "a/d"},
		{"b/away/b", "other/b"},
		{dir + "/none", "-"},
		{dir + "/none/x", "-"},
		{dir + "/dangling", "-"},
		{dir + "/loop", "-"},
		{dir + "/loop/x", "-"},
	}
	var r Resolver // remembers
	for range 2 {
		for _, tc := range cases {
			for name, resolve := range map[string]func(string) (string, error){"fresh": new(Resolver).Resolve, "used": r.Resolve} {
				got, err := resolve(tc.path)
				want := filepath.Join(real, tc.want)
				if tc.want == "-" {
					if err == nil {
						t.Errorf("%s: Resolve(%q) = %q, want an error", name, tc.path, got)
					}
				} else if err != nil || got != want {
					t.Errorf("%s: Resolve(%q) = %q, %v; want %q", name, tc.path, got, err, want)
				}
			}
		}
	}
	if got, err := r.Resolve("/"); got != "/" || err != nil {
		t.Errorf("Resolve(/) = %q, %v", got, err)
	}
	// A relative path means another directory elsewhere.
	t.Chdir(filepath.Join(dir, "other"))
	if got, err := r.Resolve("b"); err != nil || got != filepath.Join(real, "other", "b") {
		t.Errorf("Resolve(b) in another directory = %q, %v", got, err)
	}
}

// TestOpenRegularNoDev: what is not a regular file is neither opened nor waited for.
func TestOpenRegularNoDev(t *testing.T) {
	fd, dir := root(t)
	p := func(name string) string { return filepath.Join(dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(p("file"), []byte("data"), 0o600))
	must(os.WriteFile(p("closed"), []byte("data"), 0))
	must(os.Mkdir(p("dir"), 0o755))
	must(os.Symlink("file", p("link")))
	must(os.Symlink("none", p("dangling")))
	must(unix.Mkfifo(p("fifo"), 0o666))
	sock, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(err)
	defer unix.Close(sock)
	must(unix.Bind(sock, &unix.SockaddrUnix{Name: ProcPath(fd) + "/socket"}))
	for _, tc := range []struct {
		name        string
		read, write error
	}{
		{"file", nil, nil},
		{"fifo", unix.ESTALE, unix.ESTALE},
		{"socket", unix.ESTALE, unix.ESTALE},
		{"dir", unix.ESTALE, unix.ESTALE},
		{"link", unix.ESTALE, unix.ESTALE},
		{"dangling", unix.ESTALE, unix.ESTALE},
		{"none", unix.ENOENT, unix.ENOENT},
		{"closed", nil, nil}, // it is ours, so we may
		{strings.Repeat("n", 256), unix.ENAMETOOLONG, unix.ENAMETOOLONG},
	} {
		for flags, want := range map[int]error{unix.O_RDONLY: tc.read, unix.O_RDWR: tc.write} {
			if tc.name == "closed" && flags == unix.O_RDONLY && os.Geteuid() != 0 {
				continue
			}
			before := openFds(t)
			got, err := OpenRegularNoDev(fd, tc.name, flags)
			if err != want {
				t.Errorf("OpenRegularNoDev(%.20q, %#x): %v, want %v", tc.name, flags, err, want)
			}
			if err == nil {
				buf := make([]byte, 10)
				if n, err := unix.Read(got, buf); err != nil || string(buf[:n]) != "data" {
					t.Errorf("%s: read %q, %v", tc.name, buf[:n], err)
				}
				Close(got)
			}
			if after := openFds(t); after != before {
				t.Errorf("%.20q, %#x: %d descriptors open, %d before", tc.name, flags, after, before)
			}
		}
	}
}

func openFds(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// tableSize is how many descriptors the kernel has room for.
func tableSize(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "FDSize:"); ok {
			n, err := strconv.Atoi(strings.TrimSpace(v))
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatal("no FDSize in /proc/self/status")
	return 0
}

func TestReserveFds(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	before := openFds(t)
	want := int(min(limit.Cur, 2048))
	ReserveFds(want)
	if got := tableSize(t); got < want {
		t.Errorf("there is room for %d descriptors, want %d", got, want)
	}
	// Nobody is bothered with what is not possible, or nothing to do.
	for _, n := range []int{0, -1, 1, 1 << 30} {
		ReserveFds(n)
	}
	if after := openFds(t); after != before {
		t.Errorf("%d descriptors open, %d before", after, before)
	}
}

func TestOpenInRoot(t *testing.T) {
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	for _, err := range []error{
		os.MkdirAll(filepath.Join(root, "etc"), 0o755),
		os.WriteFile(filepath.Join(root, "etc/file"), []byte("inside"), 0o644),
		os.WriteFile(filepath.Join(dir, "secret"), []byte("outside"), 0o644),
		os.Symlink("/etc/file", filepath.Join(root, "absolute")),
		os.Symlink("../../../../etc/file", filepath.Join(root, "up")),
		os.Symlink(filepath.Join(dir, "secret"), filepath.Join(root, "out")),
		os.Symlink("../secret", filepath.Join(root, "beside")),
		os.Symlink("/proc/self/root/etc/passwd", filepath.Join(root, "magic")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	rootFd, err := OpenTrusted(root)
	if err != nil {
		t.Fatal(err)
	}
	defer Close(rootFd)
	for path, want := range map[string]error{
		"etc/file": nil, "/etc/file": nil, "../../etc/file": nil, "absolute": nil, "up": nil,
		"out": unix.ENOENT, "beside": unix.ENOENT, "../secret": unix.ENOENT, "magic": unix.ENOENT,
	} {
		fd, err := OpenInRoot(rootFd, path, unix.O_RDONLY)
		if err != want {
			t.Errorf("%q: %v, want %v", path, err, want)
		}
		if err != nil {
			continue
		}
		b := make([]byte, 20)
		if n, err := unix.Read(fd, b); err != nil || string(b[:n]) != "inside" {
			t.Errorf("%q: %q, %v", path, b[:n], err)
		}
		Close(fd)
	}
	// With the machine's /proc in reach, a magic link is refused.
	slash, err := OpenTrusted("/")
	if err != nil {
		t.Fatal(err)
	}
	defer Close(slash)
	if fd, err := OpenInRoot(slash, "proc/self/root/etc", unix.O_PATH); err != unix.ELOOP {
		Close(fd)
		t.Errorf("through a magic link: %v", err)
	}
}
