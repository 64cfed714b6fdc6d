package unionfs

import (
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata/chainindex"
)

// indexed is the lowerTree of a chain index: names and attributes come from one
// mapped file, however many layers there are, and a layer is touched only where
// content is. Nothing in such layers is elsewhere, and hard links have one slot.
//
// What is read of a directory stays in memory, so that only reading it can find the
// file damaged.
type indexed struct {
	x      *chainindex.Index
	layers []*layer
	fds    *fdCache
	inos   *inoMap
	top    *indexObj
	// attrs: the attributes are those of the index. A user's layers do not have
	// the owners and modes that it tells.
	attrs bool

	mu   sync.Mutex
	dirs map[chainindex.Slot][]*layerDir // guarded by mu
}

// layerDir is a directory as one layer has it.
type layerDir struct {
	layer uint32
	fd    fdSlot
}

// indexObj is one name in a directory that was looked into. Immutable, but for
// listing.
type indexObj struct {
	list  *indexList // that it is in; nil for the root
	inode uint64
	node  chainindex.Slot
	at    uint32 // of the name in list.names
	size  uint8  // of the name
	dtype uint8
}

// indexList is the listing of a directory. Immutable.
type indexList struct {
	names string
	objs  []indexObj
}

func (o *indexObj) slot() uint64 { return uint64(o.node) }
func (o *indexObj) ino() uint64  { return o.inode }
func (o *indexObj) typ() uint8   { return o.dtype }
func (o *indexObj) name() string { return o.list.names[o.at : o.at+uint32(o.size)] }

func (l *indexList) length() int { return len(l.objs) }

func (l *indexList) at(pos int) (string, lowerObj) { return l.objs[pos].name(), &l.objs[pos] }

func (l *indexList) find(name string) (int, bool) {
	pos := sort.Search(len(l.objs), func(i int) bool { return l.objs[i].name() >= name })
	return pos, pos < len(l.objs) && l.objs[pos].name() == name
}

// errIndex says that an index does not belong to these lowers.
var errIndex = errors.New("not the index of these layers")

// newIndexed opens the index file of the layers, topmost first.
func newIndexed(path, id string, layers []*layer, fds *fdCache, inos *inoMap, attrs bool) (t *indexed, err error) {
	x, err := chainindex.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("index %q: %w", path, err), x.Close())
		}
	}()
	if x.Kind() != chainindex.KindChain || x.ID() != id || x.Layers() != len(layers) {
		return nil, fmt.Errorf("%w: it is the %v index of %q with %d layers; expected %q with %d",
			errIndex, x.Kind(), x.ID(), x.Layers(), id, len(layers))
	}
	t = &indexed{x: x, layers: layers, fds: fds, inos: inos, attrs: attrs, dirs: make(map[chainindex.Slot][]*layerDir)}
	var n chainindex.Inode
	if err := x.Inode(chainindex.Root, &n); err != nil {
		return nil, err
	}
	t.top = &indexObj{inode: t.shown(&n), node: chainindex.Root, dtype: unix.DT_DIR}
	return t, nil
}

func (t *indexed) close() { _ = t.x.Close() } // a mapping that was only read

func (t *indexed) root() lowerObj { return t.top }

// shown is the inode number to show. All layers of a store are on one file system.
func (t *indexed) shown(n *chainindex.Inode) uint64 {
	return t.inos.shown(t.layers[min(int(n.Layer), len(t.layers)-1)].dev, n.Ino)
}

func (t *indexed) list(dir lowerObj) (lowerList, error) {
	const all = 1 << 30
	var buf chainindex.DirBuf
	if err := t.x.ReadDir(dir.(*indexObj).node, 0, all, &buf); err != nil {
		return nil, err
	}
	l := &indexList{objs: make([]indexObj, len(buf.Entries))}
	var names strings.Builder
	var n chainindex.Inode
	for i, e := range buf.Entries {
		if err := t.x.Inode(e.Slot, &n); err != nil {
			return nil, err
		}
		l.objs[i] = indexObj{
			list: l, inode: t.shown(&n), node: e.Slot, at: uint32(names.Len()), size: uint8(len(e.Name)), dtype: e.Type,
		}
		names.Write(e.Name)
	}
	l.names = names.String()
	return l, nil
}

// forget implements lowerTree.
func (t *indexed) forget(dir lowerObj) {
	slot := dir.(*indexObj).node
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, d := range t.dirs[slot] {
		t.fds.drop(&d.fd)
	}
	delete(t.dirs, slot)
}

// admit implements lowerTree.
func (t *indexed) admit(obj lowerObj) (f lowerFacts, err error) {
	o := obj.(*indexObj)
	if o.list == nil {
		return lowerFacts{ino: o.inode}, nil
	}
	var n chainindex.Inode
	if err := t.x.Inode(o.node, &n); err != nil {
		return f, err
	}
	f.id = realID{t.layers[n.Layer].dev, n.Ino}
	f.ino = t.shown(&n)
	if !n.IsDir() {
		f.links = n.Nlink
	}
	if f.whole = t.attrs; f.whole {
		t.fill(&n, &f.st)
	}
	return f, nil
}

