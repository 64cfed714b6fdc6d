package unionfs

import (
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/merge"
)

// scan is the lowerTree of live directories. A directory is read once, in every
// layer that has it, when somebody first looks for a name in it; the merged
// listing stays in memory.
type scan struct {
	layers   []*layer
	fds      *fdCache
	inos     *inoMap
	rules    indirection
	top      *scanObj
	nextSlot atomic.Uint64
	traps    []realID // directories that must not be looked into
	ahead    *prefetcher

	indirect sync.Map               // *scanObj -> *elsewhere
	subs     []atomic.Pointer[scan] // subs[i] is the tree of layers[i:], made on demand
}

// scanDir is one real directory of one layer.
type scanDir struct {
	layer  *layer
	path   string   // relative to the layer's root
	up     *scanDir // that it lies in; nil: its layer's root, or elsewhere
	fd     fdSlot
	mark   whiteout.DirMark // if marked says that it has been read
	marked bool
}

// scanObj is one object of the merged tree. There is one for every name in
// every directory that was looked into, so it is small. Immutable but for state.
type scanObj struct {
	list    *scanList     // that it is in; nil for the root
	dIno    uint64        // as the directory says; admit knows better
	dir     *scanSub      // of a directory
	pos     uint32        // in list.objs
	nameAt  uint32        // in list.names
	state   atomic.Uint32 // unexamined, direct, indirect or bare
	top     uint16        // index in list.dirs of the layer that serves it
	nameLen uint8
	dtype   uint8
}

// scanSub is what a scanObj has in addition that is a directory.
type scanSub struct {
	below []uint16 // further layers merged with it; immutable
	// marks are what its parts say about themselves, the topmost first; nothing is
	// known of the last, nor if there is one only. Immutable.
	marks   []whiteout.DirMark
	reading sync.Mutex // held while listing is made
	listing atomic.Pointer[scanList]
	listed  atomic.Bool // somebody has read it as a whole
}

// scanList is the merged listing of one directory. Immutable once published.
type scanList struct {
	of    *scanObj
	dirs  []*scanDir // the real directories, topmost first
	first uint64     // slot of objs[0]
	names string     // of all objs, one behind the other
	objs  []scanObj  // sorted by name
}

func (o *scanObj) name() string {
	if o.list == nil {
		return ""
	}
	return o.list.names[o.nameAt : o.nameAt+uint32(o.nameLen)]
}

func (o *scanObj) slot() uint64 {
	if o.list == nil {
		return rootSlot
	}
	return o.list.first + uint64(o.pos)
}

func (o *scanObj) ino() uint64 { return o.dIno }
func (o *scanObj) typ() uint8  { return o.dtype }

// below returns the further layers that are merged with a directory.
func (o *scanObj) below() []uint16 {
	if o.dir == nil {
		return nil
	}
	return o.dir.below
}

func (l *scanList) length() int { return len(l.objs) }

func (l *scanList) at(pos int) (string, lowerObj) { return l.objs[pos].name(), &l.objs[pos] }

func (l *scanList) find(name string) (int, bool) {
	pos := sort.Search(len(l.objs), func(i int) bool { return l.objs[i].name() >= name })
	return pos, pos < len(l.objs) && l.objs[pos].name() == name
}

const rootSlot = 1

// newScan makes a tree of the layers, topmost first. It reads nothing yet.
func newScan(layers []*layer, fds *fdCache, inos *inoMap, rules indirection) (*scan, error) {
	s := &scan{layers: layers, fds: fds, inos: inos, rules: rules, subs: make([]atomic.Pointer[scan], len(layers))}
	bottom := layers[len(layers)-1]
	var st unix.Stat_t
	if err := fsat.Fstat(bottom.root, &st); err != nil {
		return nil, fmt.Errorf("stat layer %q: %w", bottom.path, err)
	}
	s.top = &scanObj{dIno: inos.shown(st.Dev, st.Ino), dtype: unix.DT_DIR, dir: new(scanSub)}
	s.nextSlot.Store(rootSlot + 1)
	return s, nil
}

func (s *scan) close() {
	s.ahead.stop()
	for _, l := range s.layers {
		l.close()
	}
}

func (s *scan) root() lowerObj { return s.top }

