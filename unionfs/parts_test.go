package unionfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow"
)

func TestStatus(t *testing.T) {
	fs := &FS{log: zap.NewNop()}
	for _, tc := range []struct {
		err  error
		want unix.Errno
	}{
		{nil, 0},
		{unix.ENOENT, unix.ENOENT},
		{fmt.Errorf("copy up %q: %w", "x", unix.ENOSPC), unix.ENOSPC},
		{fmt.Errorf("wrapped: %w", fmt.Errorf("again: %w", unix.EDQUOT)), unix.EDQUOT},
		{unix.ENOSYS, unix.EOPNOTSUPP}, // the kernel would never ask again
		{errStale, unix.ESTALE},
		{errors.New("anything else"), unix.EIO},
		{cow.ErrInUse, unix.EBUSY},
	} {
		if got := fs.status("test", nil, tc.err); got != fuse.Status(tc.want) {
			t.Errorf("status(%v) = %v, want %v", tc.err, got, tc.want)
		}
	}
}

func TestDeviceNumbers(t *testing.T) {
	for _, d := range [][2]uint32{{0, 0}, {1, 3}, {8, 255}, {8, 256}, {4095, 1 << 19}, {259, 0xfffff}} {
		rdev := unix.Mkdev(d[0], d[1])
		if got := realRdev(wireRdev(rdev)); got != rdev {
			t.Errorf("device %d:%d comes back as %d:%d", d[0], d[1], unix.Major(got), unix.Minor(got))
		}
	}
}

func TestInoMap(t *testing.T) {
	m := newInoMap()
	if got := m.shown(7, 42); got != 42 {
		t.Errorf("the first device's numbers must stay: got %d", got)
	}
	seen := map[uint64]bool{42: true}
	for dev := uint64(8); dev < 12; dev++ {
		got := m.shown(dev, 42)
		if seen[got] {
			t.Errorf("number 42 of device %d collides", dev)
		}
		seen[got] = true
		if again := m.shown(dev, 42); again != got {
			t.Errorf("device %d: %d, then %d", dev, got, again)
		}
	}
}

// acl builds an ACL attribute from tag, permission and id triples.
func acl(entries ...[3]uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, aclVersion)
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return b
}

func TestInheritACL(t *testing.T) {
	const none = ^uint32(0)
	base := acl([3]uint32{aclUserObj, 7, none}, [3]uint32{aclGroupObj, 5, none}, [3]uint32{aclOther, 0, none})
	full := acl([3]uint32{aclUserObj, 7, none}, [3]uint32{2, 6, 1000}, [3]uint32{aclGroupObj, 7, none},
		[3]uint32{aclMask, 7, none}, [3]uint32{aclOther, 5, none})
	masked := acl([3]uint32{aclUserObj, 6, none}, [3]uint32{2, 6, 1000}, [3]uint32{aclGroupObj, 7, none},
		[3]uint32{aclMask, 4, none}, [3]uint32{aclOther, 4, none})
	for _, tc := range []struct {
		name  string
		def   []byte
		mode  uint32
		dir   bool
		want  uint32
		attrs []cow.Xattr
		err   error
	}{
		{"three entries are just a mode", base, 0o666, false, 0o640, nil, nil},
		{"a directory hands it down", base, 0o777, true, 0o750, []cow.Xattr{{Name: aclDefault, Value: base}}, nil},
		{"the mask bounds", full, 0o644, false, 0o644, []cow.Xattr{{Name: aclAccess, Value: masked}}, nil},
		{"special bits stay", base, 0o4755, false, 0o4750, nil, nil},
		{"broken", []byte{1, 2, 3}, 0o644, false, 0, nil, unix.EINVAL},
		{"no base entries", acl([3]uint32{2, 6, 1000}), 0o644, false, 0, nil, unix.EINVAL},
	} {
		t.Run(tc.name, func(t *testing.T) {
			mode, attrs, err := inheritACL(tc.def, tc.mode, tc.dir)
			if mode != tc.want || !errors.Is(err, tc.err) {
				t.Errorf("mode %o, %v; want %o, %v", mode, err, tc.want, tc.err)
			}
			if d := cmp.Diff(tc.attrs, attrs); d != "" {
				t.Errorf("attributes (-want +got):\n%s", d)
			}
		})
	}
}

func TestFdCache(t *testing.T) {
	c := newFdCache(16)
	open := func() (int, error) { return unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0) }
	slots := make([]fdSlot, 64)
	held, err := c.get(&slots[0], false, open)
	if err != nil {
		t.Fatal(err)
	}
	for i := range slots {
		h, err := c.get(&slots[i], false, open)
		if err != nil {
			t.Fatal(err)
		}
		h.release()
	}
	if c.n > 16 {
		t.Errorf("%d descriptors are open, the limit is 16", c.n)
	}
	var st unix.Stat_t
	if err := unix.Fstat(held.fd, &st); err != nil {
		t.Errorf("a descriptor in use was closed: %v", err)
	}
	c.drop(&slots[0])
	if err := unix.Fstat(held.fd, &st); err != nil {
		t.Errorf("a descriptor in use was closed by drop: %v", err)
	}
	fd := held.fd
	held.release()
	if err := unix.Fstat(fd, &st); err != unix.EBADF {
		t.Errorf("a dropped descriptor is still open after its last release (%v)", err)
	}
	c.closeAll()
	if c.n != 0 {
		t.Errorf("%d descriptors left", c.n)
	}
}

// TestFdCacheWritable checks that a descriptor for writing takes the place of
// one for reading, which stays valid for its user, and is never replaced by one.
func TestFdCacheWritable(t *testing.T) {
	c := newFdCache(16)
	open := func() (int, error) { return unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0) }
	var s fdSlot
	ro, err := c.get(&s, false, open)
	if err != nil {
		t.Fatal(err)
	}
	rw, err := c.get(&s, true, open)
	if err != nil {
		t.Fatal(err)
	}
	if ro == rw || !rw.rw {
		t.Error("asked for writing, got the one for reading")
	}
	var st unix.Stat_t
	if err := unix.Fstat(ro.fd, &st); err != nil {
		t.Errorf("the one in use was closed: %v", err)
	}
	again, err := c.get(&s, false, open)
	if err != nil || again != rw {
		t.Errorf("asked for reading, got %+v, %v; want the one for writing", again, err)
	}
	fd := ro.fd
	ro.release()
	if err := unix.Fstat(fd, &st); err != unix.EBADF {
		t.Errorf("the replaced one is still open after its last release (%v)", err)
	}
	rw.release()
	again.release()
	c.closeAll()
	if c.n != 0 {
		t.Errorf("%d descriptors left", c.n)
	}
}

func TestFdCacheOutOfDescriptors(t *testing.T) {
	c := newFdCache(16)
	slots := make([]fdSlot, 8)
	for i := range slots {
		h, err := c.get(&slots[i], false, func() (int, error) { return unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
		if err != nil {
			t.Fatal(err)
		}
		h.release()
	}
	tries := 0
	var s fdSlot
	h, err := c.get(&s, false, func() (int, error) {
		if tries++; tries == 1 {
			return -1, unix.EMFILE
		}
		return unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		t.Fatalf("the cache did not make room: %v", err)
	}
	h.release()
	c.closeAll()
}
