package layers

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

var (
	hostileSeed  = flag.Uint64("hostile.seed", 1, "first seed of TestHostileLayers")
	hostileSeeds = flag.Uint64("hostile.seeds", 60, "number of seeds of TestHostileLayers")
)

// hostileLayer is a tar by somebody who wants out: few names, so that entries meet
// each other and those of other layers, and every trick with them.
func hostileLayer(t testing.TB, r *rand.Rand, outside string) []byte {
	pick := func(of ...string) string { return of[r.IntN(len(of))] }
	component := func() string {
		if r.IntN(60) == 0 {
			return pick("..", ".wh.", ".wh..", ".wh..wh..", "x\x00y", strings.Repeat("n", 256))
		}
		return pick("a", "a", "b", "b", "c", "A", "l", "l", "m", ".wh.a", ".wh.l", ".wh..wh..opq", ".wh..wh.plnk", ".wh..wh.aufs", ".", "", "\xff\xfe", "a\\b", "etc")
	}
	name := func() string {
		var p []string
		for range 1 + r.IntN(3) {
			p = append(p, component())
		}
		return pick("", "", "./", "/", "//") + strings.Join(p, "/")
	}
	target := func() string {
		return pick("a", "b", "../b", "a/b", "/", "/a", "l", "m/..", "..", "../..", "../../../../../../../..", outside, outside+"/secret", "../../../../../.."+outside,
			"/proc/self/root"+outside, "/proc/self/cwd", ".", "")
	}
	var ents []ent
	for range 1 + r.IntN(12) {
		e := ent{name: name(), mode: int64([]int{0, 0o644, 0o755, 0o4755, 0o2755, 0o1777, 0o7777}[r.IntN(7)]), uid: r.IntN(3) * 1000, gid: r.IntN(3) * 1000}
		switch r.IntN(20) {
		case 0, 1, 2, 3, 4, 5:
			e.data = pick("", "x", "data", strings.Repeat("long", 300))
		case 6, 7, 8, 9:
			e.typ, e.name = tar.TypeDir, e.name+"/"
		case 10, 11, 12, 13:
			e.typ, e.link = tar.TypeSymlink, target()
		case 14, 15, 16:
			e.typ, e.link = tar.TypeLink, pick(target(), name())
		case 17:
			e.typ, e.maj, e.min = tar.TypeChar, int64(r.IntN(2)), int64(r.IntN(4))
		case 18:
			e.typ = tar.TypeFifo
		case 19:
			e.typ, e.maj = tar.TypeBlock, 7
		}
		if r.IntN(4) == 0 {
			e.x = map[string]string{
				pick("trusted.overlay.opaque", "user.overlay.opaque", "trusted.overlay.whiteout", "user.overlay.whiteout"):        "y",
				pick("trusted.overlay.redirect", "user.overlay.redirect"):                                                         pick("/a", "../a", outside),
				pick("trusted.overlay.metacopy", "user.overlay.metacopy", "trusted.overlay.origin"):                               "",
				pick("user.containers.override_stat", "user.fuseoverlayfs.override_stat", "security.fuseoverlayfs.override_stat"): pick("0:0:4755", "0:0:0644:block-7-0", "x"),
				pick("user.fuseoverlayfs.opaque", "user.fuseoverlayfs.origin"):                                                    "y",
				"user.plain": "1",
			}
		}
		ents = append(ents, e)
	}
	return hostileTar(t, ents)
}

// hostileTar writes what archive/tar agrees to write of the entries.
func hostileTar(t testing.TB, ents []ent) []byte {
	var ok []ent
	for _, e := range ents {
		if testing.Verbose() {
			t.Logf("%c %q -> %q %q mode %o %d:%d %v", max(e.typ, '0'), e.name, e.link, e.data[:min(len(e.data), 10)], e.mode, e.uid, e.gid, e.x)
		}
		if strings.Contains(e.name+e.link, "\x00") {
			e.name, e.link = strings.ReplaceAll(e.name, "\x00", "0"), strings.ReplaceAll(e.link, "\x00", "0")
		}
		if e.typ != tar.TypeDir {
			e.name = strings.TrimRight(e.name, "/")
		}
		if e.typ == tar.TypeSymlink || e.typ == tar.TypeLink {
			e.data = ""
		}
		ok = append(ok, e)
	}
	return layerTar(t, ok...)
}