func (s *scan) step() { s.ahead.step() }

func (s *scan) hasWork() bool { return s.ahead != nil && s.ahead.some.Load() }

func (s *scan) walked(dir lowerObj) { s.ahead.listed(dir.(*scanObj)) }

func (s *scan) bare(o lowerObj) bool { return o.(*scanObj).state.Load() == stateBare }

func (s *scan) sharesSlots() bool { return false }

// dirsOf returns the real directories that make up the merged directory o.
func (s *scan) dirsOf(o *scanObj) ([]*scanDir, error) {
	if o.list == nil {
		dirs := make([]*scanDir, len(s.layers))
		for i, l := range s.layers {
			dirs[i] = &scanDir{layer: l}
		}
		return dirs, nil
	}
	e, err := s.examine(o)
	if err != nil {
		return nil, err
	}
	if e != nil {
		return e.dirs, nil
	}
	return o.sameName(), nil
}

// sameName returns the directories of o's own name that are merged in it.
func (o *scanObj) sameName() []*scanDir {
	all := make([]scanDir, 1+len(o.below()))
	dirs := make([]*scanDir, 0, len(all))
	add := func(i uint16) {
		of := o.list.dirs[i]
		d := &all[len(dirs)]
		*d = scanDir{layer: of.layer, path: o.name(), up: of}
		if of.path != "" {
			d.path = of.path + "/" + d.path
		}
		if i := len(dirs); i < len(o.dir.marks) {
			d.mark, d.marked = o.dir.marks[i], true
		}
		if len(dirs) > 0 && dirs[len(dirs)-1].path == d.path {
			d.path = dirs[len(dirs)-1].path // mostly they all have one path: share it
		}
		dirs = append(dirs, d)
	}
	add(o.top)
	for _, i := range o.below() {
		add(i)
	}
	return dirs
}

func (s *scan) list(dir lowerObj) (lowerList, error) {
	o := dir.(*scanObj)
	if l := o.dir.listing.Load(); l != nil {
		return l, nil
	}
	o.dir.reading.Lock()
	defer o.dir.reading.Unlock()
	if l := o.dir.listing.Load(); l != nil {
		return l, nil
	}
	l, err := s.read(o)
	if err != nil {
		return nil, err
	}
	o.dir.listing.Store(l)
	return l, nil
}

func (s *scan) read(o *scanObj) (*scanList, error) {
	dirs, err := s.dirsOf(o)
	if err != nil {
		return nil, err
	}
	list := &scanList{of: o, dirs: dirs}
	found := foundPool.Get().(*foundEntries)
	defer found.putBack()
	listings := make([]merge.Listing, 0, len(list.dirs))
	first := make([]int, 0, len(list.dirs)) // of each listing's entries in found
	for _, d := range list.dirs {
		start := len(found.merge)
		opaque, err := s.readLayer(d, found)
		if err != nil {
			return nil, fmt.Errorf("read directory %q of layer %q: %w", d.path, d.layer.path, err)
		}
		listings = append(listings, merge.Listing{Opaque: opaque, Entries: found.merge[start:]})
		first = append(first, start)
		if opaque {
			break
		}
	}
	list.dirs = list.dirs[:len(listings)]
	merged := merge.Merge(listings)
	list.objs = make([]scanObj, len(merged))
	list.first = s.nextSlot.Add(uint64(len(merged))) - uint64(len(merged))
	var names strings.Builder
	for i, m := range merged {
		last := m.Refs[len(m.Refs)-1]
		e := func(r merge.Ref) *layerEntry { return &found.layer[found.from[first[r.Listing]+int(r.Entry)]] }
		o := &list.objs[i]
		o.list, o.pos, o.nameAt, o.nameLen = list, uint32(i), uint32(names.Len()), uint8(len(m.Name))
		names.WriteString(m.Name)
		o.dtype, o.top = e(m.Refs[0]).typ, uint16(m.Refs[0].Listing)
		// A directory is numbered after its lowest part, which no copy-up
		// and no added layer changes.
		o.dIno = s.inos.shown(list.dirs[last.Listing].layer.dev, e(last).ino)
		if o.dtype != unix.DT_DIR {
			continue
		}
		o.dir = new(scanSub)
		if len(m.Refs) > 1 {
			last, err := s.cutOpaque(list, o, m)
			if err != nil {
				return nil, err
			}
			o.dIno = s.inos.shown(list.dirs[last.Listing].layer.dev, e(last).ino)
		}
	}
	list.names = names.String()
	if s.rules.redirect {
		s.renumber(list)
	}
	return list, nil
}

