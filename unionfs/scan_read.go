package unionfs

import (
	"fmt"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/merge"
)

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
