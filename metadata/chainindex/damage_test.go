package chainindex

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"
)

// exercise calls every method on every slot (up to a bound) and returns a description of what the index says; errors are part of
// it. It must end and must not panic whatever the bytes are.
func exercise(x *Index) map[string]string {
	said := map[string]string{}
	say := func(err error, format string, args ...any) bool {
		if err == nil {
			key := fmt.Sprintf(format, args[0])
			said[key] = fmt.Sprint(args[1:]...)
		}
		return err == nil
	}
	var buf DirBuf
	for s := Slot(0); int(s) <= min(x.Inodes(), 2000)+1; s++ {
		var n Inode
		say(x.Inode(s, &n), "inode %d", s, n)
		p, err := x.Path(s)
		say(err, "path %d", s, p)
		p, err = x.ContentPath(s)
		say(err, "content %d", s, p)
		d, err := x.Parent(s)
		say(err, "parent %d", s, d)
		l, err := x.Readlink(s)
		say(err, "target %d", s, l)
		as, err := x.Xattrs(s)
		say(err, "xattrs %d", s, as)
		v, ok, err := x.Xattr(s, "user.b")
		say(err, "xattr %d", s, v, ok)
		h, err := x.HasXattrs(s)
		say(err, "has %d", s, h)
		c, err := x.Len(s)
		say(err, "len %d", s, c)
		e, ok, err := x.Lookup(s, "passwd")
		say(err, "lookup %d", s, e, ok)
		e, ok, err = x.Lookup(s, "a-name-with-a-long-common-pre-2")
		say(err, "lookup long %d", s, e, ok)
		for cookie := uint64(0); ; {
			if err := x.ReadDir(s, cookie, 3, &buf); err != nil || len(buf.Entries) == 0 || cookie > 2000 {
				say(err, "end %d", s, cookie)
				break
			}
			for _, e := range buf.Entries {
				say(nil, fmt.Sprintf("entry %d/%%d", s), cookie, string(e.Name), e.Entry)
				cookie = e.Next
			}
		}
	}
	_ = x.Verify()
	return said
}

// contradiction returns a key under which a damaged index says something else than the good one ("" if there is none).
func contradiction(good, damaged map[string]string) string {
	for k, v := range damaged {
		if good[k] != v {
			return k
		}
	}
	return ""
}

// TestEveryBitCounts flips each bit of an index. It must be refused when it is opened, or the damaged part must give errors; what
// is still said must be true.
func TestEveryBitCounts(t *testing.T) {
	good := writeTree(t, layerOptions(), sample())
	truth := exercise(mustNew(t, good))
	for i := range good {
		// The padding of header and table is covered by checksums like the rest: one bit per byte will do there.
		bits := 8
		if i >= 256 && i < int(binary.LittleEndian.Uint64(good[24:])) {
			bits = 1
		}
		for bit := range bits {
			data := append([]byte(nil), good...)
			data[i] ^= 1 << bit
			x, err := New(data)
			if err != nil {
				if !errors.Is(err, ErrCorrupt) {
					t.Fatalf("byte %d bit %d: %v is not ErrCorrupt", i, bit, err)
				}
				continue
			}
			if err := x.Verify(); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("byte %d bit %d: Verify says %v", i, bit, err)
			}
			if i%16 == bit*2 {
				if k := contradiction(truth, exercise(mustNew(t, data))); k != "" {
					t.Fatalf("byte %d bit %d: wrong answer for %s", i, bit, k)
				}
			}
		}
	}
}

func TestTruncatedIndexIsRefused(t *testing.T) {
	good := writeTree(t, layerOptions(), sample())
	for n := range good {
		if _, err := New(good[:n]); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("%d of %d bytes: %v", n, len(good), err)
		}
	}
	if _, err := New(append(good, 0)); !errors.Is(err, ErrCorrupt) {
		t.Errorf("one byte too many: %v", err)
	}
}

func TestOtherVersionIsNotCalledDamage(t *testing.T) {
	data := writeTree(t, layerOptions(), sample())
	binary.LittleEndian.PutUint32(data[8:], version+1)
	reseal(data)
	if _, err := New(data); !errors.Is(err, ErrVersion) || errors.Is(err, ErrCorrupt) {
		t.Errorf("got %v", err)
	}
}

// reseal makes the checksums of a changed index right again, so that the checks behind them are reached.
func reseal(data []byte) {
	if len(data) < headerSize {
		return
	}
	le := binary.LittleEndian
	at := le.Uint64(data[24:])
	if at >= headerSize && at <= uint64(len(data)) {
		table, payload := data[headerSize:at], data[at:]
		for b := 0; b*blockSize < len(payload) && b*4+4 <= len(table); b++ {
			le.PutUint32(table[b*4:], crc32.Checksum(payload[b*blockSize:min(len(payload), (b+1)*blockSize)], castagnoli))
		}
		le.PutUint32(data[76:], crc32.Checksum(table, castagnoli))
	}
	le.PutUint32(data[headerCRC:], crc32.Checksum(data[:headerCRC], castagnoli))
}

