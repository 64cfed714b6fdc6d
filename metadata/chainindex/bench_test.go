package chainindex

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

func benchIndex(b *testing.B, dirs, files int) (*Index, []string) {
	b.Helper()
	root := dirNode(0o755, nil)
	var names []string
	for f := range files {
		names = append(names, fmt.Sprintf("libsomething-%d.so.1", f))
	}
	for d := range dirs {
		sub := dirNode(0o755, nil)
		for _, name := range names {
			sub.children[name] = fileNode(1)
		}
		root.children[fmt.Sprintf("d%05d", d)] = sub
	}
	path := filepath.Join(b.TempDir(), "x.idx")
	if err := os.WriteFile(path, writeTree(b, layerOptions(), root), 0o600); err != nil {
		b.Fatal(err)
	}
	x, err := Open(path)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = x.Close() })
	return x, names
}

func BenchmarkLookup(b *testing.B) {
	for _, files := range []int{10, 1000, 100_000} {
		b.Run(fmt.Sprintf("entries=%d", files), func(b *testing.B) {
			x, names := benchIndex(b, 1, files)
			d, _, err := x.Lookup(Root, "d00000")
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if _, ok, err := x.Lookup(d.Slot, names[i]); !ok || err != nil {
					b.Fatal(ok, err)
				}
				if i++; i == len(names) {
					i = 0
				}
			}
		})
	}
}

func BenchmarkInode(b *testing.B) {
	x, _ := benchIndex(b, 1, 1000)
	b.ReportAllocs()
	var n Inode
	for b.Loop() {
		if err := x.Inode(500, &n); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkReadDir(b *testing.B) {
	x, _ := benchIndex(b, 1, 1000)
	d, _, err := x.Lookup(Root, "d00000")
	if err != nil {
		b.Fatal(err)
	}
	var buf DirBuf
	b.ReportAllocs()
	for b.Loop() {
		if err := x.ReadDir(d.Slot, 0, 1000, &buf); err != nil || len(buf.Entries) != 1000 {
			b.Fatal(err)
		}
	}
}

// BenchmarkColdWalk opens an index and walks 100 000 inodes, which includes verifying every block once.
func BenchmarkColdWalk(b *testing.B) {
	first, _ := benchIndex(b, 1000, 100)
	data := append([]byte(nil), first.data...)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		x, err := New(data)
		if err != nil {
			b.Fatal(err)
		}
		var buf DirBuf
		var n Inode
		walked := 0
		for stack := []Slot{Root}; len(stack) > 0; {
			d := stack[len(stack)-1]
			stack = stack[:len(stack)-1]
			if err := x.ReadDir(d, 0, 1<<20, &buf); err != nil {
				b.Fatal(err)
			}
			for _, e := range buf.Entries {
				if err := x.Inode(e.Slot, &n); err != nil {
					b.Fatal(err)
				}
				walked++
				if n.IsDir() {
					stack = append(stack, e.Slot)
				}
			}
		}
		if walked != 101_000 {
			b.Fatal(walked)
		}
	}
}

func TestLookupAllocatesNothing(t *testing.T) {
	x := mustNew(t, writeTree(t, layerOptions(), sample()))
	etc, _, err := x.Lookup(Root, "etc")
	if err != nil {
		t.Fatal(err)
	}
	var n Inode
	var buf DirBuf
	got := testing.AllocsPerRun(100, func() {
		for _, name := range []string{"passwd", "missing", "a-name-with-a-long-common-pre-2"} {
			if _, _, err := x.Lookup(etc.Slot, name); err != nil {
				t.Fatal(err)
			}
		}
		if err := x.Inode(etc.Slot, &n); err != nil {
			t.Fatal(err)
		}
		if err := x.ReadDir(etc.Slot, 0, 100, &buf); err != nil {
			t.Fatal(err)
		}
	})
	if got > 0 {
		t.Errorf("%v allocations", got)
	}
}