// cutOpaque finds out which of the directories that have one name are merged: none below
// one that hides them. It returns the lowest that is. Who has its content elsewhere
// may lie in what is hidden, and must not have the same number.
func (s *scan) cutOpaque(list *scanList, o *scanObj, m merge.Merged) (last merge.Ref, err error) {
	o.dir.marks = make([]whiteout.DirMark, 0, len(m.Refs)-1)
	for i, r := range m.Refs {
		last = r
		if i > 0 {
			o.dir.below = append(o.dir.below, uint16(r.Listing))
		}
		if i == len(m.Refs)-1 {
			break
		}
		d := list.dirs[r.Listing]
		h, err := s.dirFd(d)
		if err != nil {
			return last, err
		}
		mark, err := d.layer.markAt(h.fd, m.Name)
		h.release()
		if err != nil {
			return last, fmt.Errorf("read opaque attribute of %q: %w", m.Name, err)
		}
		o.dir.marks = append(o.dir.marks, mark)
		if mark == whiteout.Opaque {
			break
		}
	}
	return last, nil
}

// renumber gives the directories of a listing that have their content elsewhere
// the numbers that admit will give them. One that cannot be examined says so when it
// is looked at.
func (s *scan) renumber(list *scanList) {
	for i := range list.objs {
		o := &list.objs[i]
		if o.dtype != unix.DT_DIR {
			continue
		}
		if e, err := s.examine(o); err == nil && e != nil {
			if f, err := s.facts(e.dirs[len(e.dirs)-1], ""); err == nil {
				o.dIno = f.ino
			}
		}
	}
}

// forget implements lowerTree. The directory is read again when somebody looks
// into it; its objects are others then.
func (s *scan) forget(dir lowerObj) {
	l := dir.(*scanObj).dir.listing.Swap(nil)
	if l == nil {
		return
	}
	for _, d := range l.dirs {
		s.fds.drop(&d.fd)
	}
}

// foundEntries is what the layers have in one directory: layer has the entries of all
// layers, merge the same for the merge rule, and from says which of layer each of
// merge is.
type foundEntries struct {
	layer []layerEntry
	merge []merge.Entry
	from  []int32
}

var foundPool = sync.Pool{New: func() any { return new(foundEntries) }}

func (f *foundEntries) putBack() {
	clear(f.layer)
	clear(f.merge)
	f.layer, f.merge, f.from = f.layer[:0], f.merge[:0], f.from[:0]
	foundPool.Put(f)
}

// readLayer adds what a layer has in a directory to found.
func (s *scan) readLayer(d *scanDir, found *foundEntries) (opaque bool, err error) {
	start := len(found.layer)
	if d.path == "" {
		found.layer, opaque, err = d.layer.readDirAt(d.layer.root, found.layer)
	} else {
		var fd int
		if fd, err = s.openDir(d, fsat.OpenDirBeneath); err != nil {
			return false, err
		}
		if !d.marked {
			if d.mark, err = d.layer.dialect.Mark(fd); err != nil {
				fsat.Close(fd)
				return false, fmt.Errorf("read opaque attribute: %w", err)
			}
		}
		found.layer, opaque, err = d.layer.readDir(fd, false, d.mark, found.layer)
		// From now on it only stands for the directory: nobody reads it again.
		s.fds.put(&d.fd, fd, false).release()
	}
	for i := start; i < len(found.layer); i++ {
		e := &found.layer[i]
		if e.object {
			k := merge.Other
			if e.typ == unix.DT_DIR {
				k = merge.Dir
			}
			found.merge, found.from = append(found.merge, merge.Entry{Name: e.name, Kind: k}), append(found.from, int32(i))
		}
		if e.whiteout {
			found.merge, found.from = append(found.merge, merge.Entry{Name: e.name, Kind: merge.Whiteout}), append(found.from, int32(i))
		}
	}
	return opaque, err
}

