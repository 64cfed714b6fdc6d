package integration

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/archive"
	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// ownedLayer is a layer whose objects belong to many, and are of all types.
func ownedLayer(t *testing.T) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, h := range []tar.Header{
		{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "etc/shadow", Typeflag: tar.TypeReg, Mode: 0o640, Gid: 42},
		{Name: "etc/none", Typeflag: tar.TypeReg, Mode: 0},
		{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "bin/tool", Typeflag: tar.TypeReg, Mode: 0o4755, Uid: 7, Gid: 8},
		{Name: "home/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "home/app/", Typeflag: tar.TypeDir, Mode: 0o2750, Uid: 1000, Gid: 1000},
		{Name: "home/app/data", Typeflag: tar.TypeReg, Mode: 0o600, Uid: 1000, Gid: 1000},
		{Name: "home/app/keep", Typeflag: tar.TypeReg, Mode: 0o644, Uid: 1000, Gid: 1000},
		{Name: "dev/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "dev/kept", Typeflag: tar.TypeChar, Mode: 0o666, Gid: 5, Devmajor: 1, Devminor: 3},
		{Name: "dev/pipe", Typeflag: tar.TypeFifo, Mode: 0o620, Uid: 3, Gid: 5},
		{Name: "link", Typeflag: tar.TypeSymlink, Mode: 0o777, Linkname: "etc/shadow"},
		{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777},
	} {
		data := []byte(nil)
		if h.Typeflag == tar.TypeReg {
			data = []byte(h.Name)
			h.Size = int64(len(data))
		}
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// changes touch objects of all owners, and change none of them.
const changes = `set -e; umask 022
echo more >> etc/shadow; chmod 700 home/app/data; mkdir home/app/new; echo n > home/app/new/file; rm bin/tool
mv home/app/keep home/app/kept; chmod 600 dev/pipe dev/kept; mkfifo tmp/fifo; ln -s x tmp/sym; ln etc/shadow etc/shadow2; chmod 4711 home/app/kept; chmod 0 etc/none`

// TestUserStore: a user loads, mounts, changes, commits and exports an image, and gets
// what root gets, owners included.
func TestUserStore(t *testing.T) {
	harness.NeedFUSE(t)
	if os.Geteuid() != 0 {
		harness.Skip(t, "compares with what root gets")
	}
	if _, err := exec.LookPath("fusermount3"); err != nil {
		harness.Skip(t, "fusermount3 is not installed")
	}
	asUser(t)
	dir := filepath.Join(base, "user-store")
	uid, gid := user()
	file := filepath.Join(dir, "image.tar")
	if err := errors.Join(os.Mkdir(dir, 0o755), (archive.Image{Ref: "localhost/owned:1", Layers: [][]byte{ownedLayer(t)}}).Write(file, archive.Options{})); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chown(dir, uid, gid), os.Chmod(file, 0o644)); err != nil {
		t.Fatal(err)
	}
	s := newStore(t)
	run := func(args ...string) string {
		t.Helper()
		return runAsUser(t, dir, s.bin, append([]string{"--root", dir + "/store"}, args...)...)
	}
	merged := filepath.Join(dir, "m")
	if err := errors.Join(os.Mkdir(merged, 0o755), os.Chown(merged, uid, gid)); err != nil {
		t.Fatal(err)
	}

	s.run("load", "-i", file)
	run("load", "-i", file)
	const images = "images --json"
	if mine, roots := run(strings.Fields(images)...), s.run(strings.Fields(images)...); field(mine, `"id":`) != field(roots, `"id":`) {
		t.Errorf("image of the user:\n%s\nof root:\n%s", mine, roots)
	}

	// The user is root to the image, and sees all types, modes and contents.
	run("mount", "--name", "c", "localhost/owned:1", merged)
	t.Cleanup(func() { _ = unix.Unmount(merged, unix.MNT_DETACH) }) // usually unmounted
	const look = `stat -c '%n %F %u:%g %a %t:%T' etc/shadow etc/none bin/tool home/app home/app/data dev/kept dev/pipe link tmp; cat etc/none home/app/data; readlink link`
	want := strings.ReplaceAll(`etc/shadow regular file O 640 0:0
etc/none regular file O 0 0:0
bin/tool regular file O 4755 0:0
home/app directory O 2750 0:0
home/app/data regular file O 600 0:0
dev/kept character special file O 666 1:3
dev/pipe fifo O 620 0:0
link symbolic link O 777 0:0
tmp directory O 1777 0:0
cat: etc/none: Permission denied
home/app/dataetc/shadow
`, "O", fmt.Sprintf("%d:%d", uid, gid))
	if d := oracle.DiffLines(want, runAsUser(t, merged, "sh", "-c", look+" || readlink link")); len(d) > 0 {
		t.Errorf("- expected, + mount of a user:\n%s", d)
	}
	runAsUser(t, merged, "sh", "-c", changes)
	run("umount", merged)

	rootMerged := t.TempDir()
	s.run("mount", "--name", "c", "localhost/owned:1", rootMerged)
	shellIn(t, rootMerged, changes)
	s.run("umount", "c")
	if d := oracle.DiffLines(s.run("diff", "c"), run("diff", "c")); len(d) > 0 {
		t.Errorf("diff: - root, + user:\n%s", d)
	}
	for _, in := range []func(args ...string) string{s.run, run} {
		in("commit", "c", "localhost/owned:2")
	}
	s.run("export", "-o", filepath.Join(dir, "root.tar"), "localhost/owned:2")
	run("export", "-o", filepath.Join(dir, "user.tar"), "localhost/owned:2")
	if d := oracle.DiffLines(entriesOf(t, filepath.Join(dir, "root.tar")), entriesOf(t, filepath.Join(dir, "user.tar"))); len(d) > 0 {
		t.Errorf("exported: - root, + user:\n%s", d)
	}
	run("check", "--deep")
	noPrivileges(t, filepath.Join(dir, "store"), uid)
	trap := t.TempDir()
	if out, err := exec.Command(s.bin, "--root", dir+"/store", "mount", "--suid", "--ro", "localhost/owned:1", trap).CombinedOutput(); err == nil || !strings.Contains(string(out), "is one of a user") {
		t.Errorf("root mounts the user's set-user-id files: %v %s", err, out)
	}
	// Root may look, but leaves nothing that the user could not remove.
	for _, args := range [][]string{{"load", "-i", file}, {"create", "localhost/owned:1"}, {"mount", "localhost/owned:1", trap}, {"commit", "c"}} {
		out, err := exec.Command(s.bin, append([]string{"--root", dir + "/store"}, args...)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), fmt.Sprintf("belongs to user %d", uid)) {
			t.Errorf("%q as root in the store of a user: %v %s", args, err, out)
		}
	}
	for _, args := range [][]string{{"images"}, {"check", "--deep"}, {"save", "-o", filepath.Join(dir, "saved.tar"), "localhost/owned:1"}} {
		if out, err := exec.Command(s.bin, append([]string{"--root", dir + "/store"}, args...)...).CombinedOutput(); err != nil {
			t.Errorf("%q as root in the store of a user: %v %s", args, err, out)
		}
	}
	runAsUser(t, dir, "rm", "-rf", filepath.Join(dir, "store")) // as any files of the user
}

// TestStoreOfAnotherOwner: what a store says about set-user-id files counts for root only if
// nobody else can have written it.
func TestStoreOfAnotherOwner(t *testing.T) {
	harness.NeedFUSE(t)
	if os.Geteuid() != 0 {
		harness.Skip(t, "gives a store away")
	}
	file := filepath.Join(t.TempDir(), "image.tar")
	if err := (archive.Image{Ref: "localhost/owned:1", Layers: [][]byte{ownedLayer(t)}}).Write(file, archive.Options{}); err != nil {
		t.Fatal(err)
	}
	s := newStore(t)
	s.run("load", "-i", file)
	m := t.TempDir()
	s.run("mount", "--ro", "--suid", "--dev", "localhost/owned:1", m)
	s.run("umount", m)
	for _, c := range []struct {
		what   string
		change func() error
	}{
		{"others may write to", func() error { return os.Chmod(s.root, 0o777) }},
		{"belongs to another", func() error { return errors.Join(os.Chmod(s.root, 0o755), os.Chown(s.root, 1, 1)) }},
	} {
		if err := c.change(); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{
			{"mount", "--ro", "--suid", "localhost/owned:1", m},
			{"mount", "--ro", "--dev", "localhost/owned:1", m},
			{"shell", "--ro", "localhost/owned:1", "/bin/tool"},
			{"bundle", "--ro", "localhost/owned:1", filepath.Join(t.TempDir(), "bundle")},
		} {
			if out, err := s.try(args...); err == nil || !strings.Contains(out, "is one of a user") {
				t.Errorf("%q of a store that %s: %v %s", args, c.what, err, out)
			}
		}
	}
	s.run("mount", "--ro", "localhost/owned:1", m)
	s.run("umount", m)
}

// ownersChanged changes what needs to be root, among many ids.
const ownersChanged = changes + `
chown 3:4 etc/shadow; chown -h 5:6 link; ln -s to mine; chown -h 7:8 mine; ln -s a own; chown -h 9:9 own; chown -h 0:0 own; mv mine moved
touch u; chown 1000:1000 u; chmod 6755 u; mkdir dir; chown 1000:33 dir; chmod 2770 dir; touch dir/in; ln -s y dir/link; chmod 1777 dir
mkfifo p; chown 5:5 p; chmod 600 p; chown 12:13 dev/kept; setfacl -m u:1000:rw,g:44:r u; setfacl -d -m u:7:rwx dir; mkdir dir/acl; touch dir/acl/f
cp -a home/app home/copy; cp -a link copied; stat -c '%n %F %u:%g %a %s' etc/shadow link moved own u dir dir/in dir/link p dev/kept home/copy/* copied; readlink link moved own copied
getfattr -h -d -m - link moved own copied
getfacl -cn u dir/acl dir/acl/f`

// TestUserStoreManyIDs: root of a user namespace with subordinate ids changes owners, and
// the store, whose files stay the user's, has what root's has.
func TestUserStoreManyIDs(t *testing.T) {
	harness.NeedFUSE(t)
	if os.Geteuid() != 0 {
		harness.Skip(t, "compares with what root gets, and maps ids")
	}
	asUser(t)
	dir := filepath.Join(base, "user-ids")
	uid, gid := user()
	file := filepath.Join(dir, "image.tar")
	if err := errors.Join(os.Mkdir(dir, 0o755), (archive.Image{Ref: "localhost/owned:1", Layers: [][]byte{ownedLayer(t)}}).Write(file, archive.Options{}),
		os.Chown(dir, uid, gid), os.Chmod(file, 0o644)); err != nil {
		t.Fatal(err)
	}
	s := newStore(t)
	s.run("load", "-i", file)
	m := t.TempDir()
	s.run("mount", "--suid", "--dev", "--name", "c", "localhost/owned:1", m)
	want := shellIn(t, m, ownersChanged)
	s.run("umount", "c")
	s.run("commit", "c", "localhost/owned:2")
	s.run("export", "-o", filepath.Join(dir, "root.tar"), "localhost/owned:2")

	script := fmt.Sprintf(`set -e; p="%s --root %s/store --socket none"; $p load -i image.tar; mkdir m; $p mount --suid --name c localhost/owned:1 m
cd m; sh -c "$CHANGES" > ../seen; cd ..; $p umount c; $p commit c localhost/owned:2; $p export -o user.tar localhost/owned:2; $p check --deep`, s.bin, dir)
	cmd := exec.Command("sh", "-c", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME="+dir, "PLYFS_RUN_DIR="+dir+"/run", "LC_ALL=C", "CHANGES="+ownersChanged)
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:                 syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings:                []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}, {ContainerID: 1, HostID: 100000, Size: 65535}},
		GidMappings:                []syscall.SysProcIDMap{{ContainerID: 0, HostID: gid, Size: 1}, {ContainerID: 1, HostID: 100000, Size: 65535}},
		GidMappingsEnableSetgroups: true, Credential: &syscall.Credential{},
	}
	kill := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() }) // it may have ended
	out, err := cmd.CombinedOutput()
	kill.Stop()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	seen, err := os.ReadFile(filepath.Join(dir, "seen"))
	if err != nil {
		t.Fatal(err)
	}
	if d := oracle.DiffLines(want, string(seen)); len(d) > 0 {
		t.Errorf("- root's mount, + the user's:\n%s", d)
	}
	if d := oracle.DiffLines(entriesOf(t, filepath.Join(dir, "root.tar")), entriesOf(t, filepath.Join(dir, "user.tar"))); len(d) > 0 {
		t.Errorf("exported: - root, + user:\n%s", d)
	}
	noPrivileges(t, filepath.Join(dir, "store"), uid)
}

