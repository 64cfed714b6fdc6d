package unionfs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata/chainindex"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/merge"
)

// stackGen makes random layers.
type stackGen struct {
	*rand.Rand
	t       testing.TB
	dialect whiteout.Dialect
	layer   string
	files   []string // of this layer so far
}

var stackNames = []string{"a", "b", "c", "d", "e-name-of-more-than-sixteen-bytes", "e-name-of-more-than-sixteen-bytes-too"}

// randomStack makes a few small layers below dir, topmost first.
func randomStack(t testing.TB, seed uint64, d whiteout.Dialect) (lowers []Layer) {
	dir := t.TempDir()
	g := &stackGen{Rand: rand.New(rand.NewPCG(seed, 1)), t: t, dialect: d}
	for i := range 1 + g.IntN(4) {
		g.layer, g.files = filepath.Join(dir, fmt.Sprint("layer", i)), nil
		g.must(os.Mkdir(g.layer, 0o755))
		g.fill(g.layer, 0)
		lowers = append(lowers, Layer{Path: g.layer, Dialect: d})
	}
	return lowers
}

func (g *stackGen) must(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

func (g *stackGen) fill(dir string, depth int) {
	if depth > 0 && g.IntN(6) == 0 {
		if g.dialect == whiteout.AUFS {
			g.must(os.WriteFile(filepath.Join(dir, ".wh..wh..opq"), nil, 0o600))
		} else {
			g.must(unix.Setxattr(dir, g.dialect.Attr("opaque"), []byte("y"), 0))
		}
	}
	for _, name := range stackNames {
		if g.IntN(5) < 2 {
			continue
		}
		path := filepath.Join(dir, name)
		link := false
		switch k := g.IntN(12); {
		case k < 5 && depth < 3:
			g.must(os.Mkdir(path, 0o700))
			if g.dialect == whiteout.AUFS && g.IntN(5) == 0 {
				g.must(os.WriteFile(filepath.Join(dir, ".wh."+name), nil, 0o600))
			}
			g.fill(path, depth+1)
			g.must(os.Chmod(path, []os.FileMode{0o755, 0o700, 0o777 | os.ModeSticky, 0o750 | os.ModeSetgid}[g.IntN(4)]))
		case k < 7:
			content := strings.Repeat(path, []int{0, 1, 200}[g.IntN(3)])
			g.must(os.WriteFile(path, []byte(content), 0o600))
			g.must(os.Chmod(path, []os.FileMode{0o644, 0o400, 0o755 | os.ModeSetuid}[g.IntN(3)]))
			g.files = append(g.files, path)
		case k < 8:
			g.must(os.Symlink(strings.Repeat("x/", 1+g.IntN(20)), path))
			link = true
		case k < 9:
			g.must(unix.Mkfifo(path, 0o640))
		case k < 10 && len(g.files) > 0:
			g.must(os.Link(g.files[g.IntN(len(g.files))], path))
			continue
		default:
			g.whiteout(dir, name)
			continue
		}
		if !link && g.IntN(4) == 0 && g.dialect != whiteout.AUFS {
			// No file system refuses it to root; a fifo has none.
			_ = unix.Setxattr(path, "trusted.x", []byte(name), 0)
		}
		if !link && g.IntN(2) == 0 {
			when := time.Unix(1e9+g.Int64N(1e8), g.Int64N(1e9))
			g.must(os.Chtimes(path, when, when))
		}
		if os.Geteuid() == 0 && g.IntN(3) == 0 {
			g.must(os.Lchown(path, g.IntN(3)*500, g.IntN(3)*700))
		}
	}
}

func (g *stackGen) whiteout(dir, name string) {
	if g.dialect == whiteout.AUFS {
		g.must(os.WriteFile(filepath.Join(dir, ".wh."+name), nil, 0o600))
		return
	}
	g.must(unix.Mknod(filepath.Join(dir, name), unix.S_IFCHR, 0))
}

// buildChain writes the index of a stack to a file.
func buildChain(t testing.TB, lowers []Layer, id string) (path string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	layers, mount, err := openLowers(lowers, &owners{plain: true})
	must(err)
	defer fsat.Close(mount)
	var indexes []*chainindex.Index
	for _, l := range layers {
		w, err := chainindex.NewWriter(chainindex.WriterOptions{Kind: chainindex.KindLayer, ID: l.path, Layers: 1})
		must(err)
		b := &layerIndexer{layer: l, w: w, links: make(map[uint64]chainindex.Slot)}
		must(b.build())
		var buf bytes.Buffer
		_, err = w.WriteTo(&buf)
		must(err)
		x, err := chainindex.New(buf.Bytes())
		must(err)
		indexes = append(indexes, x)
		l.close()
	}
	w, err := chainindex.NewWriter(chainindex.WriterOptions{Kind: chainindex.KindChain, ID: id, Layers: len(layers)})
	must(err)
	defer w.Discard()
	must(chainindex.Merge(w, indexes, chainindex.MergeOptions{Rule: mergeRule}))
	for _, x := range indexes {
		must(x.Close())
	}
	path = filepath.Join(t.TempDir(), "chain.idx")
	must(w.Commit(path))
	return path
}

// layerIndexer writes the index of one layer.
type layerIndexer struct {
	layer *layer
	w     *chainindex.Writer
	links map[uint64]chainindex.Slot
}

type indexedPath struct {
	path    string
	slot    chainindex.Slot
	entries []layerEntry
}

func (b *layerIndexer) build() error {
	o, entries, err := b.object(b.layer.root, "")
	if err != nil {
		return err
	}
	if err := b.w.SetRoot(o); err != nil {
		return err
	}
	for todo := []indexedPath{{"", chainindex.Root, entries}}; len(todo) > 0; todo = todo[1:] {
		more, err := b.dir(todo[0])
		if err != nil {
			return err
		}
		todo = append(todo, more...)
	}
	return nil
}

func (b *layerIndexer) dir(d indexedPath) (more []indexedPath, err error) {
	fd, err := fsat.OpenBeneath(b.layer.root, "./"+d.path, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer fsat.Close(fd)
	slices.SortFunc(d.entries, func(a, b layerEntry) int { return strings.Compare(a.name, b.name) })
	for _, e := range d.entries {
		c := chainindex.Child{Name: e.name, Whiteout: e.whiteout}
		var entries []layerEntry
		linked := uint64(0)
		if e.object {
			if c.Object, entries, err = b.object(fd, e.name); err != nil {
				return nil, err
			}
			if !c.Object.IsDir() && c.Object.Nlink > 1 {
				linked = c.Object.Ino
			}
		}
		if slot := b.links[linked]; slot != 0 {
			c.Object, c.Link = nil, slot
		}
		slot, err := b.w.Add(d.slot, c)
		if err != nil {
			return nil, err
		}
		if linked != 0 {
			b.links[linked] = slot
		}
		if c.Object != nil && c.Object.IsDir() {
			more = append(more, indexedPath{filepath.Join(d.path, e.name), slot, entries})
		}
	}
	return more, nil
}

func (b *layerIndexer) object(dirfd int, name string) (*chainindex.Object, []layerEntry, error) {
	var st unix.Stat_t
	if err := fsat.Stat(dirfd, name, &st); err != nil {
		return nil, nil, err
	}
	ts := func(t unix.Timespec) chainindex.Time { return chainindex.Time{Sec: t.Sec, Nsec: uint32(t.Nsec)} }
	o := &chainindex.Object{Inode: chainindex.Inode{
		Mode: st.Mode, UID: st.Uid, GID: st.Gid, Nlink: uint32(st.Nlink), Size: uint64(st.Size), Ino: st.Ino, Blocks: uint64(st.Blocks),
		Mtime: ts(st.Mtim), Ctime: ts(st.Ctim), Atime: ts(st.Atim),
	}}
	attrs, err := shownXattrs(dirfd, name, b.layer.dialect)
	if err != nil {
		return nil, nil, err
	}
	for n, v := range attrs {
		o.Xattrs = append(o.Xattrs, chainindex.Xattr{Name: n, Value: []byte(v)})
	}
	var entries []layerEntry
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		o.Target, err = fsat.Readlink(dirfd, name)
	case unix.S_IFDIR:
		fd := dirfd
		if name != "" {
			if fd, err = fsat.OpenName(dirfd, name, unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
				return nil, nil, err
			}
			defer fsat.Close(fd)
		}
		var opaque bool
		if entries, opaque, err = b.layer.readDirAt(fd, nil); opaque {
			o.Flags |= chainindex.FlagOpaque
		}
	}
	return o, entries, err
}

// shownXattrs reads the extended attributes of an object by the names that a mount
// shows.
func shownXattrs(dirfd int, name string, d whiteout.Dialect) (map[string]string, error) {
	disk, err := fsat.Listxattr(dirfd, name)
	if err != nil {
		return nil, err
	}
	out := make(map[string]string)
	for _, n := range disk {
		if shown, ok := d.FromDisk(n); ok {
			v, err := fsat.GetxattrValue(dirfd, name, n)
			if err != nil {
				return nil, err
			}
			out[shown] = string(v)
		}
	}
	return out, nil
}

// mergeRule is package merge as an index wants it.
func mergeRule(dirs []chainindex.LayerDir) (out []chainindex.MergedEntry, err error) {
	listings := make([]merge.Listing, len(dirs))
	at := make([][]int, len(dirs)) // from entries of listings to those of dirs
	for i, d := range dirs {
		add := func(j int, kind merge.Kind) {
			listings[i].Entries = append(listings[i].Entries, merge.Entry{Name: d.Entries[j].Name, Kind: kind})
			at[i] = append(at[i], j)
		}
		listings[i].Opaque = d.Opaque
		for j, e := range d.Entries {
			switch {
			case e.Slot != 0 && e.Type == unix.DT_DIR:
				add(j, merge.Dir)
			case e.Slot != 0:
				add(j, merge.Other)
			}
			if e.Whiteout {
				add(j, merge.Whiteout)
			}
		}
	}
	for _, m := range merge.Merge(listings) {
		e := chainindex.MergedEntry{Name: m.Name}
		for _, r := range m.Refs {
			e.Refs = append(e.Refs, chainindex.LayerRef{Dir: int(r.Listing), Entry: at[r.Listing][r.Entry]})
		}
		out = append(out, e)
	}
	return out, nil
}

// saying is everything that a tree says, by path and question. An answer that is an
// error is an error here as well.
type saying map[string]any

// ask walks a whole tree.
func ask(tree lowerTree) saying {
	s := make(saying)
	s.object(tree, "", tree.root())
	return s
}

func (s saying) object(tree lowerTree, path string, o lowerObj) {
	say := func(what string, v any, err error) {
		if err != nil {
			v = err
		}
		s[path+"/ "+what] = v
	}
	facts, err := tree.admit(o)
	say("ino", facts.ino, err)
	say("links", facts.links, err)
	say("type", o.typ(), nil)
	say("listed ino", o.ino(), nil)
	var st unix.Stat_t
	err = tree.stat(o, &st)
	say("attributes", fmt.Sprintf("%o %d:%d nlink=%d size=%d blocks=%d blksize=%d rdev=%d mtime=%d.%d ctime=%d.%d",
		st.Mode, st.Uid, st.Gid, st.Nlink, st.Size, st.Blocks, st.Blksize, st.Rdev, st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec), err)
	if err == nil && facts.whole && (facts.st.Mode != st.Mode || facts.st.Uid != st.Uid || facts.st.Size != st.Size || facts.st.Mtim != st.Mtim) {
		say("attributes at first", facts.st, nil)
	}
	if err == nil {
		say("merged", o.typ() == unix.DT_DIR && tree.merged(o), nil)
		say("layer", tree.layer(o).index, nil)
	}
	var attrs map[string]string
	err = tree.with(o, func(dirfd int, name string) (e error) {
		attrs, e = shownXattrs(dirfd, name, tree.layer(o).dialect)
		return e
	})
	say("attributes, extended", fmt.Sprint(attrs), err)
	if err == nil && tree.bare(o) && len(attrs) > 0 {
		say("bare", attrs, nil)
	}
	switch o.typ() {
	case unix.DT_LNK:
		target := ""
		err := tree.with(o, func(dirfd int, name string) (e error) { target, e = fsat.Readlink(dirfd, name); return e })
		say("target", target, err)
	case unix.DT_REG:
		data, err := readLower(tree, o)
		say("content", data, err)
	case unix.DT_DIR:
		list, err := tree.list(o)
		if err != nil {
			say("listing", nil, err)
			return
		}
		var names []string
		for i := range list.length() {
			name, c := list.at(i)
			names = append(names, name)
			s.object(tree, path+"/"+name, c)
			found, err := tree.lookup(path + "/" + name)
			say("finds "+name, err == nil && found.slot() == c.slot(), err)
			if pos, ok := list.find(name); !ok || pos != i {
				say("finds "+name, pos, nil)
			}
		}
		say("listing", names, nil)
	}
}

func readLower(tree lowerTree, o lowerObj) (string, error) {
	fd, err := tree.open(o)
	if err != nil {
		return "", err
	}
	f := os.NewFile(uintptr(fd), "lower")
	defer f.Close()
	data, err := io.ReadAll(f)
	return string(data), err
}

// chainDialects are those that layers for tests can be written in here.
func chainDialects() []whiteout.Dialect {
	if os.Geteuid() != 0 {
		return []whiteout.Dialect{whiteout.AUFS}
	}
	return []whiteout.Dialect{whiteout.AUFS, whiteout.Overlay}
}

// TestIndexAndDirectoriesAgree: what the index of a stack says is what the directories
// say.
func TestIndexAndDirectoriesAgree(t *testing.T) {
	for _, d := range chainDialects() {
		for seed := range uint64(25) {
			t.Run(fmt.Sprintf("%v/%d", d, seed), func(t *testing.T) {
				lowers := randomStack(t, seed, d)
				chain := buildChain(t, lowers, "the id")
				var said [3]saying
				for i := range said {
					layers, mount, err := openLowers(lowers, &owners{plain: true})
					if err != nil {
						t.Fatal(err)
					}
					var tree lowerTree
					fds, inos := newFdCache(16), newInoMap()
					if i == 0 {
						tree, err = newScan(layers, fds, inos, indirection{})
					} else {
						tree, err = newIndexed(chain, "the id", layers, fds, inos, i == 1)
					}
					if err != nil {
						t.Fatal(err)
					}
					said[i] = ask(tree)
					tree.close()
					fds.closeAll()
					fsat.Close(mount)
				}
				for i, attrs := range []string{"the index", "the files"} {
					if d := cmp.Diff(map[string]any(said[0]), map[string]any(said[i+1])); d != "" {
						t.Errorf("attributes of %s (-directories +index):\n%s", attrs, d)
					}
				}
			})
		}
	}
}

// TestDamagedIndex: a union whose index is damaged reads the directories, or answers
// EIO; it never shows anything else.
func TestDamagedIndex(t *testing.T) {
	dir := t.TempDir()
	for i := range 700 { // several blocks of everything
		sub := filepath.Join(dir, fmt.Sprintf("directory with a long name %02d", i%30))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(sub, fmt.Sprintf("file with a long name %d", i))
		if err := os.WriteFile(name, []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
		if os.Geteuid() == 0 {
			if err := unix.Setxattr(name, "trusted.x", fmt.Appendf(nil, "value %d", i), 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	unix.Sync() // until then, ext4 does not know how many blocks the files take
	lowers := []Layer{{Path: dir}, {Path: t.TempDir()}}
	chain := buildChain(t, lowers, "the id")
	good, err := os.ReadFile(chain)
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Lowers: lowers, Chain: chain, ChainID: "the id"}
	if _, indexed := damagedSays(t, o, nil); !indexed {
		t.Fatal("the good index is not used")
	}
	truth, _ := damagedSays(t, Options{Lowers: lowers}, nil)

	u64 := func(at int) int { return int(binary.LittleEndian.Uint64(good[at:])) }
	at := u64(24)
	parts := []struct {
		name       string
		begin, end int
	}{{"header", 0, 128 + len("the id")}, {"checksums", 4096, 4096 + 4*((u64(32)+16<<10-1)/(16<<10))}}
	for i, name := range []string{"inodes", "entries", "strings", "attributes"} {
		size := u64(40 + 8*i)
		switch name {
		case "inodes":
			size *= 128
		case "entries":
			size *= 32
		}
		parts = append(parts, struct {
			name       string
			begin, end int
		}{name, at, at + size})
		at += size
	}
	if at != len(good) {
		t.Fatalf("the sections end at %d, the file at %d", at, len(good))
	}
	used, fallen := 0, 0
	check := func(t *testing.T, data []byte) {
		t.Helper()
		if err := os.WriteFile(chain, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, indexed := damagedSays(t, o, truth); indexed {
			used++
		} else {
			fallen++
		}
	}
	for _, p := range parts {
		if p.begin == p.end {
			continue // no attributes
		}
		t.Run(p.name, func(t *testing.T) {
			for i := range 5 {
				data := bytes.Clone(good)
				data[p.begin+(p.end-1-p.begin)*i/4] ^= 0x10
				check(t, data)
			}
		})
	}
	t.Run("truncated", func(t *testing.T) {
		for i := range 5 {
			check(t, good[:len(good)*i/5])
		}
		check(t, good[:len(good)-1])
		check(t, append(bytes.Clone(good), 0))
	})
	t.Run("of other layers", func(t *testing.T) {
		o.ChainID = "another id"
		check(t, good)
		o.ChainID, o.Lowers = "the id", lowers[:1]
		if _, indexed := damagedSays(t, o, nil); indexed {
			t.Error("the index of two layers serves one")
		}
	})
	t.Logf("%d times the index was used, %d times not", used, fallen)
	if used == 0 || fallen == 0 {
		t.Errorf("%d times the index was used, %d times not; expected both", used, fallen)
	}
}

// damagedSays opens a union and asks its lowers everything; what they say must be true,
// if truth is not nil. byIndex: they have one.
func damagedSays(t *testing.T, o Options, truth saying) (said saying, byIndex bool) {
	t.Helper()
	fs, err := New(o)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	defer func() {
		if err := fs.Close(); err != nil {
			t.Error(err)
		}
	}()
	_, byIndex = fs.lowers.(*indexed)
	said = ask(fs.lowers)
	if truth == nil {
		return said, byIndex
	}
	for what, answer := range said {
		if err, ok := answer.(error); ok {
			if st := fs.status("test", nil, err); !byIndex || st != fuse.EIO {
				t.Errorf("%s: %v (%v)", what, err, st)
			}
		} else if !cmp.Equal(answer, truth[what]) {
			t.Errorf("%s: %v instead of %v", what, answer, truth[what])
		}
	}
	if !byIndex && len(said) != len(truth) {
		t.Errorf("%d answers instead of %d", len(said), len(truth))
	}
	return said, byIndex
}
