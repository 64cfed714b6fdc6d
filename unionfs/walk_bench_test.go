package unionfs

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/whiteout"
)

// benchLowers makes layers of a tree in which each directory is in all layers, with some
// files of its own in each.
func benchLowers(b *testing.B) (lowers []Layer) {
	const layers, dirs, files = 8, 40, 6
	for i := range layers {
		root := b.TempDir()
		for d := range dirs {
			dir := filepath.Join(root, fmt.Sprint("d", d%8), fmt.Sprint("sub", d))
			if err := os.MkdirAll(dir, 0o755); err != nil {
				b.Fatal(err)
			}
			for f := range files {
				if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("layer%d-%d", i, f)), nil, 0o644); err != nil {
					b.Fatal(err)
				}
			}
		}
		lowers = append(lowers, Layer{Path: root, Dialect: whiteout.UserXattr})
	}
	return lowers
}

// benchUnion makes a writable union of them.
func benchUnion(b *testing.B, lowers []Layer) *FS {
	fs, err := New(Options{Lowers: lowers, Upper: b.TempDir(), Work: b.TempDir(), UpperDialect: whiteout.UserXattr, IO: IOPassthrough})
	if err != nil {
		b.Fatal(err)
	}
	return fs
}

// BenchmarkColdWalk lists all directories of a new union with the attributes of what
// lies in them, as find(1) does.
func BenchmarkColdWalk(b *testing.B) {
	lowers := benchLowers(b)
	buf := make([]byte, 32<<10)
	entries := 0
	for b.Loop() {
		b.StopTimer()
		fs := benchUnion(b, lowers)
		b.StartTimer()
		for dirs := []uint64{fuse.FUSE_ROOT_ID}; len(dirs) > 0; {
			id := dirs[len(dirs)-1]
			dirs = dirs[:len(dirs)-1]
			for _, e := range listPlus(b, fs, id, buf) {
				entries++
				if e.entry.Mode&unix.S_IFMT == unix.S_IFDIR {
					dirs = append(dirs, e.entry.NodeId)
				}
			}
		}
		b.StopTimer()
		if err := fs.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(entries), "ns/entry")
}

// BenchmarkCreate makes a file and removes it again, with the requests that the kernel
// sends for that.
func BenchmarkCreate(b *testing.B) {
	fs := benchUnion(b, benchLowers(b))
	defer fs.Close()
	fs.SetBacking(func(int) (int32, error) { return 1, nil }, func(int32) {})
	h := header(fuse.FUSE_ROOT_ID)
	ok := func(s fuse.Status) {
		if s != fuse.OK {
			b.Fatal(s)
		}
	}
	for i := 0; b.Loop(); i++ {
		name := fmt.Sprint("f", i)
		var entry fuse.EntryOut
		ok(fs.Lookup(nil, &h, name, &entry))
		if entry.NodeId != 0 {
			b.Fatalf("%s is there already", name)
		}
		var out fuse.CreateOut
		ok(fs.Create(nil, &fuse.CreateIn{InHeader: h, Flags: unix.O_RDWR, Mode: 0o644}, name, &out))
		fs.Release(nil, &fuse.ReleaseIn{InHeader: header(out.NodeId), Fh: out.Fh, Flags: unix.O_RDWR})
		ok(fs.Unlink(nil, &h, name))
		fs.Forget(out.NodeId, 1)
	}
}