// TestLiesBehindGoodChecksums changes each byte of the payload and seals the file again: the answers may be wrong then, but no
// call may panic or hang.
func TestLiesBehindGoodChecksums(t *testing.T) {
	good := writeTree(t, layerOptions(), sample())
	for i := int(binary.LittleEndian.Uint64(good[24:])); i < len(good); i++ {
		for _, v := range []byte{0, 1, 0xff, good[i] ^ 0x40} {
			data := append([]byte(nil), good...)
			data[i] = v
			reseal(data)
			x, err := New(data)
			if err == nil {
				exercise(x)
			}
		}
	}
}

func TestCycleEnds(t *testing.T) {
	data := writeTree(t, layerOptions(), dirNode(0o755, map[string]*node{
		"a": dirNode(0o755, map[string]*node{"b": dirNode(0o755, map[string]*node{"f": fileNode(1)})}),
	}))
	// Make the entry of "a" (first in the root) one of directory 3 ("b"), and "b" one of "a".
	at := binary.LittleEndian.Uint64(data[24:])
	rec := func(s Slot) []byte { return data[at+uint64(s-1)*inodeSize:] }
	le := binary.LittleEndian
	le.PutUint32(rec(2)[68:], 3)                      // parent of "a" is "b"
	le.PutUint64(rec(3)[80:], 0)                      // whose entries begin with that of "a"
	le.PutUint32(rec(3)[88:], 2)                      //
	le.PutUint64(rec(2)[72:], le.Uint64(rec(2)[72:])) // "a" keeps its entry
	reseal(data)
	x := mustNew(t, data)
	if p, err := x.Path(3); !errors.Is(err, ErrCorrupt) {
		t.Errorf("Path in a cycle = %d bytes, %v", len(p), err)
	}
	if err := x.Verify(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("Verify: %v", err)
	}
}

// TestFaultIsAnError cuts a mapped file off, which makes the kernel send SIGBUS for the pages that are gone.
func TestFaultIsAnError(t *testing.T) {
	root := dirNode(0o755, nil)
	for i := range 5000 {
		root.children[fmt.Sprintf("some-file-with-a-name-%d", i)] = fileNode(uint64(i))
	}
	path := filepath.Join(t.TempDir(), "x.idx")
	if err := os.WriteFile(path, writeTree(t, layerOptions(), root), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, verified := range []bool{false, true} {
		t.Run(fmt.Sprintf("verified=%v", verified), func(t *testing.T) {
			copied := filepath.Join(t.TempDir(), "copy.idx")
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(copied, data, 0o600); err != nil {
				t.Fatal(err)
			}
			x, err := Open(copied)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = x.Close() })
			if verified {
				if err := x.Verify(); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Truncate(copied, 2*headerSize); err != nil {
				t.Fatal(err)
			}
			if _, _, err := x.Lookup(Root, "some-file-with-a-name-4999"); !errors.Is(err, ErrFault) {
				t.Errorf("Lookup: %v", err)
			}
			if err := x.ReadDir(Root, 0, 10, &DirBuf{}); !errors.Is(err, ErrFault) {
				t.Errorf("ReadDir: %v", err)
			}
			if err := x.Inode(Slot(x.Inodes()), &Inode{}); !errors.Is(err, ErrFault) {
				t.Errorf("Inode: %v", err)
			}
			if err := x.Verify(); !errors.Is(err, ErrFault) {
				t.Errorf("Verify: %v", err)
			}
		})
	}
}

func TestOpenRefusesWhatIsNoIndex(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, make([]byte, 10000), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{empty, text, dir} {
		if _, err := Open(path); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := Open(filepath.Join(dir, "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

// FuzzIndex overwrites bytes of a good index (three bytes each: offset, value), cuts it, seals it or not, and calls everything.
// Small inputs keep the fuzzer quick: a whole index would be mostly padding.
func FuzzIndex(f *testing.F) {
	good := writeTree(f, layerOptions(), sample())
	at := binary.LittleEndian.Uint64(good[24:])
	f.Add([]byte{}, uint16(0), true)
	f.Add([]byte{0, 24, 7}, uint16(0), true)
	f.Add([]byte{byte(at >> 8), byte(at), 7, byte(at >> 8), 68, 3}, uint16(0), true)
	f.Add([]byte{}, uint16(100), false)
	f.Fuzz(func(t *testing.T, patches []byte, cut uint16, seal bool) {
		data := append([]byte(nil), good[:len(good)-int(cut)%len(good)]...)
		for ; len(patches) >= 3; patches = patches[3:] {
			// The header is at the front, the payload behind the table: the bytes between are checksums and padding.
			i := int(patches[0])<<8 | int(patches[1])
			if i >= 512 {
				i = int(at) + i - 512
			}
			if i < len(data) {
				data[i] = patches[2]
			}
		}
		if seal {
			reseal(data)
		}
		if x, err := New(data); err == nil {
			exercise(x)
		}
	})
}