func (s *scan) dirFd(d *scanDir) (*fdHandle, error) {
	if d.path == "" {
		return borrowed(d.layer.root), nil
	}
	return s.fds.get(&d.fd, false, func() (int, error) {
		return s.openDir(d, func(dirfd int, path string) (int, error) {
			return fsat.OpenBeneath(dirfd, path, unix.O_PATH|unix.O_DIRECTORY)
		})
	})
}

// openDir opens a real directory, from the one that it lies in if that is open.
func (s *scan) openDir(d *scanDir, open func(dirfd int, path string) (int, error)) (int, error) {
	if d.up != nil && d.up.path != "" {
		if h := s.fds.peek(&d.up.fd); h != nil {
			defer h.release()
			return open(h.fd, d.path[len(d.up.path)+1:])
		}
	}
	return open(d.layer.root, d.path)
}

func (s *scan) with(obj lowerObj, fn func(dirfd int, name string) error) error {
	o := obj.(*scanObj)
	if o.list == nil {
		return fn(s.layers[0].root, "")
	}
	h, err := s.dirFd(o.list.dirs[o.top])
	if err != nil {
		return err
	}
	defer h.release()
	return fn(h.fd, o.name())
}

func (s *scan) stat(obj lowerObj, st *unix.Stat_t) error {
	o := obj.(*scanObj)
	err := s.with(o, func(dirfd int, name string) error { return fsat.Stat(dirfd, name, st) })
	if err != nil || o.state.Load() != stateIndirect || o.dtype != unix.DT_REG {
		return err
	}
	// Its space is where its data is.
	e, err := s.examine(o)
	if err != nil {
		return err
	}
	var data unix.Stat_t
	err = e.data.tree.stat(e.data.obj, &data)
	st.Blocks = data.Blocks
	return err
}

func (s *scan) open(obj lowerObj) (fd int, err error) {
	o := obj.(*scanObj)
	if e, err := s.examine(o); err != nil {
		return -1, err
	} else if e != nil {
		return e.data.tree.open(e.data.obj)
	}
	err = s.with(o, func(dirfd int, name string) (e error) {
		fd, e = s.layer(o).openData(dirfd, name)
		return e
	})
	return fd, err
}

func (s *scan) layer(obj lowerObj) *layer {
	o := obj.(*scanObj)
	if o.list == nil {
		return s.layers[0]
	}
	return o.list.dirs[o.top].layer
}

func (s *scan) merged(obj lowerObj) bool {
	o := obj.(*scanObj)
	if o.list == nil {
		return len(s.layers) > 1
	}
	if e := s.known(o); e != nil {
		return len(e.dirs) > 1
	}
	return len(o.below()) > 0
}

// inoMap makes one space of inode numbers out of those of several file
// systems. The first device seen keeps its numbers; others get their index in
// the top 16 bits, or a hash where the number itself is that large.
type inoMap struct {
	mu   sync.RWMutex
	devs map[uint64]uint64 // guarded by mu
}

func newInoMap() *inoMap { return &inoMap{devs: make(map[uint64]uint64)} }

func (m *inoMap) shown(dev, ino uint64) uint64 {
	const shift = 48
	m.mu.RLock()
	idx, ok := m.devs[dev]
	m.mu.RUnlock()
	if !ok {
		m.mu.Lock()
		if idx, ok = m.devs[dev]; !ok {
			idx = uint64(len(m.devs))
			m.devs[dev] = idx
		}
		m.mu.Unlock()
	}
	if idx == 0 {
		return ino
	}
	if ino>>shift != 0 {
		ino = (ino * 0x9e3779b97f4a7c15) >> (64 - shift)
	}
	return ino | idx<<shift
}

// admit implements lowerTree.
func (s *scan) admit(obj lowerObj) (f lowerFacts, err error) {
	o := obj.(*scanObj)
	if f, ok := s.ahead.take(o); ok {
		return f, nil
	}
	return s.look(o)
}

// look is admit of an object that has not been looked at ahead.
func (s *scan) look(o *scanObj) (f lowerFacts, err error) {
	if o.list == nil {
		return lowerFacts{ino: o.dIno}, nil
	}
	e, err := s.examine(o)
	if err != nil {
		return f, err
	}
	if o.dtype == unix.DT_DIR {
		return s.dirFacts(o, e)
	}
	f, err = s.facts(o.list.dirs[o.top], o.name())
	f.whole = e == nil
	return f, err
}

