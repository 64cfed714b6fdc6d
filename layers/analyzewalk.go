package layers

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/metadata/chainindex"
)

// analyzer walks the indexes of all layers at once, name by name, and follows what
// becomes of each name from the bottom to the top. What is hidden is walked, too. It
// holds the directories on the way to the current name, never a tree.
type analyzer struct {
	ctx     context.Context
	opt     AnalyzeOptions
	out     *Analysis
	indexes []*chainindex.Index // bottom first, as everything here
	dirs    []LayerDir
	files   *fileReader

	linked     map[objectKey]*inode // files with several names
	wasted     map[Path]*WastedPath
	candidates []*inode // of which duplicates are looked for
}

// objectKey names an object of a layer.
type objectKey struct {
	layer int
	slot  chainindex.Slot
}

// event is what one layer says about a name.
type event struct {
	layer int
	slot  chainindex.Slot // of the object that it has there; 0: none
	// clear: of what the layers below have of the name, nothing shows: there is a
	// whiteout, or a directory above it was replaced.
	clear bool
}

// present is what shows at a name after some layers.
type present struct {
	objectKey
	chainindex.Inode
	file *inode // of regular files
}

func (p *present) none() bool      { return p.slot == 0 }
func (p *present) isRegular() bool { return p.Mode&unix.S_IFMT == unix.S_IFREG }

// inode is a regular file of a layer.
type inode struct {
	objectKey
	path    string // of its first name
	size    int64
	visible bool
	// succeeded: the image shows something at path, this file or another object.
	succeeded bool
	// by and kind: which layer took the last name away so far, and how; why is about
	// what is there instead.
	by   int
	kind string
	why  []string
}

// total is what a directory has below it.
type total struct {
	bytes int64
	files int
}

func newAnalyzer(ctx context.Context, a *Analysis, o AnalyzeOptions, indexes []*chainindex.Index, dirs []LayerDir) *analyzer {
	for i := range a.Layers {
		a.Layers[i].Size = 0
		if o.Files && (o.Layer == 0 || o.Layer == i+1) {
			a.Layers[i].Files = []LayerChange{}
		}
	}
	if o.Largest != 0 {
		a.Largest = []LargeFile{}
	}
	if o.Directories != 0 {
		a.LargestDirectories = []LargeDirectory{}
	}
	if o.Wasted != 0 {
		a.WastedPaths, a.WastedDirectories = []WastedPath{}, []LargeDirectory{}
	}
	if o.Duplicates != 0 {
		a.Duplicates = []Duplicate{}
	}
	return &analyzer{
		ctx: ctx, opt: o, out: a, indexes: indexes, dirs: dirs, files: newFileReader(dirs),
		linked: map[objectKey]*inode{}, wasted: map[Path]*WastedPath{},
	}
}

func (w *analyzer) run() error {
	var root []event
	for i := range w.indexes {
		root = append(root, event{layer: i, slot: chainindex.Root})
	}
	sum, err := w.name("", root)
	w.out.Visible = sum.bytes
	if err == nil && len(root) > 0 {
		w.out.Directories-- // the root is not a name
	}
	return err
}

