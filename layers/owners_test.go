package layers

import (
	"archive/tar"
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/metadata/chainindex"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/override"
)

// posixACL is a value of system.posix_acl_access that goes with mode 0664: user 1000
// may read, and the mask is rw.
const posixACL = "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\xe8\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff"

// ownersImage has everything that a file of a user cannot be.
func ownersImage(t testing.TB) img {
	t.Helper()
	x := func(kv ...string) map[string]string {
		m := map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	base := []ent{
		{name: "./", typ: tar.TypeDir, mode: 0o711, gid: 9},
		dir("d"), file("d/plain", "p"),
		{name: "d/suid", data: "s", mode: 0o4755, uid: 7, gid: 8},
		hard("d/suid2", "d/suid"),
		{name: "d/sgid", data: "s", mode: 0o2755, gid: 50},
		{name: "d/none", data: "n"},
		{name: "d/highid", data: "h", mode: 0o640, uid: 4000000000, gid: 65000},
		{name: "sticky/", typ: tar.TypeDir, mode: 0o1777},
		{name: "shared/", typ: tar.TypeDir, mode: 0o2775, gid: 50},
		file("shared/f", "1"),
		{name: "closed/", typ: tar.TypeDir},
		{name: "closed/f", data: "1", uid: 3},
		dir("dev"),
		{name: "dev/null", typ: tar.TypeChar, mode: 0o666, maj: 1, min: 3},
		hard("dev/null2", "dev/null"),
		{name: "dev/loop", typ: tar.TypeBlock, mode: 0o660, gid: 6, maj: 7, min: 300},
		{name: "dev/pipe", typ: tar.TypeFifo, mode: 0o622, uid: 5, x: x("trusted.pipe", "p")},
		{name: "l", typ: tar.TypeSymlink, link: "d/plain", mode: 0o777, uid: 1000, gid: 1001, x: x("trusted.l", "1")},
		hard("l2", "l"),
		{name: "xattrs/", typ: tar.TypeDir, mode: 0o755, x: x("user.dir", "1", "system.posix_acl_default", posixACL)},
		{name: "xattrs/cap", data: "c", mode: 0o755, x: x("security.capability", capability)},
		{name: "xattrs/acl", data: "a", mode: 0o664, uid: 3, x: x("system.posix_acl_access", posixACL)},
		{name: "xattrs/many", data: "m", mode: 0o644, x: x("user.empty", "", "user.bin", "\x00\xff", "trusted.t", "t", "trusted.overlay.opaque", "y", "user.overlay.redirect", "/x", "security.other", "o")},
		// An image has no say in what the store writes down.
		{name: "hostile", data: "h", mode: 0o644, x: x("user.containers.override_stat", "0:0:4755:char-0-0", "user.containers.override_security.capability", capability, "user.containers.other", "1")},
		{name: "hostile-dir/", typ: tar.TypeDir, mode: 0o755, x: x("user.containers.override_stat", "9:9:0")},
		{name: "old/", typ: tar.TypeDir, mode: 0o750, uid: 20, gid: 20},
		{name: "old/l", typ: tar.TypeSymlink, link: "gone", mode: 0o777, uid: 21, gid: 22},
		{name: "old/null", typ: tar.TypeChar, mode: 0o600, uid: 23, maj: 1, min: 3},
		{name: "old/f", data: "moved", mode: 0o4711, uid: 24},
		dir("gone"), file("gone/f", "1"), dir("hidden"), file("hidden/f", "1"),
		{name: "links/", typ: tar.TypeDir, mode: 0o700, uid: 30},
		{name: "links/a", data: "links", mode: 0o604, uid: 31},
		hard("links/b", "links/a"),
		{name: "meta", data: "data of the layer", mode: 0o600, uid: 32},
		{name: "implied/dir/f", data: "i", mode: 0o644, uid: 37},
		{name: "was-file", mode: 0o600},
		{name: "was-null", typ: tar.TypeChar, mode: 0o600, maj: 1, min: 3},
	}
	top := []ent{
		wh("gone"), dir("hidden"), opq("hidden"), file("hidden/new", "2"),
		file("shared/implicit", "3"), file("closed/deep/implicit", "4"),
		{name: "new/dir/f", data: "5", uid: 5, mode: 0o444},
		hard("copy-of-l", "l"), hard("copy-of-suid", "d/suid"), hard("copy-of-null", "dev/null"),
		wh("d/sgid"),
		{name: "d/none", mode: 0o1644, data: "sticky file"},
	}
	return img{refs: []string{"owners"}, layers: [][]byte{layerTar(t, base...), layerTar(t, top...), layerTar(t)}}
}

// mounted writes objects into an upper as a mount of the store does: package unionfs
// does, this package only reads them.
type mounted struct {
	testing.TB
	st Stack
}

func (m mounted) path(name string) string { return filepath.Join(m.st.Upper, name) }

// put makes name, whose type is in mode, or gives what is there owner, mode and
// attributes.
func (m mounted) put(name, data string, uid, gid int, mode uint32, rdev uint64, xattrs ...string) {
	m.Helper()
	p := m.path(name)
	typ, perm := mode&unix.S_IFMT, mode&0o7777
	own := m.st.Override == override.None
	is := override.Stat{UID: uint32(uid), GID: uint32(gid), Mode: mode, Rdev: rdev}
	if !own {
		typ = override.RealType(mode)
	}
	if _, err := os.Lstat(p); err != nil {
		switch typ {
		case unix.S_IFDIR:
			err = os.Mkdir(p, 0o700)
		case unix.S_IFLNK:
			err = os.Symlink(data, p)
		case unix.S_IFREG:
			err = os.WriteFile(p, []byte(data), 0o600)
		default:
			err = unix.Mknod(p, typ|0o600, int(rdev))
		}
		must(m, err)
	}
	disk := func(name string) string { return m.st.Override.ToDisk(m.st.Dialect.ToDisk(name)) }
	switch {
	case own:
		must(m, os.Lchown(p, uid, gid))
		if typ != unix.S_IFLNK {
			must(m, unix.Chmod(p, perm))
		}
	case typ != unix.S_IFLNK:
		must(m, unix.Chmod(p, override.RealMode(mode)&0o7777))
		if is.Needed() {
			must(m, unix.Setxattr(p, m.st.Override.Attr(), is.Format(), 0))
		}
	}
	for i := 0; i < len(xattrs); i += 2 {
		must(m, unix.Lsetxattr(p, disk(xattrs[i]), []byte(xattrs[i+1]), 0))
	}
}

// mark sets an attribute of the dialect.
func (m mounted) mark(name, what, value string) {
	m.Helper()
	must(m, unix.Setxattr(m.path(name), m.st.Dialect.Attr(what), []byte(value), 0))
}

// change changes a container of ownersImage.
func (m mounted) change() {
	m.Helper()
	m.put("", "", 3, 4, unix.S_IFDIR|0o2711, 0, "user.root", "1")
	m.put("d", "", 0, 0, unix.S_IFDIR|0o755, 0)
	m.put("d/plain", "p", 1000, 1001, unix.S_IFREG|0o644, 0) // chown alone
	m.put("d/suid", "new", 7, 8, unix.S_IFREG|0o6755, 0)
	m.put("n", "", 1, 2, unix.S_IFDIR|0o3770, 0, "security.n", "1")
	m.put("n/closed", "", 0, 0, unix.S_IFDIR, 0)
	m.put("n/closed/f", "x", 0, 0, unix.S_IFREG, 0)
	m.put("n/null", "", 0, 5, unix.S_IFCHR|0o620, unix.Mkdev(5, 1))
	must(m, os.Link(m.path("n/null"), m.path("n/null2")))
	m.put("n/loop", "", 0, 6, unix.S_IFBLK|0o660, unix.Mkdev(7, 300))
	m.put("n/pipe", "", 9, 9, unix.S_IFIFO|0o644, 0)
	m.put("n/socket", "", 9, 9, unix.S_IFSOCK|0o644, 0) // no layer has sockets
	m.put("n/l", "nowhere", 0, 0, unix.S_IFLNK|0o777, 0)
	m.put("n/cap", "c", 0, 0, unix.S_IFREG|0o755, 0, "security.capability", capability, "user.empty", "", "trusted.t", "t")
	m.put("n/acldir", "", 0, 0, unix.S_IFDIR|0o755, 0, "system.posix_acl_default", posixACL)
	m.put("n/acl", "a", 3, 0, unix.S_IFREG|0o664, 0, "system.posix_acl_access", posixACL)
	m.put("n/hostile", "h", 0, 0, unix.S_IFREG|0o644, 0, "user.containers.override_stat", "0:0:4755", "user.overlay.opaque", "y", "trusted.overlay.opaque", "y")
	m.put("moved", "", 20, 20, unix.S_IFDIR|0o750, 0)
	m.mark("moved", "redirect", "/old")
	m.put("hidden", "", 0, 1, unix.S_IFDIR|0o700, 0)
	m.mark("hidden", "opaque", "y")
	m.put("was-file", "", 0, 0, unix.S_IFIFO|0o600, 0) // nothing but the type
	m.put("was-null", "", 0, 0, unix.S_IFCHR|0o600, unix.Mkdev(1, 5))
	m.put("meta", "", 33, 33, unix.S_IFREG|0o6600, 0)
	must(m, os.Truncate(m.path("meta"), int64(len("data of the layer"))))
	m.mark("meta", "metacopy", "")
	for _, name := range []string{"old", "hostile"} {
		must(m, whiteout.CreateDevice(unix.AT_FDCWD, m.path(name)))
	}
	m.put("links", "", 30, 0, unix.S_IFDIR|0o700, 0)
	m.put("links/a", "links", 34, 35, unix.S_IFREG|0o2604, 0)
	m.put("dev", "", 0, 0, unix.S_IFDIR|0o755, 0)
	m.put("dev/null", "", 0, 36, unix.S_IFCHR|0o660, unix.Mkdev(1, 3))
	m.linked("links/a")
	m.linked("dev/null")
	must(m, filepath.WalkDir(m.st.Upper, func(p string, _ os.DirEntry, err error) error {
		ts := []unix.Timespec{timespec(epoch), timespec(epoch)}
		return errors.Join(err, unix.UtimesNanoAt(unix.AT_FDCWD, p, ts, unix.AT_SYMLINK_NOFOLLOW))
	}))
}

// linked puts a file that has hard links in the lowers into the index of links: the
// upper then has it under all names.
func (m mounted) linked(name string) {
	m.Helper()
	lower := ""
	for _, l := range m.st.Lowers {
		if _, err := os.Lstat(filepath.Join(l.Path, name)); err == nil {
			lower = l.Path
		}
	}
	fd, err := fsat.OpenTrusted(lower)
	must(m, err)
	defer fsat.Close(fd)
	at, err := fsat.OpenBeneath(fd, name, unix.O_PATH|unix.O_NOFOLLOW)
	must(m, err)
	defer fsat.Close(at)
	origin, err := fsat.Origin(at, "", fsat.FSUUID(fd))
	if errors.Is(err, unix.EOPNOTSUPP) {
		m.Skip("the file system has no file handles")
	}
	must(m, err)
	index := filepath.Join(m.st.Work, "index")
	must(m, os.MkdirAll(index, 0o700), os.Link(m.path(name), filepath.Join(index, hex.EncodeToString(origin))))
}

// ownersLines loads ownersImage, changes a container of it, and says what the store
// shows and makes of that: the same in every store.
func ownersLines(t testing.TB, s *Store, name string) (out []string) {
	t.Helper()
	say := func(format string, a ...any) { out = append(out, fmt.Sprintf(format, a...)) }
	for _, i := range load(t, s, outerTar(t, oldDocker(t, ownersImage(t)))) {
		say("image %s", i.ID)
	}
	create(t, s, "owners", name)
	st := upperOf(t, s, name)
	must(t, s.view(t.Context(), func(tx *metadata.Tx) error {
		l, err := tx.Layer(st.ChainID)
		say("init layer %s", l.DiffID)
		return err
	}))
	changes, err := s.Diff(t.Context(), name)
	must(t, err)
	say("changes of a new container: %v", changes)
	mounted{t, st}.change()
	changes, err = s.Diff(t.Context(), name)
	must(t, err)
	for _, c := range changes {
		say("%s %s", c.Kind, c.Path)
	}
	made, err := s.Commit(t.Context(), name, "owners:"+name, CommitOptions{})
	must(t, err)
	say("layers %v", made.DiffIDs)
	differences, err := s.DiffImages(t.Context(), "owners", "owners:"+name, DiffOptions{})
	must(t, err)
	for _, c := range differences {
		say("%s %s in the image: %v", c.Kind, c.Path, c.Details)
	}
	for what, path := range map[string]string{"owners": "image", name: "container", "owners:" + name: "commit"} {
		var b bytes.Buffer
		must(t, s.Export(t.Context(), what, &b))
		for _, l := range entryLines(t, b.Bytes()) {
			say("%s: %s", path, l)
		}
		say("%s: %s", path, digest.FromBytes(b.Bytes()))
	}
	var b bytes.Buffer
	must(t, s.Save(t.Context(), &b, []string{"owners:latest"}, SaveOptions{}))
	say("saved %s", digest.FromBytes(b.Bytes()))
	for _, l := range chainLines(t, s, st) {
		say("index: %s", l)
	}
	clean(t, s)
	slices.Sort(out)
	return out
}

// entryLines describes the entries of a tar.
func entryLines(t testing.TB, b []byte) (out []string) {
	t.Helper()
	tr := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		must(t, err)
		data, err := io.ReadAll(tr)
		must(t, err)
		line := fmt.Sprintf("%q %c %o %d:%d %d,%d %q %q", h.Name, h.Typeflag, h.Mode, h.Uid, h.Gid, h.Devmajor, h.Devminor, h.Linkname, data)
		for _, k := range sortedNames(h.PAXRecords) {
			if name, ok := strings.CutPrefix(k, paxXattr); ok {
				line += fmt.Sprintf(" %s=%q", name, h.PAXRecords[k])
			}
		}
		out = append(out, line)
	}
}