// dirFacts is admit for a directory. It is numbered after its lowest part, as in
// its listing; none of its parts may be a trap.
func (s *scan) dirFacts(o *scanObj, e *elsewhere) (f lowerFacts, err error) {
	dirs, name := []*scanDir(nil), ""
	if e != nil {
		dirs = e.dirs
	} else {
		name = o.name()
		for _, i := range append([]uint16{o.top}, o.below()...) {
			dirs = append(dirs, o.list.dirs[i])
		}
	}
	var top lowerFacts
	for i, d := range dirs {
		if i > 0 && i < len(dirs)-1 && len(s.traps) == 0 {
			continue
		}
		if f, err = s.facts(d, name); err != nil {
			return f, err
		}
		if slices.Contains(s.traps, f.id) {
			return f, unix.ELOOP
		}
		if i == 0 {
			top = f
		}
	}
	f.prot, f.st, f.whole = top.prot, top.st, true
	return f, nil
}

// facts looks at a name in a real directory, or at the directory itself.
func (s *scan) facts(d *scanDir, name string) (lowerFacts, error) {
	h, err := s.dirFd(d)
	if err != nil {
		return lowerFacts{}, err
	}
	defer h.release()
	return s.inos.factsAt(h.fd, name)
}

// factsAt looks at a name in a directory, or at the directory itself.
func (m *inoMap) factsAt(dirfd int, name string) (f lowerFacts, err error) {
	attributes, err := fsat.StatAttributes(dirfd, name, &f.st)
	if err != nil {
		return f, err
	}
	f.id = realID{f.st.Dev, f.st.Ino}
	f.ino, f.prot = m.shown(f.id.dev, f.id.ino), protectionOf(attributes)
	if f.st.Mode&unix.S_IFMT != unix.S_IFDIR {
		f.links = uint32(f.st.Nlink)
	}
	return f, nil
}

func (s *scan) lookup(path string) (lowerObj, error) { return lookupIn(s, path) }

// lookupIn implements lowerTree.lookup by its other methods.
func lookupIn(t lowerTree, path string) (lowerObj, error) {
	o := t.root()
	for name := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		if name == "" {
			continue
		}
		if o.typ() != unix.DT_DIR {
			return nil, unix.ENOENT
		}
		list, err := t.list(o)
		if err != nil {
			return nil, err
		}
		pos, ok := list.find(name)
		if !ok {
			return nil, unix.ENOENT
		}
		_, o = list.at(pos)
	}
	return o, nil
}

func (s *scan) path(obj lowerObj) string {
	var names []string
	for o := obj.(*scanObj); o.list != nil; o = o.list.of {
		names = append(names, o.name())
	}
	slices.Reverse(names)
	return "/" + strings.Join(names, "/")
}

func (s *scan) origin(o lowerObj) (origin []byte, err error) {
	l := s.layer(o)
	if !l.handles {
		return nil, unix.EOPNOTSUPP
	}
	err = s.with(o, func(dirfd int, name string) (e error) {
		origin, e = fsat.Origin(dirfd, name, l.uuid)
		return e
	})
	return origin, err
}

func (s *scan) byOrigin(origin []byte) (lowerFacts, bool) {
	return byOriginIn(s.layers, s.inos, origin)
}

// byOriginIn implements lowerTree.byOrigin for layers that lie side by side.
func byOriginIn(layers []*layer, inos *inoMap, origin []byte) (facts lowerFacts, ok bool) {
	tried := make(map[uint64]bool, 1)
	for _, l := range layers {
		if tried[l.dev] || !l.handles {
			continue
		}
		tried[l.dev] = true
		fd, err := fsat.OpenOrigin(l.root, l.uuid, origin)
		if err != nil {
			continue
		}
		facts, err := inos.factsAt(fd, "")
		fsat.Close(fd)
		if err == nil {
			return facts, true
		}
	}
	return lowerFacts{}, false
}

// errStale says that an object is no longer where it was; the caller looks
// again.
var errStale = errors.New("object moved")
