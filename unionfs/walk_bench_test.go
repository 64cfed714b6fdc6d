package unionfs

import (
	"os"
	"strconv"
	"testing"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
)

func benchFS(b *testing.B) *FS {
	o := Options{}
	for i := range 8 {
		o.Lowers = append(o.Lowers, Layer{Path: "/dev/shm/qb/L/l" + strconv.Itoa(i)})
	}
	d := b.TempDir()
	o.Upper, o.Work = d+"/u", d+"/w"
	os.Mkdir(o.Upper, 0o755)
	os.Mkdir(o.Work, 0o755)
	fs, err := New(o)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { fs.Close() })
	return fs
}

func BenchmarkColdWalk(b *testing.B) {
	entries := 0
	buf := make([]byte, 32<<10)
	var t time.Duration
	for b.Loop() {
		fs := benchFS(b)
		start := time.Now()
		dirs := []uint64{1}
		for len(dirs) > 0 {
			id := dirs[len(dirs)-1]
			dirs = dirs[:len(dirs)-1]
			off := uint64(0)
			for {
				in := fuse.ReadIn{InHeader: fuse.InHeader{NodeId: id}, Offset: off, Size: uint32(len(buf))}
				out := fuse.NewDirEntryList(buf, off)
				if st := fs.ReadDirPlus(nil, &in, out); st != fuse.OK {
					b.Fatal(st)
				}
				n := 0
				data := buf[:listSize(out)]
				for len(data) > 0 {
					eo := (*fuse.EntryOut)(unsafe.Pointer(&data[0]))
					nl := *(*uint32)(unsafe.Pointer(&data[128+16]))
					off = *(*uint64)(unsafe.Pointer(&data[128+8]))
					if eo.NodeId != 0 {
						entries++
						if eo.Mode&0o170000 == 0o040000 {
							dirs = append(dirs, eo.NodeId)
						}
					}
					n++
					data = data[(128+24+nl+7)&^7:]
				}
				if n == 0 {
					break
				}
			}
		}
		t += time.Since(start)
		fs.Close()
	}
	b.ReportMetric(float64(t.Nanoseconds())/float64(entries), "ns/entry")
}

func listSize(l *fuse.DirEntryList) int {
	// buf is the first field
	return len(*(*[]byte)(unsafe.Pointer(l)))
}

func BenchmarkCreate(b *testing.B) {
	fs := benchFS(b)
	fs.SetBacking(func(int) (int32, error) { return 1, nil }, func(int32) {})
	i := 0
	for b.Loop() {
		i++
		name := "f" + strconv.Itoa(i)
		in := fuse.CreateIn{InHeader: fuse.InHeader{NodeId: 1}, Flags: 2, Mode: 0o100644}
		in.Pid = 77
		var eo fuse.EntryOut
		if st := fs.Lookup(nil, &in.InHeader, name, &eo); st != fuse.OK || eo.NodeId != 0 {
			b.Fatal(st)
		}
		var out fuse.CreateOut
		if st := fs.Create(nil, &in, name, &out); st != fuse.OK {
			b.Fatal(st)
		}
		fs.Release(nil, &fuse.ReleaseIn{InHeader: fuse.InHeader{NodeId: out.NodeId}, Fh: out.Fh, Flags: 2})
		if st := fs.Unlink(nil, &in.InHeader, name); st != fuse.OK {
			b.Fatal(st)
		}
		fs.Forget(out.NodeId, 1)
	}
}
