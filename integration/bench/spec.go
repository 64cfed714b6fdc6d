package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// entry is one name of a layer.
type entry struct {
	path   string
	kind   entryKind
	size   int64
	mode   uint32
	target string // of a symbolic link, or of a hard link: a path in this layer
}

type entryKind int

const (
	aFile entryKind = iota
	aDir
	anOpaqueDir
	aSymlink
	aHardlink
	aWhiteout
)

// layerSpec describes a layer: parents come before what is in them.
type layerSpec []entry

// stackSpec is a stack of layers, the bottom first.
type stackSpec []layerSpec

// builder makes a layerSpec and adds missing parents.
type builder struct {
	spec layerSpec
	seen map[string]bool
}

func newBuilder() *builder { return &builder{seen: map[string]bool{}} }

func (b *builder) add(e entry) {
	if b.seen[e.path] {
		return
	}
	if dir := path.Dir(e.path); dir != "." && !b.seen[dir] {
		b.add(entry{path: dir, kind: aDir, mode: 0o755})
	}
	b.seen[e.path] = true
	b.spec = append(b.spec, e)
}

func (b *builder) file(name string, size int64) {
	b.add(entry{path: name, kind: aFile, size: size, mode: 0o644})
}

// merged is the tree that the stack shows, sorted by path.
func (s stackSpec) merged() layerSpec {
	all := map[string]entry{}
	hide := func(dir string) {
		for p := range all {
			if strings.HasPrefix(p, dir+"/") {
				delete(all, p)
			}
		}
	}
	for _, layer := range s {
		for _, e := range layer {
			switch e.kind {
			case aWhiteout:
				hide(e.path)
				delete(all, e.path)
				continue
			case anOpaqueDir:
				hide(e.path)
				e.kind = aDir
			case aDir:
			default:
				if all[e.path].kind == aDir {
					hide(e.path)
				}
			}
			all[e.path] = e
		}
	}
	out := make(layerSpec, 0, len(all))
	for _, e := range all {
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b entry) int { return strings.Compare(a.path, b.path) })
	return out
}

// paths lists the names for which keep is true.
func (l layerSpec) paths(keep func(entry) bool) []string {
	var out []string
	for _, e := range l {
		if keep(e) {
			out = append(out, e.path)
		}
	}
	return out
}

// stamp is the time of every object.
var stamp = []unix.Timespec{{Sec: 1700000000}, {Sec: 1700000000}}

// write makes the layer in dir, which it creates.
func (l layerSpec) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, e := range l {
		if err := e.write(dir); err != nil {
			return fmt.Errorf("write %s: %w", filepath.Join(dir, e.path), err)
		}
	}
	for _, e := range slices.Backward(l) { // what is in a directory changes its time
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, e.path), stamp, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("set time of %s: %w", filepath.Join(dir, e.path), err)
		}
	}
	return nil
}

func (e entry) write(dir string) error {
	p := filepath.Join(dir, e.path)
	switch e.kind {
	case aDir, anOpaqueDir:
		if err := os.Mkdir(p, os.FileMode(e.mode)); err != nil {
			return err
		}
		if e.kind == anOpaqueDir {
			return unix.Lsetxattr(p, "trusted.overlay.opaque", []byte("y"), 0)
		}
		return nil
	case aSymlink:
		return os.Symlink(e.target, p)
	case aHardlink:
		return os.Link(filepath.Join(dir, e.target), p)
	case aWhiteout:
		return unix.Mknod(p, unix.S_IFCHR, 0)
	}
	f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_EXCL, os.FileMode(e.mode))
	if err != nil {
		return err
	}
	if err := e.content(f.Write); err != nil {
		f.Close() // the first error counts
		return err
	}
	return f.Close()
}

// filler is what files consist of: half of it can be compressed, as with
// programs.
var filler = sync.OnceValue(func() []byte {
	random := rand.New(rand.NewPCG(3, 4))
	b := make([]byte, 4<<20)
	for i := 0; i < len(b); i += 8 {
		v := random.Uint64()
		if i/512%2 == 0 {
			v &= 0x0f0f0f0f0f0f0f0f
		}
		for j := range 8 {
			b[i+j] = byte(v >> (8 * j))
		}
	}
	return b
})

// content gives the content of a file to write, in pieces. It depends on path
// and size only.
func (e entry) content(write func([]byte) (int, error)) error {
	b := filler()
	at := 0
	for _, c := range []byte(e.path) {
		at = (at*131 + int(c)) % (len(b) / 2)
	}
	for left := e.size; left > 0; {
		piece := b[at:min(int64(len(b)), int64(at)+left)]
		if _, err := write(piece); err != nil {
			return err
		}
		left -= int64(len(piece))
		at = 0
	}
	return nil
}
