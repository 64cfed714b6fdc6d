package layers

import (
	"archive/tar"
	"bytes"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/metadata/chainindex"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/override"
)

var (
	indexSeed  = flag.Uint64("index.seed", 1, "first seed of TestIndexes")
	indexSeeds = flag.Uint64("index.seeds", 15, "number of seeds of TestIndexes")
)

// capability is a value of security.capability: CAP_NET_BIND_SERVICE and another one.
const capability = "\x01\x00\x00\x02\x00\x24\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// TestIndexes loads random stacks and compares the index of each layer with
// what the kernel says about its directory, and the index of the chain with the
// union of the directories.
func TestIndexes(t *testing.T) {
	for seed := *indexSeed; seed < *indexSeed+*indexSeeds; seed++ {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			s := openStore(t)
			var ls [][]byte
			for range 1 + r.IntN(5) {
				ls = append(ls, randomLayer(t, r))
			}
			load(t, s, outerTar(t, oldDocker(t, img{refs: []string{"i"}, layers: ls})))
			image, err := s.ImageStack(t.Context(), "i")
			must(t, err)
			create(t, s, "i", "c") // with an init layer
			stacks := []Stack{image, upperOf(t, s, "c")}
			for _, st := range stacks {
				for _, d := range st.Lowers {
					sameAsDirectory(t, s, d)
				}
				sameAsUnion(t, s, st)
			}
			clean(t, s)
			// Once more with indexes made from the directories.
			_, err = s.DropChains(t.Context())
			must(t, err)
			for _, st := range stacks {
				for _, d := range st.Lowers {
					must(t, os.RemoveAll(indexPath(s, d)))
					x, err := s.layerIndex(t.Context(), d)
					must(t, err)
					must(t, x.Close())
					sameAsDirectory(t, s, d)
				}
				sameAsUnion(t, s, st)
			}
			clean(t, s)
		})
	}
}

// TestIndexesUnprivileged is TestIndexes, and the test of what such a layer
// loses, as an ordinary user.
func TestIndexesUnprivileged(t *testing.T) {
	if !openStore(t).powers.privileged {
		t.Skip("needs root to become somebody else; as an ordinary user all other tests run like that")
	}
	exe, dir := testBinary(t)
	c := exec.Command(exe, "-test.run=^(TestIndexes|TestIndexedOwners|TestUnprivileged)$", "-test.v", fmt.Sprintf("-index.seeds=%d", *indexSeeds))
	c.Dir = dir
	c.Env = append(os.Environ(), "TMPDIR="+dir+"/tmp", "HOME="+dir+"/tmp")
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := c.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: TestUnprivileged")) {
		t.Fatalf("%v\n%s", err, out)
	}
}

// testBinary copies the test binary to where others can run it, beside a directory
// tmp that they can write.
func testBinary(t testing.TB) (exe, dir string) {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	raw, err := os.ReadFile(self)
	must(t, err)
	dir = t.TempDir()
	must(t, os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755), os.WriteFile(dir+"/test", raw, 0o755), os.Mkdir(dir+"/tmp", 0o777), os.Chmod(dir+"/tmp", 0o777))
	return dir + "/test", dir
}

