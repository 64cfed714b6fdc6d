package layers

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/metadata/chainindex"
)

func chainStack(t testing.TB, s *Store) Stack {
	t.Helper()
	base := layerTar(t, dir("."), dir("d"), file("d/f", "1"), hard("d/g", "d/f"), sym("l", "d/f"), file("gone", "2"))
	top := layerTar(t, file("d/new", "3"), wh("gone"), ent{name: "x", data: "4", x: map[string]string{"user.k": "v"}})
	load(t, s, outerTar(t, oldDocker(t, img{refs: []string{"i"}, layers: [][]byte{base, top}})))
	st, err := s.ImageStack(t.Context(), "i")
	must(t, err)
	return st
}

// damages are ways in which a file can be wrong.
var damages = map[string]func(t testing.TB, path string){
	"missing":   func(t testing.TB, path string) { must(t, os.Remove(path)) },
	"empty":     func(t testing.TB, path string) { must(t, os.Truncate(path, 0)) },
	"truncated": func(t testing.TB, path string) { must(t, os.Truncate(path, fileSize(t, path)-1)) },
	"header":    func(t testing.TB, path string) { flip(t, path, 20) },
	"table":     func(t testing.TB, path string) { flip(t, path, 4097) },
	"payload":   func(t testing.TB, path string) { flip(t, path, 8192+100) },
	"end":       func(t testing.TB, path string) { flip(t, path, fileSize(t, path)-1) },
}

func fileSize(t testing.TB, path string) int64 {
	t.Helper()
	fi, err := os.Stat(path)
	must(t, err)
	return fi.Size()
}

func flip(t testing.TB, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	var b [1]byte
	_, err = f.ReadAt(b[:], off)
	must(t, err)
	b[0] ^= 0x40
	_, err = f.WriteAt(b[:], off)
	must(t, err)
}

// TestDamagedIndexes: whatever happens to an index, it is made anew, and what
// it says is right.
func TestDamagedIndexes(t *testing.T) {
	for name, damage := range damages {
		t.Run("layer "+name, func(t *testing.T) {
			s := openStore(t)
			st := chainStack(t, s)
			for _, d := range st.Lowers {
				damage(t, indexPath(s, d))
			}
			rep, err := s.Check(t.Context(), CheckOptions{})
			must(t, err)
			if len(rep.Findings) != 2 || rep.Findings[0].Invariant != "K23" {
				t.Errorf("check: %+v", rep.Findings)
			}
			sameAsUnion(t, s, st)
			for _, d := range st.Lowers {
				sameAsDirectory(t, s, d)
			}
			clean(t, s)
		})
		t.Run("chain "+name, func(t *testing.T) {
			s := openStore(t)
			st := chainStack(t, s)
			path, _, err := s.ChainIndex(t.Context(), st)
			must(t, err)
			damage(t, path)
			sameAsUnion(t, s, st)
			clean(t, s)
			if name == "missing" {
				return
			}
			damage(t, path)
			rep, err := s.Check(t.Context(), CheckOptions{Repair: true})
			must(t, err)
			if len(rep.Findings) != 1 || rep.Findings[0].Invariant != "K24" || !rep.Findings[0].Fixed {
				t.Errorf("check: %+v", rep.Findings)
			}
			sameAsUnion(t, s, st)
		})
	}
}

// TestForeignIndexes: an index of another layer, of another stack, or of a
// layer that was copied, is not believed.
func TestForeignIndexes(t *testing.T) {
	s := openStore(t)
	st := chainStack(t, s)
	path, id, err := s.ChainIndex(t.Context(), st)
	must(t, err)
	a, b := indexPath(s, st.Lowers[0]), indexPath(s, st.Lowers[1])
	raw, err := os.ReadFile(a)
	must(t, err, os.WriteFile(b, raw, 0o600))
	_, err = s.DropChains(t.Context())
	must(t, err)
	sameAsUnion(t, s, st)
	sameAsDirectory(t, s, st.Lowers[1])
	// The index of another stack under our name.
	other, _, err := s.ChainIndex(t.Context(), Stack{ChainID: st.ChainID, Lowers: st.Lowers[1:]})
	must(t, err)
	if other == path {
		t.Fatal("two stacks have one index")
	}
	must(t, os.Rename(other, path))
	sameAsUnion(t, s, st)
	clean(t, s)
	// The directory is another one, with other inodes.
	d := st.Lowers[1].Path
	must(t, os.Rename(d, d+".old"))
	v, err := openView(t.Context(), []LayerDir{{Path: d + ".old", Dialect: st.Lowers[1].Dialect}})
	must(t, err)
	defer v.Close()
	copyTree(t, d+".old", d)
	must(t, os.RemoveAll(d+".old"))
	_, again, err := s.ChainIndex(t.Context(), st)
	must(t, err)
	if again == id {
		t.Error("a copied layer has the same id")
	}
	sameAsUnion(t, s, st)
}

