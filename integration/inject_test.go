package integration

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
	"github.com/plyfs/plyfs/mountd"
)

// inject is `plyfs inject` on the mount; it must succeed.
func (m *imageMount) inject(options ...string) string {
	m.t.Helper()
	return m.s.run(append([]string{"inject", m.target}, options...)...)
}

// TestInject: programs meet the faults that rules name, and no others.
func TestInject(t *testing.T) {
	harness.NeedFUSE(t)
	for _, io := range []string{"auto", "cache"} {
		t.Run(io, func(t *testing.T) { testInject(t, io) })
	}
}

func testInject(t *testing.T, io string) {
	m := newImageMount(t, oracle.Recipe{Lowers: []oracle.Layer{workshop()}}, "--name", "box", "--io", io)
	at := func(p string) string { return filepath.Join(m.target, "data", p) }

	// A database that fsync fails once: the data is there, nothing else has noticed.
	m.inject("--op", "fsync", "--path", "/data/db", "--errno", "EIO", "--nth", "2")
	f, err := os.OpenFile(at("db"), os.O_CREATE|os.O_RDWR, 0o644)
	must(t, err)
	defer f.Close()
	for i, want := range []error{nil, unix.EIO, nil} {
		_, err := f.Write([]byte("row\n"))
		must(t, err)
		if err := f.Sync(); !errors.Is(err, want) {
			t.Errorf("fsync %d: %v, want %v", i+1, err, want)
		}
	}
	if b, err := os.ReadFile(at("db")); err != nil || string(b) != "row\nrow\nrow\n" {
		t.Errorf("the data: %q, %v", b, err)
	}

	// No space in the middle of an upgrade: what is refused is not there, not even in part.
	m.inject("--op", "create,mkdir,rename", "--path", "/data/new/**", "--errno", "ENOSPC")
	if err := os.Mkdir(at("new"), 0o755); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("mkdir: %v", err)
	}
	if err := os.Rename(at("low1"), at("new")); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("rename: %v", err)
	}
	if _, err := os.Lstat(at("new")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("refused, but there: %v", err)
	}
	must(t, os.Mkdir(at("another"), 0o755))

	// Data: files that are open already are left alone, others are not, caches or not.
	must(t, os.WriteFile(at("log"), []byte("0123456789"), 0o644))
	old, err := os.OpenFile(at("log"), os.O_RDWR, 0)
	must(t, err)
	defer old.Close()
	if out := m.inject("--op", "read,write", "--path", "log", "--short", "4"); !strings.Contains(out, "4 bytes") {
		t.Errorf("rules: %s", out)
	}
	file, err := os.OpenFile(at("log"), os.O_RDWR, 0)
	must(t, err)
	defer file.Close()
	buf := make([]byte, 10)
	if n, err := unix.Pread(int(file.Fd()), buf, 0); n != 4 || err != nil {
		t.Errorf("read %d, %v", n, err)
	}
	if n, err := unix.Pwrite(int(file.Fd()), []byte("abcdefghij"), 0); n != 4 || err != nil {
		t.Errorf("written %d, %v", n, err)
	}
	if n, err := unix.Pread(int(old.Fd()), buf, 0); err != nil || string(buf[:n]) != "abcd456789" {
		t.Errorf("who has it open already reads %q, %v", buf[:n], err)
	}
	m.inject("--op", "read", "--path", "low2", "--errno", "EIO", "--latency", "60ms")
	began := time.Now()
	if _, err := os.ReadFile(at("low2")); !errors.Is(err, unix.EIO) || time.Since(began) < 60*time.Millisecond {
		t.Errorf("read after %v: %v", time.Since(began), err)
	}
	if _, err := os.ReadFile(at("low5")); err != nil {
		t.Error(err)
	}

	// Only this process, which is not that of the command.
	m.inject("--op", "getattr,lookup", "--pid", "1", "--errno", "EACCES")
	if _, err := os.Lstat(at("low7")); err != nil {
		t.Errorf("the fault of another process: %v", err)
	}
	var rules []struct{ ID, Matched, Hit int }
	must(t, json.Unmarshal([]byte(m.inject("--list", "--json")), &rules))
	if len(rules) != 5 || rules[0].Matched != 3 || rules[0].Hit != 1 {
		t.Errorf("rules: %+v", rules)
	}
	rulesFile := filepath.Join(t.TempDir(), "rules")
	must(t, os.WriteFile(rulesFile, []byte(m.inject("--list", "--json")), 0o644))
	m.inject("--clear", "1")
	m.inject("--clear", "all")
	if out := m.inject("--list", "--json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("left: %s", out)
	}
	if _, err := os.ReadFile(at("low2")); err != nil {
		t.Errorf("after the rules: %v", err)
	}
	m.inject("--file", rulesFile)
	if _, err := os.ReadFile(at("low2")); !errors.Is(err, unix.EIO) {
		t.Errorf("rules of a file: %v", err)
	}
	m.inject("--clear", "all")

	// Names are any bytes.
	must(t, os.WriteFile(at("caf\xe9"), []byte("x"), 0o644))
	m.inject("--op", "read", "--path", "caf\xe9", "--errno", "EIO")
	if _, err := os.ReadFile(at("caf\xe9")); !errors.Is(err, unix.EIO) {
		t.Errorf("a name that is not valid UTF-8: %v", err)
	}
	m.inject("--clear", "all")

	// They end by themselves.
	m.inject("--op", "mkdir", "--errno", "EIO", "--for", "300ms")
	if err := os.Mkdir(at("soon"), 0o755); !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	waitFor(t, "the end of a rule", func() bool { return os.Mkdir(at("soon"), 0o755) == nil })

	for _, bad := range [][]string{
		{"--op", "read", "--errno", "ENOSYS"},
		{"--op", "release", "--errno", "EIO"},
		{"--op", "read"},
		{"--errno", "EIO"},
		{"--op", "read", "--errno", "EIO", "--list"},
		{"--clear", "x"},
		{"--clear", "4711"},
		{"--op", "open", "--errno", "EIO", "--prob", "0"},
		{"--op", "open", "--errno", "EIO", "--nth", "0"},
		{"--op", "open", "--errno", "EIO", "--for", "0s"},
		{"--op", "write", "--short", "-1"},
		{"--op", "nothing", "--errno", "EIO"},
	} {
		if out, err := m.s.try(append([]string{"inject", m.target}, bad...)...); err == nil || !strings.Contains(out, "plyfs: ") {
			t.Errorf("%v was taken: %s", bad, out)
		}
	}
}

// TestWatchingIsForTheOwner: nobody but the mount's user, and root, can watch it or make its requests fail,
// whatever run directory he names.
func TestWatchingIsForTheOwner(t *testing.T) {
	harness.NeedRoot(t)
	m := newImageMount(t, oracle.Recipe{Lowers: []oracle.Layer{workshop()}})
	control, err := filepath.Glob(filepath.Join(mountd.RunBase(), "*", "mounts", "*", "control"))
	must(t, err)
	if len(control) == 0 {
		t.Fatal("no mount can be watched")
	}
	const nobody = 65534
	for _, args := range [][]string{{"trace", m.target, "--for", "1s"}, {"inject", m.target, "--op", "read", "--errno", "EIO"}, {"top", m.target}} {
		cmd := exec.Command(program(t, "plyfs"), args...)
		cmd.Env = append(os.Environ(), mountd.RunDirEnv+"="+mountd.RunBase(), "HOME=/")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "no server that can be asked") {
			t.Errorf("%v: %v: %s", args, err, out)
		}
	}
	for _, c := range control {
		if st, err := os.Stat(c); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", c, st, err)
		}
	}
	if out := m.inject("--list", "--json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("somebody has made a rule: %s", out)
	}
}