// TestIndexedOwners: the indexes of a store without privileges have what the tar
// says.
func TestIndexedOwners(t *testing.T) {
	s := userStore(t)
	st := loadLayers(t, s, layerTar(t, ent{name: "closed/", typ: tar.TypeDir, mode: 0o20, uid: 7}, ent{name: "closed/f", data: "1", uid: 8},
		ent{name: "suid", data: "2", mode: 0o4755, uid: 33, gid: 34}, hard("closed/link", "suid"), ent{name: "null", typ: tar.TypeChar, mode: 0o666, maj: 1, min: 3},
		ent{name: "pipe", typ: tar.TypeFifo, mode: 0o622, gid: 5},
		ent{name: "sym", typ: tar.TypeSymlink, link: "x", mode: 0o777, uid: 9, gid: 10, x: map[string]string{"trusted.l": "3"}},
		ent{name: "x", mode: 0o644, x: map[string]string{"trusted.t": "1", "user.u": "2", "security.capability": capability}}))
	want := map[string]string{
		"": "40755 0:0", "closed": "40020 7:0", "closed/f": "100000 8:0", "suid": "104755 33:34", "closed/link": "104755 33:34",
		"null": "20666 0:0 103", "pipe": "10622 0:5", "sym": "120777 9:10 trusted.l=3",
		"x": "100644 0:0 security.capability=" + capability + " trusted.t=1 user.u=2",
	}
	check := func(x *chainindex.Index, err error) {
		t.Helper()
		must(t, err)
		defer x.Close()
		for path, want := range want {
			o := objectAt(t, x, path)
			got := fmt.Sprintf("%o %d:%d", o.Mode, o.UID, o.GID)
			if o.Rdev != 0 {
				got += fmt.Sprintf(" %x", o.Rdev)
			}
			for _, a := range o.Xattrs {
				got += fmt.Sprintf(" %s=%s", a.Name, a.Value)
			}
			if got != want {
				t.Errorf("%q: %q, expected %q", path, got, want)
			}
			if has, err := x.HasXattrs(slotAt(t, x, path)); err != nil || has != (len(o.Xattrs) > 0) {
				t.Errorf("%q: has attributes: %v, %v", path, has, err)
			}
		}
	}
	for range 2 {
		check(s.layerIndex(t.Context(), st.Lowers[0]))
		path, _, err := s.ChainIndex(t.Context(), st)
		must(t, err)
		check(chainindex.Open(path))
		clean(t, s)
		// Once more with indexes made from the directory.
		must(t, os.Remove(indexPath(s, st.Lowers[0])), os.Remove(path))
	}
}

func indexPath(s *Store, d LayerDir) string {
	return filepath.Join(s.root, layersName, d.CacheID, indexName)
}

// randomLayer makes a layer with few names, so that layers meet.
func randomLayer(t testing.TB, r *rand.Rand) []byte {
	var ents []ent
	kinds := map[string]byte{"": 'd'} // what the layer has so far
	place := func(path string, kind byte) bool {
		dirs := strings.Split(path, "/")
		for i := 1; i < len(dirs); i++ {
			if k := kinds[strings.Join(dirs[:i], "/")]; k != 0 && k != 'd' {
				return false
			}
		}
		if kinds[path] != 0 {
			return false
		}
		for i := 1; i < len(dirs); i++ {
			kinds[strings.Join(dirs[:i], "/")] = 'd'
		}
		kinds[path] = kind
		return true
	}
	path := func() string {
		var p []string
		for range r.IntN(4) {
			p = append(p, []string{"a", "b", "a-name-of-more-than-16-bytes"}[r.IntN(3)])
		}
		return strings.Join(append(p, []string{"a", "b", "f", "g", "a-file-of-more-than-16-bytes"}[r.IntN(5)]), "/")
	}
	with := func(e ent) ent {
		e.mode, e.uid, e.gid = int64(r.IntN(0o10000)), r.IntN(3), r.IntN(3)*1000
		e.time = epoch.Add(time.Duration(r.IntN(1000000)) * time.Millisecond)
		if r.IntN(4) == 0 {
			e.x = map[string]string{"user.one": "1", "user.overlay.x": "escaped", "trusted.overlay.y": "escaped"}
			if e.typ == tar.TypeSymlink || e.typ == tar.TypeFifo || e.typ == tar.TypeChar {
				e.x = map[string]string{"trusted.two": "2"}
			} else if e.typ == 0 && r.IntN(2) == 0 {
				e.x["security.capability"] = capability
			}
		}
		return e
	}
	var files []string
	for range 30 {
		p := path()
		switch k := r.IntN(14); {
		case k < 4 && place(p, 'f'):
			ents = append(ents, with(ent{name: p, data: strings.Repeat("x", r.IntN(9000))}))
			files = append(files, p)
		case k < 7 && place(p, 'd'):
			ents = append(ents, with(ent{name: p + "/", typ: tar.TypeDir}))
		case k < 8 && place(p, 'l'):
			ents = append(ents, with(ent{name: p, typ: tar.TypeSymlink, link: "somewhere/else"}))
			files = append(files, p)
		case k < 9 && len(files) > 0 && place(p, 'h'):
			ents = append(ents, hard(p, files[r.IntN(len(files))]))
		case k < 10 && place(p, 'n'):
			ents = append(ents, with(ent{name: p, typ: tar.TypeFifo}))
		case k < 11 && place(p, 'n'):
			ents = append(ents, with(ent{name: p, typ: tar.TypeChar, maj: 1, min: 3}))
		case k < 13 && place(p, 'w'):
			ents = append(ents, wh(p))
		case place(p, 'd'):
			ents = append(ents, with(ent{name: p + "/", typ: tar.TypeDir}), opq(p))
		}
	}
	return layerTar(t, ents...)
}