// name follows one path through the layers that say something about it, and then what
// is below it.
func (w *analyzer) name(path string, events []event) (sum total, err error) {
	var cur present
	var below []event // what those who have a directory here say about its names
	var here []*inode // files that have their first name here
	for _, e := range events {
		if e.slot == 0 {
			if cur.none() {
				continue
			}
			if cur.IsDir() {
				below = append(below, event{layer: e.layer, clear: true})
			}
			if err := w.change("D", e.layer, path, cur, present{}); err != nil {
				return sum, err
			}
			cur = present{}
			continue
		}
		next := present{objectKey: objectKey{e.layer, e.slot}}
		if err := w.indexes[e.layer].Inode(e.slot, &next.Inode); err != nil {
			return sum, w.wrap(path, e.layer, err)
		}
		if next.IsDir() {
			below = append(below, event{layer: e.layer, slot: e.slot, clear: e.clear || next.Flags&chainindex.FlagOpaque != 0})
			if !cur.none() && cur.IsDir() && !e.clear && next.Flags&chainindex.FlagImplicit != 0 {
				continue // it has the attributes of the one below, which shows through
			}
		} else if !cur.none() && cur.IsDir() {
			below = append(below, event{layer: e.layer, clear: true})
		}
		if next.isRegular() {
			if next.file = w.file(path, next); next.file.path == path {
				here = append(here, next.file)
			}
		}
		kind := "A"
		if !cur.none() {
			kind = "C"
		}
		if err := w.change(kind, e.layer, path, cur, next); err != nil {
			return sum, err
		}
		cur = next
	}
	if sum, err = w.below(path, below); err != nil || cur.none() {
		return sum, err
	}
	for _, f := range here {
		f.succeeded = true
	}
	if p := w.wasted[absolute(path)]; p != nil {
		p.Visible = true
	}
	if cur.IsDir() {
		w.out.Directories++
		return sum, nil
	}
	w.out.Files++
	sum.files++
	if f := cur.file; f != nil && !f.visible {
		f.visible = true
		sum.bytes += f.size
		if w.opt.Largest != 0 {
			w.large(LargeFile{Path: absolute(path), Size: f.size, Layer: f.layer + 1})
		}
	}
	return sum, nil
}

// file is the file of a name. Its bytes count where its first name is.
func (w *analyzer) file(path string, p present) *inode {
	if f := w.linked[p.objectKey]; f != nil {
		return f
	}
	f := &inode{objectKey: p.objectKey, path: path, size: int64(p.Size)}
	if p.Nlink > 1 {
		w.linked[p.objectKey] = f
	}
	if w.opt.Duplicates != 0 && f.size > 0 {
		w.candidates = append(w.candidates, f)
	}
	return f
}

// change notes what a layer makes of a name. Of was and is, one may be nothing.
func (w *analyzer) change(kind string, layer int, path string, was, is present) error {
	l := &w.out.Layers[layer]
	count := map[string]*LayerCount{"A": &l.Added, "C": &l.Changed, "D": &l.Deleted}[kind]
	var why []string
	if kind == "C" && (w.opt.Why || is.IsDir() && was.IsDir()) {
		r, err := w.compare(path, was, is)
		if err != nil {
			return err
		}
		if why = r.why; is.IsDir() && was.IsDir() && len(why) == 0 {
			return nil // it is here because of something in it
		}
	}
	shown := is
	if kind == "D" {
		shown = was
	}
	root := path == "" && kind == "A"
	if shown.IsDir() && !root {
		count.Directories++
	} else if !root {
		count.Files++
	}
	c := LayerChange{Kind: kind, Path: absolute(path), Type: typeName(shown.Mode), Why: why}
	if f := is.file; f != nil {
		c.Size = f.size
		if f.path == path {
			count.Bytes += f.size
			l.Size += f.size
		} else {
			c.LinkTo = absolute(f.path)
		}
	}
	if f := was.file; f != nil {
		c.OldSize = f.size
		if err := w.take(kind, layer, path, f, why); err != nil {
			return err
		}
	}
	if w.opt.Files && !root && (w.opt.Layer == 0 || w.opt.Layer == l.Number) {
		l.Files = append(l.Files, c)
	}
	return nil
}

// take takes a name away from a file.
func (w *analyzer) take(kind string, layer int, path string, f *inode, why []string) error {
	if w.linked[f.objectKey] == f { // it may have others
		if layer > f.by || layer == f.by && kind == "D" {
			f.by, f.kind, f.why = layer, kind, why
		}
		return nil
	}
	f.by, f.kind, f.why = layer, kind, why
	w.waste(f)
	return nil
}

// waste counts a file of which no name is left.
func (w *analyzer) waste(f *inode) {
	l, by := &w.out.Layers[f.layer], &w.out.Layers[f.by]
	l.Wasted += f.size
	l.WastedFiles++
	by.Wastes += f.size
	if f.kind == "D" {
		by.Deleted.Bytes += f.size
	}
	if w.opt.Wasted == 0 || f.size == 0 {
		return
	}
	path := absolute(f.path)
	p := w.wasted[path]
	if p == nil {
		p = &WastedPath{Path: path, Visible: f.succeeded}
		w.wasted[path] = p
	}
	p.Wasted += f.size
	p.Versions = append(p.Versions, WastedFile{Layer: l.Number, Size: f.size, By: by.Number, Kind: f.kind, Why: f.why})
}