// chainLines describes what a mount of a stack shows of its lowers.
func chainLines(t testing.TB, s *Store, st Stack) (out []string) {
	t.Helper()
	path, _, err := s.ChainIndex(t.Context(), st)
	must(t, err)
	x, err := chainindex.Open(path)
	must(t, err)
	defer x.Close()
	var walk func(slot chainindex.Slot, path string)
	walk = func(slot chainindex.Slot, path string) {
		o, err := x.Object(slot)
		must(t, err)
		has, err := x.HasXattrs(slot)
		must(t, err)
		line := fmt.Sprintf("%q %o %d:%d %x %q %d", "/"+path, o.Mode, o.UID, o.GID, o.Rdev, o.Target, o.Mtime.Sec)
		if !o.IsDir() {
			line += fmt.Sprintf(" %d bytes, %d links", o.Size, o.Nlink)
		}
		for _, x := range o.Xattrs {
			line += fmt.Sprintf(" %s=%q", x.Name, x.Value)
		}
		if has != (len(o.Xattrs) > 0) {
			t.Errorf("%s: has attributes: %v", line, has)
		}
		out = append(out, line)
		var buf chainindex.DirBuf
		if x.ReadDir(slot, 0, math.MaxInt, &buf) != nil {
			return
		}
		for _, e := range buf.Entries {
			walk(e.Slot, join(path, string(e.Name)))
		}
	}
	walk(chainindex.Root, "")
	return out
}