func objectAt(t testing.TB, x *chainindex.Index, path string) *chainindex.Object {
	t.Helper()
	o, err := x.Object(slotAt(t, x, path))
	must(t, err)
	return o
}

func slotAt(t testing.TB, x *chainindex.Index, path string) chainindex.Slot {
	t.Helper()
	slot := chainindex.Root
	for name := range strings.SplitSeq(path, "/") {
		if name == "" {
			continue
		}
		e, ok, err := x.Lookup(slot, name)
		if err != nil || !ok {
			t.Fatalf("look up %q of %q: %v %v", name, path, ok, err)
		}
		slot = e.Slot
	}
	return slot
}

// shown is what an index, or the disk, says about an object.
type shown struct {
	Stat   chainindex.Inode
	Target string
	Xattrs string
}

// onDisk asks the kernel. Of symbolic links of a store without privileges it does
// not know the owner.
func onDisk(t testing.TB, path string, d LayerDir) (out shown) {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	if d.Override != override.None {
		value := make([]byte, 100)
		if n, err := unix.Lgetxattr(path, d.Override.Attr(), value); err == nil {
			is, err := override.Parse(value[:n])
			must(t, err)
			is.Apply(&st)
		} else {
			st.Uid, st.Gid = 0, 0
		}
	}
	out.Stat = inodeOf(&st)
	out.Stat.Atime = chainindex.Time{} // we change it by looking
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		to, err := os.Readlink(path)
		must(t, err)
		out.Target = to
	}
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(path, buf)
	must(t, err)
	names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	all := map[string]string{}
	for _, disk := range names {
		user, visible := d.Override.FromDisk(disk)
		if visible {
			user, visible = d.Dialect.FromDisk(user)
		}
		if disk == "" || !visible {
			continue
		}
		v := make([]byte, 4096)
		n, err := unix.Lgetxattr(path, disk, v)
		must(t, err)
		all[user] = string(v[:n])
	}
	for _, user := range sortedNames(all) {
		out.Xattrs += fmt.Sprintf("%s=%q ", user, all[user])
	}
	return out
}

func inIndex(t testing.TB, x *chainindex.Index, s chainindex.Slot, d LayerDir) (out shown) {
	t.Helper()
	o, err := x.Object(s)
	must(t, err)
	out.Stat, out.Target = o.Inode, o.Target
	out.Stat.Flags, out.Stat.Origin, out.Stat.Layer, out.Stat.Atime = 0, 0, 0, chainindex.Time{}
	for _, a := range o.Xattrs {
		out.Xattrs += fmt.Sprintf("%s=%q ", a.Name, a.Value)
	}
	if o.Type() == unix.DT_LNK && d.Override != override.None { // see onDisk
		out.Stat.UID, out.Stat.GID, out.Xattrs = 0, 0, ""
	}
	return out
}

