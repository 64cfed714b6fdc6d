package layers

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/metadata/metatest"
)

// patient is a store with two images that share layers, one of which is bound to the
// layers below it, and a container with data.
type patient struct {
	s       *Store
	archive []byte
	images  []string
	upper   string // a file of the container
	c       *Container
}

func newPatient(t testing.TB) *patient {
	s := openStore(t)
	low := layerTar(t, dir("."), dir("d"), file("d/f", "content of f"), file("d/g", "2"), sym("link", "d/f"), dir("gone"), file("gone/x", "x"),
		ent{name: "x", data: "with an attribute", mode: 0o640, x: map[string]string{"user.note": "a"}}, hard("hard", "d/f"))
	mid := layerTar(t, file("d/new", strings.Repeat("n", 5000)), wh("gone/x"))
	p := &patient{s: s, images: []string{"base:latest", "other:1"}}
	p.archive = outerTar(t, oldDocker(t,
		img{refs: []string{"base"}, layers: [][]byte{low, mid, layerTar(t, file("top", "t"))}},
		img{refs: []string{"other:1"}, layers: [][]byte{low, layerTar(t, file("other", "o"))}}))
	load(t, s, p.archive)
	p.c = create(t, s, "base", "c")
	p.upper = filepath.Join(p.c.Upper, "data")
	must(t, os.WriteFile(p.upper, []byte("of a user"), 0o600))
	clean(t, s)
	return p
}

// layer returns the n-th layer of the first image, from below.
func (p *patient) layer(t testing.TB, n int) LayerInfo {
	ls, err := p.s.Layers(t.Context(), p.images[0])
	must(t, err)
	return ls[n]
}

// initDir returns the directory of the container's init layer.
func (p *patient) initDir(t testing.TB) string {
	st, err := p.s.ContainerStack(t.Context(), "c")
	must(t, err)
	return st.Lowers[0].Path
}

func (p *patient) db() string { return filepath.Join(p.s.root, dbName) }

func (p *patient) edit(t testing.TB, fn func(metatest.Buckets)) { metatest.Edit(t, p.db(), fn) }

