package cow

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

func openDir(t *testing.T, path string) int {
	t.Helper()
	fd, err := fsat.OpenTrusted(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fsat.Close(fd) })
	return fd
}

func newWork(t *testing.T) (w *Work, upper int, dir string) {
	t.Helper()
	dir = t.TempDir()
	for _, d := range []string{"work", "upper"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	w, err := OpenWork(openDir(t, filepath.Join(dir, "work")), WorkOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w, openDir(t, filepath.Join(dir, "upper")), dir
}

func TestBuildRegular(t *testing.T) {
	w, upper, dir := newWork(t)
	content := make([]byte, 3<<20+17)
	rand.New(rand.NewSource(1)).Read(content)
	src := filepath.Join(dir, "src")
	if err := os.WriteFile(src, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(src)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, size := range []int64{0, 1, 4096, 1 << 20, int64(len(content)), int64(len(content)) + 5} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			tmp, err := w.Build(Source{
				Mode: unix.S_IFREG | 0o4751, Uid: os.Getuid(), Gid: os.Getgid(), Data: int(f.Fd()), Size: size,
				SetTimes: true, Atime: unix.Timespec{Sec: 1, Nsec: 2}, Mtime: unix.Timespec{Sec: 3, Nsec: 4},
			})
			if err != nil {
				t.Fatal(err)
			}
			defer tmp.Discard()
			if err := tmp.Publish(upper, "f", 0); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(filepath.Join(dir, "upper", "f"))
			if err != nil {
				t.Fatal(err)
			}
			if want := content[:min(size, int64(len(content)))]; !bytes.Equal(got, want) {
				t.Errorf("copy of %d bytes differs: got %d bytes", size, len(got))
			}
			var st unix.Stat_t
			if err := fsat.Stat(upper, "f", &st); err != nil {
				t.Fatal(err)
			}
			if st.Mode&0o7777 != 0o4751 || st.Mtim != (unix.Timespec{Sec: 3, Nsec: 4}) {
				t.Errorf("mode %o, mtime %v", st.Mode&0o7777, st.Mtim)
			}
		})
	}
	if names, _ := os.ReadDir(filepath.Join(dir, "work", "work")); len(names) != 0 {
		t.Errorf("litter in the workdir: %v", names)
	}
}