// TestOwners: a user's store shows what a store of root shows, and makes the same
// layers, in a plain shell and in user namespaces, one after the other in one store.
func TestOwners(t *testing.T) {
	if where := os.Getenv("PLYFS_TEST_OWNERS"); where != "" {
		s, err := Open(t.Context(), where, Options{})
		must(t, err)
		defer s.Close()
		if s.powers.privileged {
			t.Fatal("the store has privileges")
		}
		raw, err := json.Marshal(ownersLines(t, s, os.Getenv("PLYFS_TEST_NAME")))
		must(t, err, os.WriteFile(os.Getenv("PLYFS_TEST_OUT"), raw, 0o600))
		return
	}
	s := openStore(t)
	if !s.powers.privileged {
		t.Skip("needs root: a store with privileges to compare with")
	}
	want := ownersLines(t, s, "c")
	t.Run("in this process", func(t *testing.T) { sameLines(t, want, ownersLines(t, userStore(t), "c")) })
	exe, dir := testBinary(t)
	user := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	for _, c := range []struct {
		name string
		ids  int // that the namespace has; 0: no namespace
	}{{"plain", 0}, {"alone", 1}, {"subordinate", 1000}, {"again", 0}} {
		t.Run(c.name, func(t *testing.T) {
			attr := user
			if c.ids > 0 {
				attr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, GidMappingsEnableSetgroups: true, Credential: &syscall.Credential{}}
				ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 65534, Size: 1}}
				if c.ids > 1 {
					ids = append(ids, syscall.SysProcIDMap{ContainerID: 1, HostID: 100000, Size: c.ids - 1})
				}
				attr.UidMappings, attr.GidMappings = ids, ids
			}
			out := filepath.Join(dir, "tmp", c.name+".json")
			cmd := exec.Command(exe, "-test.run=^TestOwners$", "-test.v")
			cmd.Dir, cmd.SysProcAttr = dir, attr
			cmd.Env = append(os.Environ(), "TMPDIR="+dir+"/tmp", "HOME="+dir+"/tmp", "PLYFS_TEST_OWNERS="+dir+"/tmp/store", "PLYFS_TEST_NAME="+c.name, "PLYFS_TEST_OUT="+out)
			said, err := cmd.CombinedOutput()
			if err != nil && c.ids > 0 && errors.Is(err, unix.EPERM) {
				t.Skip("user namespaces are not allowed here")
			}
			if err != nil {
				t.Fatalf("%v\n%s", err, said)
			}
			raw, err := os.ReadFile(out)
			must(t, err)
			var got []string
			must(t, json.Unmarshal(raw, &got))
			for i := range got {
				got[i] = strings.ReplaceAll(got[i], "owners:"+c.name, "owners:c")
			}
			sameLines(t, want, got)
		})
	}
	rm := exec.Command("rm", "-rf", dir+"/tmp/store")
	rm.SysProcAttr = user
	if out, err := rm.CombinedOutput(); err != nil {
		t.Errorf("remove the store: %v\n%s", err, out)
	}
}

