package layers

import (
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plyfs/plyfs/metadata/metatest"
)

var (
	flagDamages = flag.Int("damages", 60, "how many stores TestRandomDamage damages")
	flagSeed    = flag.Uint64("damage.seed", 0, "seed of TestRandomDamage; 0: another one each time")
)

// damageDisk does something bad to one object of a store that is not a user's data, and
// says what.
func damageDisk(t testing.TB, rng *rand.Rand, root string) string {
	t.Helper()
	var paths []string
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(root, p)
		switch {
		case err != nil:
			return err
		case rel == "." || rel == "rw": // holds data of users
		case filepath.Dir(rel) == "rw":
			paths = append(paths, p+"/"+containerDoc, p+"/"+workName)
			return fs.SkipDir
		default:
			paths = append(paths, p)
		}
		return nil
	})
	must(t, err)
	p := paths[rng.IntN(len(paths))]
	rel, _ := filepath.Rel(root, p)
	st, err := os.Lstat(p)
	must(t, err)
	regular := st.Mode().IsRegular()
	switch k := rng.IntN(7); {
	case k == 0 && regular:
		must(t, os.Truncate(p, 0))
		return "emptied " + rel
	case k == 1 && regular && st.Size() > 0:
		must(t, os.Truncate(p, rng.Int64N(st.Size())))
		return "truncated " + rel
	case k == 2 && regular && st.Size() > 0:
		f, err := os.OpenFile(p, os.O_WRONLY, 0)
		must(t, err)
		for range 1 + rng.IntN(30) {
			_, err := f.WriteAt([]byte{byte(rng.Uint32())}, rng.Int64N(st.Size()))
			must(t, err)
		}
		must(t, f.Close())
		return "changed bytes of " + rel
	case k == 3 && regular && st.Size() > 0:
		must(t, os.WriteFile(p, []byte(strings.Repeat("garbage ", 1+rng.IntN(2000))), 0o600))
		return "overwrote " + rel
	case k == 4:
		must(t, os.RemoveAll(p))
		if regular {
			must(t, os.Mkdir(p, 0o700))
			return "made a directory of " + rel
		}
		must(t, os.WriteFile(p, []byte("x"), 0o600))
		return "made a file of " + rel
	case k == 5 && st.IsDir():
		n := filepath.Join(p, []string{"added", newID(), ".wh.x", strings.Repeat("c", 64) + ".json"}[rng.IntN(4)])
		must(t, os.WriteFile(n, []byte("{}"), 0o600))
		return "added something to " + rel
	default:
		must(t, os.RemoveAll(p))
		return "removed " + rel
	}
}

// damageRow does something bad to one row, or to a whole bucket.
func damageRow(t testing.TB, rng *rand.Rand, db string) (what string) {
	t.Helper()
	buckets := []string{
		"layers", "cache", "configs", "images", "refs", "containers", "meta", "cache_chain", "cache_diff", "layer_child", "layer_diff",
		"image_chain", "ref_image", "container_name", "container_chain", "container_image", "container_mount", "layer_brief", "lease_layer", "live",
		"manifests", "blobs", "buildcache",
	}
	metatest.Edit(t, db, func(b metatest.Buckets) {
		bucket := buckets[rng.IntN(len(buckets))]
		keys := b.Keys(bucket)
		if len(keys) == 0 {
			b.Put(bucket, "stray\x00row", []byte("{}"))
			what = "a stray row in " + bucket
			return
		}
		k := keys[rng.IntN(len(keys))]
		v := b.Get(bucket, k)
		switch rng.IntN(6) {
		case 0:
			b.Delete(bucket, k)
			what = fmt.Sprintf("removed %s %.60q", bucket, k)
		case 1:
			b.Put(bucket, k, []byte("nonsense"))
			what = fmt.Sprintf("nonsense in %s %.60q", bucket, k)
		case 2:
			b.Put(bucket, k, []byte("{}"))
			what = fmt.Sprintf("nothing in %s %.60q", bucket, k)
		case 3:
			b.Put(bucket, keys[rng.IntN(len(keys))], v)
			what = fmt.Sprintf("the row of another in %s", bucket)
		case 4:
			for _, k := range keys {
				b.Delete(bucket, k)
			}
			what = "removed all of " + bucket
		case 5:
			if bucket == "refs" { // which it may be
				bucket = "layers"
				k = b.Keys(bucket)[0]
				v = b.Get(bucket, k)
			}
			b.Put(bucket, strings.Replace(k, "a", "b", 1), v)
			what = fmt.Sprintf("a second row like %s %.60q", bucket, k)
		}
	})
	return what
}

