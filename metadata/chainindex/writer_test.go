package chainindex

import (
	"errors"
	"strings"
	"testing"
)

func TestWriterRefuses(t *testing.T) {
	file := func(change func(*Object)) *Object {
		o := &Object{Inode: Inode{Mode: modeRegular | 0o644}}
		if change != nil {
			change(o)
		}
		return o
	}
	child := func(c ...Child) func(*Writer) error {
		return func(w *Writer) error {
			for _, c := range c {
				if _, err := w.Add(Root, c); err != nil {
					return err
				}
			}
			return nil
		}
	}
	dir := &Object{Inode: Inode{Mode: modeDir | 0o755}}
	for name, do := range map[string]func(*Writer) error{
		"empty name":        child(Child{Object: file(nil)}),
		"dot":               child(Child{Name: ".", Object: file(nil)}),
		"dot dot":           child(Child{Name: "..", Object: file(nil)}),
		"slash":             child(Child{Name: "a/b", Object: file(nil)}),
		"NUL":               child(Child{Name: "a\x00b", Object: file(nil)}),
		"256 bytes":         child(Child{Name: strings.Repeat("n", 256), Object: file(nil)}),
		"nothing":           child(Child{Name: "a"}),
		"object and link":   child(Child{Name: "a", Object: file(nil)}, Child{Name: "b", Object: file(nil), Link: 2}),
		"link to nothing":   child(Child{Name: "a", Link: 9}),
		"link to root":      child(Child{Name: "a", Link: Root}),
		"twice":             child(Child{Name: "a", Object: file(nil)}, Child{Name: "a", Object: file(nil)}),
		"descending":        child(Child{Name: "b", Object: file(nil)}, Child{Name: "a", Object: file(nil)}),
		"no type":           child(Child{Name: "a", Object: file(func(o *Object) { o.Mode = 0o644 })}),
		"wide mode":         child(Child{Name: "a", Object: file(func(o *Object) { o.Mode |= 1 << 20 })}),
		"nanoseconds":       child(Child{Name: "a", Object: file(func(o *Object) { o.Mtime.Nsec = 1e9 })}),
		"target in a file":  child(Child{Name: "a", Object: file(func(o *Object) { o.Target = "x" })}),
		"link without":      child(Child{Name: "a", Object: file(func(o *Object) { o.Mode = modeSymlink | 0o777 })}),
		"rdev of a file":    child(Child{Name: "a", Object: file(func(o *Object) { o.Rdev = 1 })}),
		"layer":             child(Child{Name: "a", Object: file(func(o *Object) { o.Layer = 1 })}),
		"merged in a layer": child(Child{Name: "a", Object: &Object{Inode: Inode{Mode: modeDir, Flags: FlagMerged}}}),
		"opaque file":       child(Child{Name: "a", Object: file(func(o *Object) { o.Flags = FlagOpaque })}),
		"attribute twice":   child(Child{Name: "a", Object: file(func(o *Object) { o.Xattrs = []Xattr{{"user.a", nil}, {"user.a", nil}} })}),
		"attribute no name": child(Child{Name: "a", Object: file(func(o *Object) { o.Xattrs = []Xattr{{"", nil}} })}),
		"second root":       func(w *Writer) error { return w.SetRoot(dir) },
		"child of a file": func(w *Writer) error {
			_ = child(Child{Name: "a", Object: file(nil)})(w)
			_, err := w.Add(2, Child{Name: "b", Object: file(nil)})
			return err
		},
		"child of nothing": func(w *Writer) error { _, err := w.Add(7, Child{Name: "b", Object: file(nil)}); return err },
		"directory reopened": func(w *Writer) error {
			if err := child(Child{Name: "a", Object: dir})(w); err != nil {
				return nil
			}
			if _, err := w.Add(2, Child{Name: "x", Object: file(nil)}); err != nil {
				return nil
			}
			return child(Child{Name: "b", Object: file(nil)})(w)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, err := NewWriter(layerOptions())
			if err != nil {
				t.Fatal(err)
			}
			defer w.Discard()
			if err := w.SetRoot(dir); err != nil {
				t.Fatal(err)
			}
			if err := do(w); !errors.Is(err, ErrInvalid) {
				t.Fatalf("got %v, want ErrInvalid", err)
			}
			if _, err := w.WriteTo(failingWriter{}); !errors.Is(err, ErrInvalid) {
				t.Errorf("WriteTo after an error: %v", err)
			}
		})
	}
}

type failingWriter struct{}

var errDiskFull = errors.New("disk full")

func (failingWriter) Write([]byte) (int, error) { return 0, errDiskFull }

func TestWriterOptionsRefused(t *testing.T) {
	for name, o := range map[string]WriterOptions{
		"kind":          {Layers: 1},
		"no layers":     {Kind: KindChain},
		"two in layer":  {Kind: KindLayer, Layers: 2},
		"long id":       {Kind: KindChain, Layers: 1, ID: strings.Repeat("x", 300)},
		"tiny memory":   {Kind: KindChain, Layers: 1, MemoryLimit: 1},
		"missing place": {Kind: KindChain, Layers: -1},
	} {
		if _, err := NewWriter(o); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWriterReportsAFullDisk(t *testing.T) {
	w, err := NewWriter(layerOptions())
	if err != nil {
		t.Fatal(err)
	}
	if err := w.SetRoot(&dirNode(0o755, nil).Object); err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteTo(failingWriter{}); !errors.Is(err, errDiskFull) {
		t.Errorf("WriteTo: %v", err)
	}
}

func TestChainHasNoWhiteouts(t *testing.T) {
	w, err := NewWriter(WriterOptions{Kind: KindChain, Layers: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Discard()
	if err := w.SetRoot(&dirNode(0o755, nil).Object); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Add(Root, Child{Name: "a", Whiteout: true}); !errors.Is(err, ErrInvalid) {
		t.Errorf("got %v", err)
	}
}