func sameLines(t testing.TB, want, got []string) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("- with privileges, + without:\n%s", d)
	}
}

// TestIndexesOfUsers: the merged index of random layers is the same in a store of
// a user as in one of root.
func TestIndexesOfUsers(t *testing.T) {
	needRoot(t)
	for seed := *indexSeed; seed < *indexSeed+*indexSeeds; seed++ {
		r := rand.New(rand.NewPCG(seed, 1))
		var ls [][]byte
		for range 1 + r.IntN(5) {
			ls = append(ls, randomLayer(t, r))
		}
		a, b := openStore(t), userStore(t)
		if d := cmp.Diff(chainLines(t, a, loadLayers(t, a, ls...)), chainLines(t, b, loadLayers(t, b, ls...))); d != "" {
			t.Fatalf("seed %d: - with privileges, + without:\n%s", seed, d)
		}
		clean(t, b)
	}
}

// TestDefaultACLAboveTheStore: what a directory hands down to the store becomes no part of
// an image or container.
func TestDefaultACLAboveTheStore(t *testing.T) {
	dir := t.TempDir()
	const attr = "system.posix_acl_default"
	acl := []byte(posixACL)
	acl[6] = 7 // whoever owns a directory enters it
	if err := unix.Setxattr(dir, attr, acl, 0); err != nil {
		t.Skipf("no ACLs here: %v", err)
	}
	s := openAt(t, filepath.Join(dir, "store"))
	st := loadLayers(t, s, layerTar(t, file("f", "1"), ent{name: "d/", typ: tar.TypeDir, mode: 0o755}))
	for _, p := range []string{"", "d", "f"} {
		p = filepath.Join(st.Lowers[0].Path, p)
		for _, attr := range []string{attr, "system.posix_acl_access"} {
			if n, err := unix.Lgetxattr(p, attr, nil); !errors.Is(err, unix.ENODATA) {
				t.Errorf("%s: %s has %d bytes, %v", p, attr, n, err)
			}
		}
	}
}