// invariants are those of the findings that are open, or warnings if severity says so.
func invariants(rep *Report, open bool) []string {
	var out []string
	for _, f := range rep.Findings {
		if f.Severity != SeverityWarning && (!open || !f.Fixed) {
			out = append(out, f.Invariant)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (p *patient) check(t testing.TB, o CheckOptions) *Report {
	t.Helper()
	rep, err := p.s.Check(t.Context(), o)
	must(t, err)
	return rep
}

// healthy says whether everything is there that the patient had.
func (p *patient) healthy(t testing.TB) {
	t.Helper()
	clean(t, p.s)
	list, err := p.s.Images(t.Context(), "")
	must(t, err)
	var names []string
	for _, i := range list {
		names = append(names, i.Repository+":"+i.Tag)
		var out bytes.Buffer
		if err := p.s.Save(t.Context(), &out, []string{i.ID.String()}, SaveOptions{}); err != nil {
			t.Error("save:", err)
		}
	}
	sort.Strings(names)
	if !slices.Equal(names, p.images) {
		t.Errorf("images %v, expected %v", names, p.images)
	}
	st, err := p.s.ContainerStack(t.Context(), "c")
	if err != nil || len(st.Lowers) != 4 {
		t.Error("container:", st, err)
	}
	if b, err := os.ReadFile(p.upper); string(b) != "of a user" {
		t.Error("the user's data:", err)
	}
}

// TestRepair damages a store in each way the check knows, and has it repaired.
func TestRepair(t *testing.T) {
	for _, tc := range []struct {
		name    string
		deep    bool   // only a deep check finds it
		finds   string // invariants; others may follow from the damage
		reload  bool   // the archive has to be loaded again
		changes bool   // something is lost for good: no look whether all is there
		do      func(t *testing.T, p *patient)
	}{
		{"K1 database missing", false, "K1", false, false, func(t *testing.T, p *patient) { must(t, os.Remove(p.db())) }},
		{"K1 database empty", false, "K1", false, false, func(t *testing.T, p *patient) { must(t, os.Truncate(p.db(), 0)) }},
		{"K1 database truncated", false, "K1", false, false, func(t *testing.T, p *patient) { must(t, os.Truncate(p.db(), 9000)) }},
		{"K1 database of garbage", false, "K1", false, false, func(t *testing.T, p *patient) {
			must(t, os.WriteFile(p.db(), bytes.Repeat([]byte("garbage "), 10000), 0o600))
		}},
		{"K1 database zeroed", false, "K1", false, false, func(t *testing.T, p *patient) {
			st, err := os.Stat(p.db())
			must(t, err, os.WriteFile(p.db(), make([]byte, st.Size()), 0o600))
		}},
		{"K1 database's pages zeroed", false, "K1", false, false, func(t *testing.T, p *patient) {
			raw, err := os.ReadFile(p.db())
			must(t, err)
			clear(raw[8192:])
			must(t, os.WriteFile(p.db(), raw, 0o600))
		}},
		{"K1 a bucket is missing", false, "K1", false, false, func(t *testing.T, p *patient) {
			p.edit(t, func(b metatest.Buckets) { b.DropBucket("layers") })
		}},
		{"K27 row of another", false, "K27", false, false, func(t *testing.T, p *patient) {
			c := p.layer(t, 1).ChainID.String()
			p.edit(t, func(b metatest.Buckets) {
				raw := b.Get("layers", c)
				b.Delete("layers", c)
				b.Put("layers", "sha256:"+strings.Repeat("a", 64), raw)
			})
		}},
		{"K3 chainID", false, "K3", false, false, func(t *testing.T, p *patient) {
			l := p.layer(t, 1)
			p.edit(t, func(b metatest.Buckets) {
				b.Put("layers", l.ChainID.String(), bytes.Replace(b.Get("layers", l.ChainID.String()), []byte(l.DiffID), []byte("sha256:"+strings.Repeat("a", 64)), 1))
			})
		}},
		{"K4 parent missing", false, "K4 K9", false, false, func(t *testing.T, p *patient) {
			c := p.layer(t, 0).ChainID.String()
			p.edit(t, func(b metatest.Buckets) { b.Delete("layers", c) })
		}},
		{"K4 depth", false, "K4", false, false, func(t *testing.T, p *patient) {
			p.edit(t, func(b metatest.Buckets) { b.Replace("layers", `"depth":2`, `"depth":7`) })
		}},
		{"K4 circle", false, "K3 K9", false, false, func(t *testing.T, p *patient) {
			c, top := p.layer(t, 0).ChainID.String(), p.layer(t, 1).ChainID.String()
			p.edit(t, func(b metatest.Buckets) {
				raw := bytes.Replace(b.Get("layers", c), []byte(`"cacheID"`), []byte(`"parent":"`+top+`","cacheID"`), 1)
				b.Put("layers", c, raw)
			})
		}},
		{"K5 content row missing", false, "K5 K9", false, false, func(t *testing.T, p *patient) {
			id := p.layer(t, 1).CacheID
			p.edit(t, func(b metatest.Buckets) { b.Delete("cache", id) })
		}},
		{"K5 directory missing", false, "K5", true, false, func(t *testing.T, p *patient) {
			must(t, removeTree(p.s.layersFd, p.layer(t, 0).CacheID))
		}},
		{"K5 content missing", false, "K5", true, false, func(t *testing.T, p *patient) {
			must(t, os.RemoveAll(p.layer(t, 1).Path))
		}},
		{"K5 init layer missing", false, "K5", false, false, func(t *testing.T, p *patient) {
			must(t, os.RemoveAll(filepath.Dir(p.initDir(t))))
		}},
		{"K6 sidecar missing", false, "K6", false, false, func(t *testing.T, p *patient) {
			must(t, os.Remove(filepath.Join(filepath.Dir(p.layer(t, 0).Path), sidecarName)))
		}},
		{"K6 image sidecar missing", false, "K6", false, false, func(t *testing.T, p *patient) {
			must(t, os.RemoveAll(filepath.Join(p.s.root, imagesName)), os.Mkdir(filepath.Join(p.s.root, imagesName), 0o700), p.reopen(t))
		}},
		{"K6 image sidecar of garbage", false, "K6", false, false, func(t *testing.T, p *patient) {
			for _, n := range glob(t, p.s.root, imagesName, "*") {
				must(t, os.WriteFile(n, []byte("{"), 0o600))
			}
		}},
		{"K6 image sidecar is a directory", false, "K6", false, false, func(t *testing.T, p *patient) {
			must(t, os.Mkdir(filepath.Join(p.s.root, imagesName, "x"), 0o700))
		}},
		{"K6 container sidecar missing", false, "K6", false, false, func(t *testing.T, p *patient) {
			must(t, os.Remove(filepath.Join(filepath.Dir(p.c.Upper), containerDoc)))
		}},
		{"K6 image row missing", false, "K12 K13 K6 K9", false, false, func(t *testing.T, p *patient) {
			p.edit(t, func(b metatest.Buckets) {
				for _, k := range b.Keys("images") {
					b.Delete("images", k)
					b.Delete("configs", k)
				}
			})
		}},
		{"K7 rows of layers missing", false, "K11 K13 K7 K9", false, false, func(t *testing.T, p *patient) {
			p.edit(t, func(b metatest.Buckets) {
				for _, k := range b.Keys("layers") {
					b.Delete("layers", k)
				}
			})
		}},
		{"K7 K13 all rows of layers missing", false, "K11 K13 K7 K9", false, false, func(t *testing.T, p *patient) {
			p.edit(t, func(b metatest.Buckets) {
				for _, bucket := range []string{"layers", "cache"} {
					for _, k := range b.Keys(bucket) {
						b.Delete(bucket, k)
					}
				}
			})
		}},
		{"K7 stray directory", false, "K7", false, false, func(t *testing.T, p *patient) {
			must(t, os.Mkdir(filepath.Join(p.s.root, layersName, newID()), 0o700))
		}},
		{"K7 renamed directory", false, "K5 K7", false, false, func(t *testing.T, p *patient) {
			must(t, os.Rename(filepath.Join(p.s.root, layersName, p.layer(t, 1).CacheID), filepath.Join(p.s.root, layersName, "set aside")))
		}},
		{"K8 stray stage", false, "K8", false, false, func(t *testing.T, p *patient) {
			must(t, os.Mkdir(filepath.Join(p.s.root, stageName, newID()), 0o700))
		}},
		{"K9 indexes", false, "K9", false, false, func(t *testing.T, p *patient) {
			p.edit(t, func(b metatest.Buckets) {
				for _, bucket := range []string{"image_chain", "layer_child", "ref_image", "layer_brief"} {
					for _, k := range b.Keys(bucket) {
						b.Delete(bucket, k)
					}
					b.Put(bucket, "a\x00b", nil)
				}
			})
		}},
		{"K10 config missing", false, "K10", false, false, func(t *testing.T, p *patient) {
			p.edit(t, func(b metatest.Buckets) { b.Delete("configs", b.Keys("configs")[0]) })
		}},
		{"K10 config changed", false, "K10 K11", false, false, func(t *testing.T, p *patient) {
			p.edit(t, func(b metatest.Buckets) {
				b.Replace("configs", "sha256:", "sha256:0")
			})
		}},
		{"K10 config without an image", false, "K10 K12 K13 K9", false, false, func(t *testing.T, p *patient) {
			p.edit(t, func(b metatest.Buckets) {
				for _, k := range b.Keys("images") {
					b.Delete("images", k)
				}
			})
		}},
		{"K11 other top layer", false, "K11 K9", false, false, func(t *testing.T, p *patient) {
			low := p.layer(t, 0).ChainID.String()
			top := p.layer(t, 2).ChainID.String()
			p.edit(t, func(b metatest.Buckets) { b.Replace("images", top, low) })
		}},
		{"K12 reference to nothing", false, "K12 K9", false, false, func(t *testing.T, p *patient) {
			p.edit(t, func(b metatest.Buckets) {
				b.Put("refs", "docker.io/library/none:1", []byte(`{"imageID":"sha256:`+strings.Repeat("b", 64)+`"}`))
			})
		}},
		{"K13 work missing", false, "K13", false, false, func(t *testing.T, p *patient) {
			must(t, os.RemoveAll(filepath.Join(filepath.Dir(p.c.Upper), workName)))
		}},
		{"K13 upper missing", false, "K13", false, true, func(t *testing.T, p *patient) { must(t, os.RemoveAll(p.c.Upper)) }},
		{"K13 marked broken", false, "K13", false, false, func(t *testing.T, p *patient) {
			p.edit(t, func(b metatest.Buckets) { b.Replace("containers", `"ready"`, `"broken"`) })
		}},
		{"K14 row of the container missing", false, "K14 K9", false, false, func(t *testing.T, p *patient) {
			p.edit(t, func(b metatest.Buckets) { b.Delete("containers", b.Keys("containers")[0]) })
		}},
		{"K14 upper of nobody", false, "K14", false, false, func(t *testing.T, p *patient) {
			must(t, os.MkdirAll(filepath.Join(p.s.root, rwName, newID(), upperName), 0o700))
		}},
		{"K15 dead mount", false, "K15", false, false, func(t *testing.T, p *patient) {
			chain := p.layer(t, 0).ChainID
			must(t, p.s.update(t.Context(), func(tx *metadata.Tx) error {
				return tx.PutLive(metadata.Live{Target: "/m", BootID: "another", ImageID: chain, ChainID: chain, Pid: 1})
			}))
		}},
		{"K16 dead work", false, "K16", false, false, func(t *testing.T, p *patient) {
			must(t, p.s.update(t.Context(), func(tx *metadata.Tx) error {
				return tx.AddIngest(metadata.Ingest{ID: newID(), Owner: metadata.Owner{BootID: "another"}})
			}), p.s.update(t.Context(), func(tx *metadata.Tx) error {
				return tx.AddLease(metadata.Lease{ID: "x", Owner: metadata.Owner{BootID: "another"}})
			}))
		}},
		{"K18 trash row outside", false, "K18", false, false, func(t *testing.T, p *patient) {
			must(t, p.s.update(t.Context(), func(tx *metadata.Tx) error {
				_, err := addTrash(tx, "", "../outside/x")
				return err
			}))
		}},
		{"K18 trash without a row", false, "K18", false, false, func(t *testing.T, p *patient) {
			must(t, os.Mkdir(filepath.Join(p.s.root, trashName, "x.9"), 0o700))
		}},
		{"K19 content changed", true, "K19", true, false, func(t *testing.T, p *patient) {
			same := p.layer(t, 0).Path + "/d/f"
			st, err := os.Stat(same)
			must(t, err, os.WriteFile(same, []byte("CONTENT OF F"), 0o600), os.Chtimes(same, st.ModTime(), st.ModTime()))
		}},
		{"K20 file added", true, "K20", false, false, func(t *testing.T, p *patient) {
			must(t, os.WriteFile(p.layer(t, 0).Path+"/added", nil, 0o600))
		}},
		{"K20 empty directory added", true, "K20", false, false, func(t *testing.T, p *patient) {
			must(t, os.Mkdir(p.layer(t, 1).Path+"/d/added", 0o700))
		}},
		{"K20 mode", true, "K20", false, false, func(t *testing.T, p *patient) { must(t, os.Chmod(p.layer(t, 0).Path+"/d/g", 0o4755)) }},
		{"K20 mode of a directory", true, "K20", false, false, func(t *testing.T, p *patient) { must(t, os.Chmod(p.layer(t, 0).Path+"/d", 0o777)) }},
		{"K20 mode of a directory the tar does not mention", true, "K20", false, false, func(t *testing.T, p *patient) {
			must(t, os.Chmod(p.layer(t, 1).Path+"/d", 0o777))
		}},
		{"K20 owner", true, "K20", false, false, func(t *testing.T, p *patient) { must(t, os.Chown(p.layer(t, 0).Path+"/d/g", 5, 6)) }},
		{"K20 time", true, "K20", false, false, func(t *testing.T, p *patient) {
			must(t, os.Chtimes(p.layer(t, 0).Path+"/d/g", time.Now(), time.Now()))
		}},
		{"K20 link", true, "K20", false, false, func(t *testing.T, p *patient) {
			l := p.layer(t, 0).Path + "/link"
			must(t, os.Remove(l), os.Symlink("d/g", l))
		}},
		{"K20 link missing", true, "K20", false, false, func(t *testing.T, p *patient) { must(t, os.Remove(p.layer(t, 0).Path+"/link")) }},
		{"K20 attribute changed", true, "K20", false, false, func(t *testing.T, p *patient) {
			must(t, unix.Setxattr(p.layer(t, 0).Path+"/x", "user.note", []byte("b"), 0))
		}},
		{"K20 attribute removed", true, "K20", false, false, func(t *testing.T, p *patient) {
			must(t, unix.Removexattr(p.layer(t, 0).Path+"/x", "user.note"))
		}},
		{"K20 attribute added", true, "K20", false, false, func(t *testing.T, p *patient) {
			must(t, unix.Setxattr(p.layer(t, 0).Path+"/d", "user.more", []byte("b"), 0))
		}},
		{"K20 hard link broken", true, "K20", false, false, func(t *testing.T, p *patient) {
			h := p.layer(t, 0).Path + "/hard"
			b, err := os.ReadFile(h)
			st, serr := os.Stat(h)
			must(t, err, serr, os.Remove(h), os.WriteFile(h, b, st.Mode()), os.Chmod(h, st.Mode()), os.Chtimes(h, st.ModTime(), st.ModTime()))
		}},
		{"K20 whiteout missing", true, "K20", false, false, func(t *testing.T, p *patient) {
			must(t, os.Remove(p.layer(t, 1).Path+"/gone/x"))
		}},
		{"K20 whiteout added", true, "K20", false, false, func(t *testing.T, p *patient) {
			must(t, unix.Mknod(p.layer(t, 1).Path+"/d/g", unix.S_IFCHR, 0))
		}},
		{"K21 sizes", true, "K21", false, false, func(t *testing.T, p *patient) {
			id := p.layer(t, 0).CacheID
			must(t, p.s.update(t.Context(), func(tx *metadata.Tx) error {
				c, err := tx.Cache(id)
				c.Apparent += 7
				return firstError(err, tx.PutCache(c))
			}))
		}},
		{"K22 file lost its content", false, "K22", true, false, func(t *testing.T, p *patient) { must(t, os.Truncate(p.layer(t, 1).Path+"/d/new", 0)) }},
		{"K22 file missing", false, "K22", true, false, func(t *testing.T, p *patient) { must(t, os.Remove(p.layer(t, 1).Path+"/d/new")) }},
		{"K22 record lost its content", false, "K22", true, false, func(t *testing.T, p *patient) {
			must(t, os.Truncate(filepath.Join(filepath.Dir(p.layer(t, 1).Path), splitName), 0))
		}},
		{"K23 index missing", false, "K23", false, false, func(t *testing.T, p *patient) {
			must(t, os.Remove(filepath.Join(filepath.Dir(p.layer(t, 1).Path), indexName)))
		}},
		{"K24 index of no chain", false, "K24", false, false, func(t *testing.T, p *patient) {
			must(t, os.WriteFile(filepath.Join(p.s.root, chainsName, strings.Repeat("a", 64)+"-"+strings.Repeat("b", 32)+chainExt), nil, 0o600))
		}},
		{"K26 manifest and build", false, "K26 K9", false, false, func(t *testing.T, p *patient) {
			p.edit(t, func(b metatest.Buckets) {
				id := b.Keys("images")[0]
				b.Put("manifests", id+"\x00"+digest.FromString("m").String(), []byte("not m"))
				b.Put("manifests", "sha256:none\x00"+digest.FromString("m").String(), []byte("m"))
				b.Put("buildcache", "\x00step", []byte("sha256:none"))
			})
		}},
		{"K27 rows of everything", false, "K27", false, false, func(t *testing.T, p *patient) {
			p.edit(t, func(b metatest.Buckets) {
				for _, bucket := range []string{"layers", "cache", "images", "containers", "refs"} {
					b.Put(bucket, b.Keys(bucket)[0], []byte("{nonsense"))
				}
				for _, bucket := range []string{"live", "ingests", "leases", "trash"} {
					b.Put(bucket, "x", []byte("nonsense"))
				}
			})
		}},
		{"K29 forged redirect", true, "K29", false, false, func(t *testing.T, p *patient) {
			must(t, unix.Setxattr(p.layer(t, 0).Path+"/d", "trusted.overlay.redirect", []byte("/gone"), 0))
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			needRoot(t)
			p := newPatient(t)
			tc.do(t, p)
			rep := p.check(t, CheckOptions{})
			if got := invariants(rep, true); len(got) == 0 && !tc.deep {
				t.Error("not found without --deep")
			}
			rep = p.check(t, CheckOptions{Deep: true})
			got := invariants(rep, true)
			for _, want := range strings.Fields(tc.finds) {
				if !slices.Contains(got, want) {
					t.Errorf("finds %v, expected %s: %s", got, tc.finds, asJSON(rep.Findings))
				}
			}
			rep = p.check(t, CheckOptions{Deep: true, Repair: true})
			open := invariants(rep, true)
			if (len(open) > 0) != tc.reload {
				t.Fatalf("after repair: %s", asJSON(rep.Findings))
			}
			for _, f := range rep.Findings {
				if f.Open() && (len(f.Images) == 0 || !strings.Contains(f.Repair, f.Images[0])) {
					t.Errorf("does not say what to load: %s", asJSON(f))
				}
			}
			again := p.check(t, CheckOptions{Deep: true, Repair: true})
			if got := invariants(again, false); !slices.Equal(got, open) {
				t.Errorf("a second repair finds %v: %s", got, asJSON(again.Findings))
			}
			if tc.reload {
				if got := invariants(p.check(t, CheckOptions{}), true); len(got) == 0 {
					t.Error("a damaged layer that was marked is not told without --deep")
				}
				load(t, p.s, p.archive)
			}
			if !tc.changes {
				p.healthy(t)
			}
		})
	}
}

// reopen opens the store again.
func (p *patient) reopen(t testing.TB) error {
	p.s = openAt(t, p.s.root)
	return nil
}

func glob(t testing.TB, parts ...string) []string {
	t.Helper()
	out, err := filepath.Glob(filepath.Join(parts...))
	must(t, err)
	return out
}

func asJSON(v any) string {
	b, _ := json.MarshalIndent(v, "", " ")
	return string(b)
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
