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

func (s *scan) close() { s.ahead.stop() }

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
	err := s.with(o, func(dirfd int, name string) error {
		if err := fsat.Stat(dirfd, name, st); err != nil {
			return err
		}
		return s.layer(o).describe(dirfd, name, st)
	})
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
	return openIn(s, o)
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
	f, err := s.inos.factsAt(h.fd, name)
	if err == nil {
		err = d.layer.describe(h.fd, name, &f.st)
	}
	return f, err
}

func (s *scan) lookup(path string) (lowerObj, error) { return lookupIn(s, path) }

func (s *scan) path(obj lowerObj) string {
	var names []string
	for o := obj.(*scanObj); o.list != nil; o = o.list.of {
		names = append(names, o.name())
	}
	slices.Reverse(names)
	return "/" + strings.Join(names, "/")
}

func (s *scan) origin(o lowerObj) ([]byte, error) { return originIn(s, o) }

func (s *scan) byOrigin(origin []byte) (lowerFacts, bool) {
	return byOriginIn(s.layers, s.inos, origin)
}

// errStale says that an object is no longer where it was; the caller looks
// again.
var errStale = errors.New("object moved")