// TestRandomDamage damages a store anywhere. Commands go on or say what to do; a repair
// never fails and leaves nothing but what a load heals; and after the load everything is
// there again.
func TestRandomDamage(t *testing.T) {
	needRoot(t)
	seed := *flagSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	for i := range *flagDamages {
		t.Run(fmt.Sprint(seed+uint64(i)), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed+uint64(i), 0))
			p := newPatient(t)
			root := p.s.root
			must(t, p.s.Close())
			// Mostly one thing. Two may take away a thing and its copy.
			times := 1 + max(0, rng.IntN(4)-2)
			what := ""
			for range times {
				if db := filepath.Join(root, dbName); rng.IntN(2) == 0 && (what == "" || metatest.Whole(db)) {
					what += damageRow(t, rng, db) + "; "
				} else {
					what += damageDisk(t, rng, root) + "; "
				}
			}
			t.Log(what)
			s, err := Open(t.Context(), root, Options{Damaged: true})
			if err != nil {
				t.Fatalf("%s: open: %v", what, err)
			}
			defer s.Close()
			p.s = s
			// Whatever is wrong: no panic, no hang.
			_, _ = s.Images(t.Context(), "")
			_, _ = s.Containers(t.Context())
			_, _ = s.DiskUsage(t.Context())
			_, _ = s.GC(t.Context(), true)
			p.check(t, CheckOptions{Deep: true})
			rep := p.check(t, CheckOptions{Deep: true, Repair: true})
			open := invariants(rep, true)
			again := p.check(t, CheckOptions{Deep: true, Repair: true})
			if got := invariants(again, false); !slices.Equal(got, open) {
				t.Errorf("%s: repaired: %s\na second repair finds: %s", what, asJSON(rep.Findings), asJSON(again.Findings))
			}
			for _, f := range again.Findings {
				if f.Open() && len(f.Images) == 0 && times == 1 {
					t.Errorf("%s: remains without a way to heal it: %s", what, asJSON(f))
				}
			}
			load(t, s, p.archive)
			p.check(t, CheckOptions{Repair: true})
			if b, err := os.ReadFile(p.upper); string(b) != "of a user" {
				lost := glob(t, root, lostName, "*", upperName, "data")
				if times == 1 || len(lost) != 1 {
					t.Error("the user's data:", err)
				}
			}
			if times == 1 {
				p.healthy(t)
			}
			if t.Failed() {
				t.Errorf("after %s", what)
			}
		})
	}
}

// TestRepairWithoutOriginal loses the database and more. What no archive has is kept.
func TestRepairWithoutOriginal(t *testing.T) {
	needRoot(t)
	for name, damage := range map[string]struct {
		do    func(t *testing.T, p *patient, low string)
		whole bool // without a load
	}{
		"the record of the lowest layer is damaged": {func(t *testing.T, p *patient, low string) {
			must(t, os.WriteFile(filepath.Join(low, splitName), []byte("garbage"), 0o600))
		}, true},
		"the lowest layer is gone": {func(t *testing.T, p *patient, low string) { must(t, os.RemoveAll(low)) }, false},
		"a sidecar is gone, but there is a copy of the database": {func(t *testing.T, p *patient, low string) {
			must(t, os.Remove(filepath.Join(low, sidecarName)))
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPatient(t)
			res, err := p.s.Commit(t.Context(), "c", "mine:1", CommitOptions{})
			must(t, err)
			_, err = p.s.CopyDatabase(t.Context())
			must(t, err)
			low := filepath.Join(p.s.root, layersName, p.layer(t, 0).CacheID)
			must(t, p.s.Close())
			must(t, os.Remove(p.db()))
			damage.do(t, p, low)
			s, err := Open(t.Context(), p.s.root, Options{Damaged: true})
			must(t, err)
			defer s.Close()
			p.s = s
			p.check(t, CheckOptions{Repair: true})
			_, err = s.GC(t.Context(), false)
			must(t, err)
			data := func() bool {
				st, err := s.ImageStack(t.Context(), "mine:1")
				if err != nil {
					return false
				}
				b, err := os.ReadFile(filepath.Join(st.Lowers[0].Path, "data"))
				return err == nil && string(b) == "of a user"
			}
			if got := data(); got != damage.whole {
				t.Errorf("the committed image can be used: %v", got)
			}
			load(t, s, p.archive)
			p.check(t, CheckOptions{Repair: true})
			if !data() {
				t.Error("the committed image is lost")
			}
			clean(t, s)
			if img, err := s.ResolveImage(t.Context(), "mine:1"); err != nil || img.ID != res.ID {
				t.Error(img.ID, err)
			}
		})
	}
}

// TestOldDatabase puts an old database in the place of the present one, as from a backup.
// What came later is found beside it.
func TestOldDatabase(t *testing.T) {
	needRoot(t)
	for range 5 { // names of directories are random, and so is the order in which they are looked at
		p := newPatient(t)
		old, err := p.s.CopyDatabase(t.Context())
		must(t, err)
		old2 := filepath.Join(t.TempDir(), "old")
		must(t, os.Rename(old, old2))
		load(t, p.s, outerTar(t, oldDocker(t, img{refs: []string{"late:1"}, layers: [][]byte{layerTar(t, file("l", "1")), layerTar(t, file("m", "2")), layerTar(t, file("n", "3"))}})))
		c := create(t, p.s, "late:1", "late")
		must(t, os.WriteFile(filepath.Join(c.Upper, "later"), []byte("of a user"), 0o600))
		_, err = p.s.Commit(t.Context(), "late", "committed:1", CommitOptions{})
		must(t, err)
		p.images = append(p.images, "late:1", "committed:1")
		slices.Sort(p.images)
		must(t, p.s.Close())
		must(t, os.Rename(old2, p.db()))
		p.s, err = Open(t.Context(), p.s.root, Options{})
		must(t, err)
		defer p.s.Close()
		_, err = p.s.GC(t.Context(), false) // nothing of what may come back
		must(t, err)
		rep := p.check(t, CheckOptions{Deep: true, Repair: true})
		if open := invariants(rep, true); len(open) > 0 {
			t.Error(asJSON(rep.Findings))
		}
		p.healthy(t)
		if c, err := p.s.Container(t.Context(), "late"); err != nil {
			t.Error(err)
		} else if b, err := os.ReadFile(filepath.Join(c.Upper, "later")); string(b) != "of a user" {
			t.Error(err)
		}
	}
}