// sameAsDirectory compares the index of a layer with its directory.
func sameAsDirectory(t testing.TB, s *Store, d LayerDir) {
	t.Helper()
	x, err := chainindex.Open(indexPath(s, d))
	must(t, err)
	defer x.Close()
	must(t, x.Verify())
	slots := map[uint64]chainindex.Slot{}
	var walk func(slot chainindex.Slot, path string)
	walk = func(slot chainindex.Slot, path string) {
		got, want := inIndex(t, x, slot, d), onDisk(t, path, d)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-disk +index):\n%s", path, diff)
		}
		if old := slots[want.Stat.Ino]; old != 0 && old != slot {
			t.Errorf("%s: inode %d has slots %d and %d", path, want.Stat.Ino, old, slot)
		}
		slots[want.Stat.Ino] = slot
		var buf chainindex.DirBuf
		if x.ReadDir(slot, 0, math.MaxInt, &buf) != nil {
			return
		}
		names, err := os.ReadDir(path)
		must(t, err)
		if len(names) != len(buf.Entries) {
			t.Fatalf("%s has %d names, the index %d", path, len(names), len(buf.Entries))
		}
		for i, e := range buf.Entries {
			p := filepath.Join(path, string(e.Name))
			var st unix.Stat_t
			must(t, unix.Lstat(p, &st))
			if string(e.Name) != names[i].Name() || e.Whiteout != whiteout.IsDevice(st.Mode, st.Rdev) {
				t.Fatalf("%s: %+v, the disk has %v", p, e, names[i])
			}
			if e.Slot != 0 {
				walk(e.Slot, p)
			}
		}
	}
	walk(chainindex.Root, d.Path)
}

// sameAsUnion compares the index of a stack with a view of its directories.
func sameAsUnion(t testing.TB, s *Store, st Stack) {
	t.Helper()
	path, id, err := s.ChainIndex(t.Context(), st)
	must(t, err)
	x, err := chainindex.Open(path)
	must(t, err)
	defer x.Close()
	must(t, x.Verify())
	if x.Kind() != chainindex.KindChain || x.ID() != id || x.Layers() != len(st.Lowers) {
		t.Fatalf("%v %s of %d layers", x.Kind(), x.ID(), x.Layers())
	}
	v, err := openView(t.Context(), st.Lowers)
	must(t, err)
	defer v.Close()
	type place struct {
		layer int
		ino   uint64
	}
	slots := map[place]chainindex.Slot{}
	var walk func(n *vnode, slot chainindex.Slot)
	walk = func(n *vnode, slot chainindex.Slot) {
		d := st.Lowers[n.layer]
		want := onDisk(t, filepath.Join(d.Path, n.at), d)
		o, err := x.Object(slot)
		must(t, err)
		content, err := x.ContentPath(slot)
		must(t, err)
		if int(o.Layer) != n.layer || (o.Flags&chainindex.FlagMerged != 0) != (len(n.parts) > 1) {
			t.Errorf("%q: layer %d, flags %d; expected layer %d of %d", n.path, o.Layer, o.Flags, n.layer, len(n.parts))
		}
		if n.isDir() {
			low := n.parts[len(n.parts)-1]
			want.Stat.Ino = onDisk(t, filepath.Join(st.Lowers[low.layer].Path, low.path), d).Stat.Ino
		} else {
			if c := onDisk(t, filepath.Join(d.Path, content), d); c.Stat.Ino != want.Stat.Ino {
				t.Errorf("%q: its content is said to be at %q", n.path, content)
			}
			k := place{n.layer, want.Stat.Ino}
			if old := slots[k]; old != 0 && old != slot {
				t.Errorf("%q: inode %d has slots %d and %d", n.path, want.Stat.Ino, old, slot)
			}
			slots[k] = slot
		}
		if diff := cmp.Diff(want, inIndex(t, x, slot, d)); diff != "" {
			t.Errorf("%q (-disk +index):\n%s", n.path, diff)
		}
		if !n.isDir() {
			return
		}
		list, err := v.list(n)
		must(t, err)
		var buf chainindex.DirBuf
		must(t, x.ReadDir(slot, 0, math.MaxInt, &buf))
		if len(list) != len(buf.Entries) {
			t.Fatalf("%q has %d names, the index %d", n.path, len(list), len(buf.Entries))
		}
		for i, c := range list {
			if string(buf.Entries[i].Name) != c.name {
				t.Fatalf("%q: %q, the index has %q", n.path, c.name, buf.Entries[i].Name)
			}
			walk(c, buf.Entries[i].Slot)
		}
	}
	root, err := v.root()
	must(t, err)
	walk(root, chainindex.Root)
}