// TestHostileLayers loads images that try everything, as root and without
// privileges. Either there is an error, one that says what is wrong with the image, and
// the store is as it was; or the image is what its layers say, in both kinds of
// stores the same, and comes out again byte for byte. Nothing outside of the store is
// read or written in any case.
func TestHostileLayers(t *testing.T) {
	base := t.TempDir()
	outside := filepath.Join(base, "outside")
	must(t, os.Mkdir(outside, 0o755), os.WriteFile(outside+"/secret", []byte("the secret of the host"), 0o600),
		os.Mkdir(outside+"/a", 0o755), os.WriteFile(outside+"/a/b", nil, 0o644))
	before := dumpWithTimes(t, outside)
	loaded, refused := 0, 0
	for seed := *hostileSeed; seed < *hostileSeed+*hostileSeeds; seed++ {
		r := rand.New(rand.NewPCG(seed, 0))
		im := img{refs: []string{"x"}}
		for range 1 + r.IntN(3) {
			im.layers = append(im.layers, hostileLayer(t, r, outside))
		}
		fail := func(format string, a ...any) {
			t.Helper()
			t.Errorf("-hostile.seed=%d: %s", seed, fmt.Sprintf(format, a...))
		}
		var exports [][]string
		for _, open := range []func(testing.TB) *Store{openStore, userStore} {
			s := open(t)
			_, err := s.Load(t.Context(), Source{Reader: bytes.NewReader(outerTar(t, oldDocker(t, im)))}, LoadOptions{})
			clean(t, s)
			if t.Failed() {
				t.Fatalf("-hostile.seed=%d", seed)
			}
			if n := len(listLayers(t, s)); err != nil && n != 0 {
				fail("%d layers are left after %v", n, err)
			}
			if err != nil {
				if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrInvalid) {
					fail("%v", err)
				}
				exports = append(exports, []string{"refused"})
				refused++
				must(t, s.Close())
				continue
			}
			loaded++
			var saved, tree bytes.Buffer
			if err := s.Save(t.Context(), &saved, []string{"x"}, SaveOptions{}); err != nil {
				fail("save: %v", err)
			}
			blobs := blobsOf(t, saved.Bytes())
			for i, l := range im.layers {
				if !bytes.Equal(l, blobs[blobPath(digest.FromBytes(l))]) {
					fail("layer %d comes out with other bytes", i+1)
				}
			}
			if err := s.Export(t.Context(), "x", &tree); err != nil {
				fail("export: %v", err)
			}
			if bytes.Contains(tree.Bytes(), []byte("the secret of the host")) {
				fail("a file of the host is in the image")
			}
			exports = append(exports, entryLines(t, tree.Bytes()))
			names, err := os.ReadDir(s.root)
			must(t, err)
			for _, n := range names {
				if !slices.Contains([]string{layersName, chainsName, stageName, rwName, trashName, copiesName, imagesName, blobsName, dbName, reserveName}, n.Name()) {
					fail("%s is in the store", n.Name())
				}
			}
			must(t, s.Close())
		}
		if os.Geteuid() == 0 {
			if d := cmp.Diff(exports[0], exports[1]); d != "" {
				fail("- root, + without privileges:\n%s", d)
			}
		}
		if d := cmp.Diff(before, dumpWithTimes(t, outside)); d != "" {
			t.Fatalf("-hostile.seed=%d: outside of the store: %s", seed, d)
		}
	}
	if *hostileSeeds >= 50 && (loaded < 20 || refused < 20) {
		t.Errorf("%d loaded, %d refused: the images are not what this test is for", loaded, refused)
	}
}

// dumpWithTimes is dump, and notices every change.
func dumpWithTimes(t testing.TB, root string) string {
	t.Helper()
	out := dump(t, root)
	must(t, filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		var st unix.Stat_t
		out += fmt.Sprintln(p, unix.Lstat(p, &st), st.Ctim, st.Nlink)
		return err
	}))
	return out
}