func TestHolesStayHoles(t *testing.T) {
	w, upper, dir := newWork(t)
	f, err := os.Create(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = 64 << 20
	for _, at := range []int64{0, 10 << 20, size - 4096} {
		if _, err := f.WriteAt([]byte("data"), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	tmp, err := w.Build(Source{Mode: unix.S_IFREG | 0o644, Uid: os.Getuid(), Gid: os.Getgid(), Data: int(f.Fd()), Size: size})
	if err != nil {
		t.Fatal(err)
	}
	defer tmp.Discard()
	if err := tmp.Publish(upper, "s", 0); err != nil {
		t.Fatal(err)
	}
	var st, orig unix.Stat_t
	if err := fsat.Stat(upper, "s", &st); err != nil {
		t.Fatal(err)
	}
	if err := fsat.Fstat(int(f.Fd()), &orig); err != nil {
		t.Fatal(err)
	}
	if st.Size != size || st.Blocks > 2*orig.Blocks+64 {
		t.Errorf("copy has size %d and %d blocks, the original %d blocks", st.Size, st.Blocks, orig.Blocks)
	}
	a, err := os.ReadFile(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "upper", "s"))
	if err != nil || !bytes.Equal(a, b) {
		t.Errorf("content differs (%v)", err)
	}
}

func TestBuildOtherTypes(t *testing.T) {
	w, upper, _ := newWork(t)
	own := Source{Uid: os.Getuid(), Gid: os.Getgid(), Data: -1}
	for _, tc := range []struct {
		name string
		mod  func(*Source)
	}{
		{"dir", func(s *Source) { s.Mode = unix.S_IFDIR | 0o2750 }},
		{"link", func(s *Source) { s.Mode, s.Target = unix.S_IFLNK|0o777, "/nowhere" }},
		{"fifo", func(s *Source) { s.Mode = unix.S_IFIFO | 0o640 }},
		{"socket", func(s *Source) { s.Mode = unix.S_IFSOCK | 0o600 }},
		{"null", func(s *Source) { s.Mode, s.Rdev = unix.S_IFCHR|0o666, unix.Mkdev(1, 3) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			src := own
			tc.mod(&src)
			if src.Mode&unix.S_IFMT == unix.S_IFCHR && os.Getuid() != 0 {
				t.Skip("needs root to make device nodes")
			}
			tmp, err := w.Build(src)
			if err != nil {
				t.Fatal(err)
			}
			defer tmp.Discard()
			if err := tmp.Publish(upper, tc.name, unix.RENAME_NOREPLACE); err != nil {
				t.Fatal(err)
			}
			var st unix.Stat_t
			if err := fsat.Stat(upper, tc.name, &st); err != nil {
				t.Fatal(err)
			}
			if st.Mode != src.Mode || src.Rdev != 0 && st.Rdev != src.Rdev {
				t.Errorf("mode %o rdev %x, want %o %x", st.Mode, st.Rdev, src.Mode, src.Rdev)
			}
			if src.Target != "" {
				if got, err := fsat.Readlink(upper, tc.name); err != nil || got != src.Target {
					t.Errorf("target %q, %v", got, err)
				}
			}
		})
	}
}

// TestSweep checks the crash table: whatever an earlier mount left in the
// scratch directory is gone, and nothing else is touched.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	litter := filepath.Join(dir, "work", "#1", "deep", "er")
	if err := os.MkdirAll(litter, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(litter, "f"), nil, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir, filepath.Join(dir, "work", "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "keep"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	w, err := OpenWork(openDir(t, dir), WorkOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if names, err := os.ReadDir(filepath.Join(dir, "work")); err != nil || len(names) != 0 {
		t.Errorf("left: %v, %v", names, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "keep")); err != nil {
		t.Error(err)
	}
}

func TestWorkIsLocked(t *testing.T) {
	_, _, dir := newWork(t)
	w2, err := OpenWork(openDir(t, filepath.Join(dir, "work")), WorkOptions{})
	if !errors.Is(err, ErrInUse) {
		t.Errorf("second OpenWork: %v, %v; want ErrInUse", w2, err)
	}
}

func TestDiscardLeavesNothing(t *testing.T) {
	w, _, dir := newWork(t)
	tmp, err := w.Build(Source{Mode: unix.S_IFDIR | 0o700, Uid: os.Getuid(), Gid: os.Getgid(), Data: -1})
	if err != nil {
		t.Fatal(err)
	}
	tmp.Discard()
	if _, err := w.Build(Source{Mode: unix.S_IFREG, Uid: -5, Gid: 1 << 31, Data: -1, Xattrs: []Xattr{{Name: "security.", Value: nil}}}); err == nil {
		t.Error("a build that cannot succeed did")
	}
	if names, _ := os.ReadDir(filepath.Join(dir, "work", "work")); len(names) != 0 {
		t.Errorf("left: %v", names)
	}
}

func TestWhiteoutsAreLinked(t *testing.T) {
	w, upper, _ := newWork(t)
	for i := range 3 {
		if err := w.WhiteoutAt(upper, fmt.Sprint(i)); err != nil {
			t.Skipf("whiteout devices refused: %v", err)
		}
	}
	var st unix.Stat_t
	if err := fsat.Stat(upper, "0", &st); err != nil {
		t.Fatal(err)
	}
	if st.Nlink != 4 { // three names and the one in the workdir
		t.Errorf("link count %d, want 4", st.Nlink)
	}
	if err := w.WhiteoutAt(upper, "0"); err != unix.EEXIST {
		t.Errorf("over an existing name: %v, want EEXIST", err)
	}
}