// compare says in what two objects of one path, of different layers, differ.
func (w *analyzer) compare(path string, was, is present) (r reasons, err error) {
	a, err := w.indexes[was.layer].Object(was.slot)
	if err != nil {
		return r, w.wrap(path, was.layer, err)
	}
	b, err := w.indexes[is.layer].Object(is.slot)
	if err != nil {
		return r, w.wrap(path, is.layer, err)
	}
	r.metadata(a, b, false)
	if was.file == nil || is.file == nil || was.file.size != is.file.size || w.sameFile(was.objectKey, is.objectKey) {
		return r, nil
	}
	same, err := w.sameContent(path, was.layer, is.layer, is.file.size)
	if err == nil && !same {
		r.add(WhyContent, "")
	}
	return r, err
}

// sameFile: an image may have a layer several times, which lies in one directory.
func (w *analyzer) sameFile(a, b objectKey) bool {
	return a.slot == b.slot && w.dirs[a.layer].CacheID == w.dirs[b.layer].CacheID
}

func (w *analyzer) sameContent(path string, a, b int, size int64) (bool, error) {
	if size == 0 {
		return true, nil
	}
	fa, err := w.files.open(a, path)
	if err != nil {
		return false, err
	}
	defer fa.Close() // was only read
	fb, err := w.files.open(b, path)
	if err != nil {
		return false, err
	}
	defer fb.Close() // was only read
	return sameContent(w.ctx, fa, fb, w.files.buf)
}

// said is what one layer's directory says about a name.
type said struct {
	name string
	dir  int // number in the events of the directory
	chainindex.Entry
}

// below follows the names of a directory. events are those of the layers that have it, or
// make an end of it, and sum what of it shows.
func (w *analyzer) below(path string, events []event) (sum total, err error) {
	if err := w.ctx.Err(); err != nil {
		return sum, err
	}
	var all []said
	for i, e := range events {
		if e.slot == 0 {
			continue
		}
		var buf chainindex.DirBuf
		if err := w.indexes[e.layer].ReadDir(e.slot, 0, math.MaxInt, &buf); err != nil {
			return sum, w.wrap(path, e.layer, err)
		}
		for _, n := range buf.Entries {
			all = append(all, said{string(n.Name), i, n.Entry})
		}
	}
	slices.SortStableFunc(all, func(a, b said) int { return strings.Compare(a.name, b.name) })
	var largest int64 // of the directories in this one
	for len(all) > 0 {
		n := 1
		for n < len(all) && all[n].name == all[0].name {
			n++
		}
		one, err := w.name(join(path, all[0].name), nameEvents(events, all[:n]))
		if err != nil {
			return sum, err
		}
		if slices.ContainsFunc(all[:n], func(s said) bool { return s.Type == unix.DT_DIR }) {
			largest = max(largest, one.bytes)
		}
		sum.bytes += one.bytes
		sum.files += one.files
		all = all[n:]
	}
	if w.opt.Directories != 0 && path != "" && sum.bytes > 0 && mostlyItsOwn(sum.bytes, largest) {
		w.largeDirectory(LargeDirectory{Path: absolute(path), Size: sum.bytes, Files: sum.files})
	}
	return sum, nil
}

// nameEvents is what the layers that have a directory, or make an end of it, say about
// one of its names.
func nameEvents(dir []event, name []said) (out []event) {
	for i, d := range dir {
		e := event{layer: d.layer, clear: d.clear}
		if len(name) > 0 && name[0].dir == i {
			e.slot, e.clear = name[0].Slot, e.clear || name[0].Whiteout
			name = name[1:]
		}
		if e.slot != 0 || e.clear && len(out) > 0 {
			out = append(out, e)
		}
	}
	return out
}

func absolute(path string) Path { return Path("/" + path) }

func (w *analyzer) wrap(path string, layer int, err error) error {
	return fmt.Errorf("%q in layer %d: %w", absolute(path), layer+1, err)
}
