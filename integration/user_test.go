package integration

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// userScript changes a tree in the ways that programs of users do, and describes
// it. Its output on a mount and on a plain directory must be the same.
const userScript = `set -eu
umask 022
cat low; echo more >> low; cat low
truncate -s 3 low; cat low; echo
truncate -s 100 low; : > cleared; echo again > cleared
dd if=/dev/zero of=big bs=1000 count=3 seek=2 conv=notrunc 2>&1 | head -n 1
printf new > created; printf 12345 > created; chmod 600 created
chmod 4755 tool; echo x >> tool; stat -c %a tool
chmod 2755 tool; truncate -s 1 tool; stat -c %a tool
cp -a dir copied; mv dir/x dir/y; rm -r gone; mkdir gone; touch gone/new
chmod 640 readonly; echo w >> readonly; mv readonly2 moved; touch -d @5 moved; ln moved moved2; chmod 755 rodir; touch rodir/new
ln low hard; ln -s low sym; mkfifo fifo; rm -f unlinked
touch -d @1000000000 hard; mv -f created replaced; rm -r copied/sub
printf ro > own; chmod 444 own; mv own own2; ln own2 own3; cat own3
exec 3<> big; rm big; printf end >&3; exec 3>&-
find . -type d -printf '%p %y %m %U:%G\n' | sort
find . ! -type d -printf '%p %y %m %U:%G %s %n %l\n' | sort
find . -type f -exec cksum {} + | sort
stat -c '%Y %n' low
`

// TestUserMount mounts as an ordinary user, by way of fusermount3.
func TestUserMount(t *testing.T) {
	harness.NeedFUSE(t)
	if _, err := exec.LookPath("fusermount3"); err != nil {
		harness.Skip(t, "fusermount3 is not installed")
	}
	bin, err := harness.Binary()
	if err != nil {
		t.Fatal(err)
	}
	asUser(t)
	dir := filepath.Join(base, "user")
	path := func(name string) string { return filepath.Join(dir, name) }
	lower := oracle.Layer{Entries: []oracle.Entry{
		{Path: "low", Kind: oracle.File, Text: "lower text\n"},
		{Path: "cleared", Kind: oracle.File, Size: 9000, Seed: 1},
		{Path: "big", Kind: oracle.File, Size: 500000, Seed: 2},
		{Path: "tool", Kind: oracle.File, Text: "#!/bin/sh\n"},
		{Path: "replaced", Kind: oracle.File, Text: "old"},
		{Path: "unlinked", Kind: oracle.File, Text: "old"},
		{Path: "dir", Kind: oracle.Dir},
		{Path: "dir/x", Kind: oracle.File, Text: "x"},
		{Path: "dir/sub", Kind: oracle.Dir},
		{Path: "dir/sub/z", Kind: oracle.Symlink, Target: "../x"},
		{Path: "gone", Kind: oracle.Dir},
		{Path: "readonly", Kind: oracle.File, Text: "r", Mode: 0o444},
		{Path: "readonly2", Kind: oracle.File, Text: "r2", Mode: 0o400},
		{Path: "rodir", Kind: oracle.Dir},
		{Path: "rodir/z", Kind: oracle.File, Text: "z"},
		{Path: "gone/old", Kind: oracle.File, Text: "old"},
	}}
	uid, gid := user()
	for i := range lower.Entries {
		lower.Entries[i].UID, lower.Entries[i].GID = uid, gid
	}
	for _, d := range []string{"lower", "plain", "upper", "work", "merged"} {
		if err := os.MkdirAll(path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(lower.Build(path("lower")), lower.Build(path("plain"))); err != nil {
		t.Fatal(err)
	}
	readOnly := func(mode os.FileMode) error {
		return errors.Join(os.Chmod(path("lower/rodir"), mode), os.Chmod(path("plain/rodir"), mode))
	}
	if err := readOnly(0o555); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = readOnly(0o755) }) // so that it can be removed
	if err := filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(p, uid, gid))
	}); err != nil {
		t.Fatal(err)
	}
	mount := func() {
		t.Helper()
		runAsUser(t, dir, bin, "overlay", "-o", "lowerdir=lower,upperdir=upper,workdir=work", "merged")
	}
	mount()
	t.Cleanup(func() { _ = unix.Unmount(path("merged"), unix.MNT_DETACH) }) // usually unmounted
	want := runAsUser(t, path("plain"), "sh", "-c", userScript)
	got := runAsUser(t, path("merged"), "sh", "-c", userScript)
	if d := oracle.DiffLines(want, got); len(d) > 0 {
		t.Errorf("- plain directory, + mount:\n%s", d)
	}
	const look = "find . ! -type d -printf '%p %y %m %U:%G %s\n' | sort; find . -type f -exec cksum {} + | sort"
	want = runAsUser(t, path("plain"), "sh", "-c", look)
	runAsUser(t, dir, bin, "umount", "merged")
	mount()
	if got = runAsUser(t, path("merged"), "sh", "-c", look); got != want {
		t.Errorf("after a remount (- plain, + mount):\n%s", oracle.DiffLines(want, got))
	}
	runAsUser(t, dir, bin, "umount", "merged")
}

// nobody is who root becomes.
const nobody = 65534

func user() (uid, gid int) {
	if os.Geteuid() == 0 {
		return nobody, nobody
	}
	return os.Geteuid(), os.Getegid()
}

// asUser lets the user open /dev/fuse for the time of the test, as distributions
// do for ever.
func asUser(t *testing.T) {
	t.Helper()
	st, err := os.Stat("/dev/fuse")
	if err != nil {
		t.Fatal(err)
	}
	if mode := st.Mode().Perm(); os.Geteuid() == 0 && mode&0o6 != 0o6 {
		if err := os.Chmod("/dev/fuse", 0o666); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Chmod("/dev/fuse", mode); err != nil {
				t.Error(err)
			}
		})
	}
}

// runAsUser runs a command as an ordinary user and returns what it prints.
func runAsUser(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.WaitDelay = time.Second // a mount server may keep the output open
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_RUNTIME_DIR=", "LC_ALL=C")
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}