// TestUserStoreOnNFS: a store without attributes and devices has the same names and contents
// as root's, though not the owners of what was changed.
func TestUserStoreOnNFS(t *testing.T) {
	harness.NeedFUSE(t)
	if os.Geteuid() != 0 {
		harness.Skip(t, "compares with what root gets")
	}
	if _, err := exec.LookPath("fusermount3"); err != nil {
		harness.Skip(t, "fusermount3 is not installed")
	}
	asUser(t)
	dir := filepath.Join(base, "user-nfs")
	uid, gid := user()
	home, merged, file := filepath.Join(dir, "home"), filepath.Join(dir, "m"), filepath.Join(dir, "image.tar")
	above := tarOf(t, "etc/.wh.none", "home/app/.wh..wh..opq", "home/app/other", "tmp/.wh.absent")
	for _, err := range []error{
		os.MkdirAll(home, 0o755), os.Mkdir(merged, 0o755), os.Chown(merged, uid, gid),
		(archive.Image{Ref: "localhost/owned:1", Layers: [][]byte{ownedLayer(t), above}}).Write(file, archive.Options{}), os.Chmod(file, 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	place, err := harness.NewPlace("like-nfs")
	if err != nil {
		t.Fatal(err)
	}
	remove, err := place(home, func() error { return os.Chown(home, uid, gid) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := remove(); err != nil {
			t.Error(err)
		}
	})
	s := newStore(t)
	run := func(args ...string) string {
		t.Helper()
		return runAsUser(t, dir, s.bin, append([]string{"--root", home + "/store"}, args...)...)
	}
	const change = `set -e; rm etc/shadow; rm -r home/app; mkdir home/app; echo n > home/app/new; mkdir etc/none; mv bin/tool moved; ln moved again; rm -r tmp; mkdir tmp; : > tmp/x; rm tmp/x; chmod 600 moved`
	rootMerged := t.TempDir()
	s.run("load", "-i", file)
	s.run("mount", "--name", "c", "localhost/owned:1", rootMerged)
	shellIn(t, rootMerged, change)
	s.run("umount", "c")
	s.run("commit", "c", "localhost/owned:2")
	want := s.run("diff", "c")

	run("load", "-i", file)
	run("mount", "--name", "c", "localhost/owned:1", merged)
	t.Cleanup(func() { _ = unix.Unmount(merged, unix.MNT_DETACH) }) // usually unmounted
	runAsUser(t, merged, "sh", "-c", change)
	run("umount", merged)
	if d := oracle.DiffLines(want, run("diff", "c")); len(d) > 0 {
		t.Errorf("diff: - root, + user:\n%s", d)
	}
	run("commit", "c", "localhost/owned:2")
	run("check", "--deep")
	run("mount", "--ro", "localhost/owned:2", merged)
	s.run("mount", "--ro", "localhost/owned:2", rootMerged)
	const look = `find . | sort; find . -type f | sort | xargs cat`
	if d := oracle.DiffLines(shellIn(t, rootMerged, look), runAsUser(t, merged, "sh", "-c", look)); len(d) > 0 {
		t.Errorf("committed: - root, + user:\n%s", d)
	}
	s.run("umount", rootMerged)
	run("umount", merged)
}

// tarOf is a layer of empty files.
func tarOf(t *testing.T, names ...string) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, n := range names {
		if err := tw.WriteHeader(&tar.Header{Name: n, Typeflag: tar.TypeReg, Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// field returns the rest of the line that has the key.
func field(text, key string) string {
	_, rest, _ := strings.Cut(text, key)
	line, _, _ := strings.Cut(rest, "\n")
	return line
}

// entriesOf lists a tar, without what the time of day decides.
func entriesOf(t *testing.T, file string) string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var lines []string
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		delete(h.PAXRecords, "mtime")
		lines = append(lines, fmt.Sprintf("%s %c %o %d:%d %q %d,%d %q %v", h.Name, h.Typeflag, h.Mode, h.Uid, h.Gid, h.Linkname, h.Devmajor, h.Devminor, data, h.PAXRecords))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n") + "\n"
}

// noPrivileges checks that nothing below dir belongs to anybody else, is setuid or
// setgid, or is a device but a whiteout.
func noPrivileges(t *testing.T, dir string, uid int) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		typ := st.Mode & unix.S_IFMT
		device := typ == unix.S_IFBLK || typ == unix.S_IFCHR && st.Rdev != 0
		if int(st.Uid) != uid || st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 || device {
			t.Errorf("%s: owner %d, mode %o, in the store of user %d", path, st.Uid, st.Mode, uid)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