// fill turns what the index says into what stat(2) of the object says.
func (t *indexed) fill(n *chainindex.Inode, st *unix.Stat_t) {
	l := t.layers[n.Layer]
	ts := func(t chainindex.Time) unix.Timespec { return unix.Timespec{Sec: t.Sec, Nsec: int64(t.Nsec)} }
	*st = unix.Stat_t{
		Dev: l.dev, Ino: n.Ino, Mode: n.Mode, Uid: n.UID, Gid: n.GID, Rdev: n.Rdev, Size: int64(n.Size),
		Blocks: int64(n.Blocks), Atim: ts(n.Atime), Mtim: ts(n.Mtime), Ctim: ts(n.Ctime),
	}
	fsat.SetCounts(st, n.Nlink, l.blksize)
}

func (t *indexed) stat(obj lowerObj, st *unix.Stat_t) error {
	if !t.attrs {
		return t.with(obj, func(dirfd int, name string) error {
			if err := fsat.Stat(dirfd, name, st); err != nil {
				return err
			}
			return t.layer(obj).describe(dirfd, name, st)
		})
	}
	var n chainindex.Inode
	if err := t.x.Inode(obj.(*indexObj).node, &n); err != nil {
		return err
	}
	t.fill(&n, st)
	return nil
}

// with implements lowerTree. The content of an object lies in the layer that the
// index names, mostly at the object's own path.
func (t *indexed) with(obj lowerObj, fn func(dirfd int, name string) error) error {
	o := obj.(*indexObj)
	var n chainindex.Inode
	if err := t.x.Inode(o.node, &n); err != nil {
		return err
	}
	root := t.layers[n.Layer].root
	if o.node == chainindex.Root {
		return fn(root, "")
	}
	path, elsewhere, err := t.x.Content(o.node)
	if err != nil {
		return err
	}
	dir, name := "", path
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		dir, name = path[:i], path[i+1:]
	}
	if dir == "" {
		return fn(root, name)
	}
	if elsewhere { // not in what is kept for the directory that it shows in
		fd, err := fsat.OpenBeneath(root, dir, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer fsat.Close(fd)
		return fn(fd, name)
	}
	parent, err := t.x.Parent(o.node)
	if err != nil {
		return err
	}
	h, err := t.dirFd(n.Layer, parent, dir)
	if err != nil {
		return err
	}
	defer h.release()
	return fn(h.fd, name)
}

// dirFd returns a descriptor of the directory with the given slot, which is at path in
// the layer.
func (t *indexed) dirFd(layer uint32, slot chainindex.Slot, path string) (*fdHandle, error) {
	t.mu.Lock()
	i := slices.IndexFunc(t.dirs[slot], func(d *layerDir) bool { return d.layer == layer })
	if i < 0 {
		i = len(t.dirs[slot])
		t.dirs[slot] = append(t.dirs[slot], &layerDir{layer: layer})
	}
	d := t.dirs[slot][i]
	t.mu.Unlock()
	return t.fds.get(&d.fd, false, func() (int, error) {
		return fsat.OpenBeneath(t.layers[layer].root, path, unix.O_PATH|unix.O_DIRECTORY)
	})
}

func (t *indexed) open(obj lowerObj) (int, error) { return openIn(t, obj) }

func (t *indexed) layer(obj lowerObj) *layer {
	var n chainindex.Inode
	if t.x.Inode(obj.(*indexObj).node, &n) != nil {
		return t.layers[0] // they are all of one kind
	}
	return t.layers[n.Layer]
}

func (t *indexed) merged(obj lowerObj) bool {
	var n chainindex.Inode
	err := t.x.Inode(obj.(*indexObj).node, &n)
	return err == nil && n.Flags&chainindex.FlagMerged != 0
}

func (t *indexed) dataElsewhere(lowerObj) bool { return false }

func (t *indexed) bare(obj lowerObj) bool {
	has, err := t.x.HasXattrs(obj.(*indexObj).node)
	return err == nil && !has && t.attrs
}

func (t *indexed) sharesSlots() bool { return true }

func (t *indexed) walked(lowerObj) {}

func (t *indexed) step() {}

func (t *indexed) hasWork() bool { return false }

func (t *indexed) lookup(path string) (lowerObj, error) { return lookupIn(t, path) }

func (t *indexed) path(obj lowerObj) string {
	p, err := t.x.Path(obj.(*indexObj).node)
	if err != nil {
		return ""
	}
	return "/" + p
}

func (t *indexed) origin(obj lowerObj) ([]byte, error) { return originIn(t, obj) }

func (t *indexed) byOrigin(origin []byte) (lowerFacts, bool) {
	return byOriginIn(t.layers, t.inos, origin)
}