// copyTree copies a tree as cp -a does, hard links aside.
func copyTree(t testing.TB, from, to string) {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(from, &st))
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		must(t, os.Mkdir(to, 0o755))
		names, err := os.ReadDir(from)
		must(t, err)
		for _, n := range names {
			copyTree(t, filepath.Join(from, n.Name()), filepath.Join(to, n.Name()))
		}
	case unix.S_IFREG:
		b, err := os.ReadFile(from)
		must(t, err, os.WriteFile(to, b, 0o644))
	case unix.S_IFLNK:
		target, err := os.Readlink(from)
		must(t, err, os.Symlink(target, to))
	default:
		must(t, unix.Mknod(to, st.Mode, int(st.Rdev)))
	}
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, to, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW))
}

// TestChainsGoWithTheirLayers: removing an image removes its indexes, gc what is
// left of others, and DropChains all that is not mounted.
func TestChainsGoWithTheirLayers(t *testing.T) {
	s := openStore(t)
	st := chainStack(t, s)
	create(t, s, "i", "c")
	names := func() []string {
		t.Helper()
		list, err := listDir(s.chainsFd)
		must(t, err)
		return list
	}
	for _, st := range []Stack{st, upperOf(t, s, "c"), {ChainID: metaChain(t, s), Lowers: st.Lowers[1:]}} {
		_, _, err := s.ChainIndex(t.Context(), st)
		must(t, err)
	}
	if n := names(); len(n) != 3 {
		t.Fatal(n)
	}
	clean(t, s)
	must(t, s.RemoveContainer(t.Context(), "c"))
	if n := names(); len(n) != 2 {
		t.Error(n)
	}
	_, err := s.RemoveImage(t.Context(), "i", RemoveOptions{})
	must(t, err)
	if n := names(); len(n) != 0 {
		t.Error(n)
	}
	// Left by somebody who died, or was building while the chain was removed.
	stale := strings.Repeat("0", 64) + "-1" + chainExt
	must(t, os.WriteFile(filepath.Join(s.root, chainsName, stale), []byte("x"), 0o600))
	for _, dry := range []bool{true, false} {
		rep, err := s.GC(t.Context(), dry)
		must(t, err)
		if len(rep.Paths) != 1 || (len(names()) == 1) != dry {
			t.Errorf("dry %v: %+v, %v", dry, rep, names())
		}
	}
	clean(t, s)
}

// metaChain is the chainID of the lower layer of chainStack's image.
func metaChain(t testing.TB, s *Store) (chain digest.Digest) {
	t.Helper()
	ls, err := s.Layers(t.Context(), "i")
	must(t, err)
	return ls[0].Parent + ls[1].Parent // one of them has none
}

// TestChainOfNothing: what is no chain has no index, and an error leaves nothing.
func TestChainOfNothing(t *testing.T) {
	s := openStore(t)
	if path, id, err := s.ChainIndex(t.Context(), Stack{}); path != "" || id != "" || err != nil {
		t.Error(path, id, err)
	}
	st := chainStack(t, s)
	s.hook = func(p string) error {
		if p == "before-chain" {
			return errFault
		}
		return nil
	}
	if path, _, err := s.ChainIndex(t.Context(), st); path != "" || !errors.Is(err, errFault) {
		t.Error(path, err)
	}
	s.hook = nil
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := s.ChainIndex(ctx, st); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if n, err := listDir(s.chainsFd); err != nil || len(n) != 0 {
		t.Error(n, err)
	}
}

// TestChainsConcurrently: whoever builds the same index gets the same file.
func TestChainsConcurrently(t *testing.T) {
	s := openStore(t)
	st := chainStack(t, s)
	got := make(chan []byte)
	for range 8 {
		go func() {
			path, _, err := s.ChainIndex(context.Background(), st)
			raw, rerr := os.ReadFile(path)
			if err != nil || rerr != nil {
				raw = nil
			}
			got <- raw
		}()
	}
	first := <-got
	for range 7 {
		if raw := <-got; !bytes.Equal(raw, first) || len(raw) == 0 {
			t.Error("another index")
		}
	}
	x, err := chainindex.New(first)
	must(t, err, x.Verify())
	clean(t, s)
}
