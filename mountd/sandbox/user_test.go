package sandbox

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const (
	testPasswd = `root:x:0:0:root:/root:/bin/sh
# a comment
short:x:1:1
bad:x:minus:1::/:/bin/sh
none:x:4294967295:1::/:/bin/sh
app:x:1000:1001:App:/home/app:/bin/sh
33:x:500:501::/home/odd:/bin/sh
www:x:33:33::relative:/bin/sh
app:x:7:7:second of that name:/:/bin/sh
`
	testGroup = `root:x:0:
short:x
staff:x:50:www,app
again:x:50:app
adm:x:4:app,root
bad:x:none:app
1234:x:99:
`
)

func TestFindUser(t *testing.T) {
	for _, c := range []struct {
		text string
		want User
		err  string
	}{
		{text: "", want: User{Home: "/root", Groups: []uint32{4}}},
		{text: "0", want: User{Home: "/root", Groups: []uint32{4}}},
		{text: "app", want: User{UID: 1000, GID: 1001, Home: "/home/app", Groups: []uint32{50, 4}}},
		{text: "1000", want: User{UID: 1000, GID: 1001, Home: "/home/app", Groups: []uint32{50, 4}}},
		{text: "33", want: User{UID: 500, GID: 501, Home: "/home/odd"}}, // a name comes first
		{text: "www", want: User{UID: 33, GID: 33, Home: "/", Groups: []uint32{50}}},
		{text: "app:adm", want: User{UID: 1000, GID: 4, Home: "/home/app"}},
		{text: "app:1234", want: User{UID: 1000, GID: 99, Home: "/home/app"}},
		{text: "app:77", want: User{UID: 1000, GID: 77, Home: "/home/app"}},
		{text: "2000", want: User{UID: 2000, Home: "/"}},
		{text: "2000:staff", want: User{UID: 2000, GID: 50, Home: "/"}},
		{text: ":50", want: User{GID: 50, Home: "/root"}},
		{text: "nobody", err: "no such user"},
		{text: "short", err: "no such user"},
		{text: "none", err: "no such user"},
		{text: "-1", err: "no such user"},
		{text: "4294967295", err: "no such user"},
		{text: "app:", err: "no group"},
		{text: "app:nogroup", err: "no such group"},
		{text: "app:4294967295", err: "no such group"},
	} {
		got, err := findUser(c.text, strings.NewReader(testPasswd), strings.NewReader(testGroup))
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q: error %v, want %q", c.text, err, c.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", c.text, err)
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%q (-want +got):\n%s", c.text, d)
		}
	}
}

// TestLookupUserHostile reads accounts that are not what they should be.
func TestLookupUserHostile(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(outside, []byte("evil:x:4242:0::/:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		make func(etc string) error
		err  string
	}{
		"fifo":    {func(etc string) error { return unix.Mkfifo(etc+"/passwd", 0o666) }, "not a regular file"},
		"dir":     {func(etc string) error { return os.Mkdir(etc+"/passwd", 0o755) }, "not a regular file"},
		"missing": {func(string) error { return nil }, "no such user"},
		"huge": {func(etc string) error {
			if err := os.WriteFile(etc+"/passwd", nil, 0o644); err != nil {
				return err
			}
			return os.Truncate(etc+"/passwd", 1<<40)
		}, "more than the"},
		"long line": {func(etc string) error {
			return os.WriteFile(etc+"/passwd", []byte(strings.Repeat("x", maxAccountLine+1)), 0o644)
		}, "a line of more than"},
		"link out":      {func(etc string) error { return os.Symlink(outside, etc+"/passwd") }, "no such user"},
		"link up":       {func(etc string) error { return os.Symlink(strings.Repeat("../", 20)+outside, etc+"/passwd") }, "no such user"},
		"link to magic": {func(etc string) error { return os.Symlink("/proc/self/root"+outside, etc+"/passwd") }, "no such user"},
		"link loop":     {func(etc string) error { return os.Symlink("passwd", etc+"/passwd") }, "too many levels"},
		"link inside": {func(etc string) error {
			if err := os.WriteFile(etc+"/other", []byte("evil:x:1:0::/:/bin/sh\n"), 0o644); err != nil {
				return err
			}
			return os.Symlink("/etc/other", etc+"/passwd")
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			etc := filepath.Join(root, "etc")
			if err := os.Mkdir(etc, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := c.make(etc); err != nil {
				t.Fatal(err)
			}
			fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			u, err := LookupUser(fd, "evil")
			switch {
			case c.err == "" && (err != nil || u.UID != 1):
				t.Errorf("got %+v, %v", u, err)
			case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)):
				t.Errorf("got %+v, error %v, want %q", u, err, c.err)
			}
		})
	}
}

func FuzzFindUser(f *testing.F) {
	f.Add("app:staff", testPasswd, testGroup)
	f.Add("", "", "")
	f.Add("1:2", "a:::::", ":::")
	f.Fuzz(func(t *testing.T, text, passwd, group string) {
		u, err := findUser(text, strings.NewReader(passwd), strings.NewReader(group))
		if err != nil {
			return
		}
		if u.UID == 1<<32-1 || u.GID == 1<<32-1 || len(u.Groups) > maxGroups || !strings.HasPrefix(u.Home, "/") {
			t.Errorf("findUser(%q) = %+v", text, u)
		}
		// Numbers without an account are what they are.
		if id, ok := parseID(text); ok && passwd == "" && u.UID != id {
			t.Errorf("findUser(%q) = %+v", text, u)
		}
	})
}
