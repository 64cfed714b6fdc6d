package metadata

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

func newDB(t testing.TB) *DB {
	t.Helper()
	db := New(filepath.Join(t.TempDir(), "x.db"), Options{LockTimeout: 300 * time.Millisecond})
	if err := db.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	return db
}

func d(s string) digest.Digest { return digest.FromString(s) }

func layer(parent digest.Digest, diff, cache string) (Layer, *Cache) {
	l := Layer{ChainID: ChainID(parent, d(diff)), DiffID: d(diff), Parent: parent, CacheID: cache}
	return l, &Cache{CacheID: cache, DiffID: d(diff)}
}

// TestChainID uses the worked formula of the image specification.
func TestChainID(t *testing.T) {
	a, b := d("a"), d("b")
	if ChainID("", a) != a || ChainID(a, b) != digest.FromString(a.String()+" "+b.String()) {
		t.Error("wrong chainID")
	}
}

func fill(t testing.TB, db *DB) (base, top digest.Digest) {
	t.Helper()
	err := db.Update(t.Context(), func(tx *Tx) error {
		l, c := layer("", "one", "c1")
		base = l.ChainID
		if err := tx.AddLayer(l, c); err != nil {
			return err
		}
		l, c = layer(base, "two", "c2")
		l.Blob = d("blob")
		top = l.ChainID
		if err := tx.AddLayer(l, c); err != nil {
			return err
		}
		if _, err := tx.AddImage(Image{ID: d("config"), TopChain: top}, []byte("config")); err != nil {
			return err
		}
		if _, err := tx.SetRef("r:1", Ref{ImageID: d("config")}); err != nil {
			return err
		}
		return tx.AddContainer(Container{ID: "id", Name: "name", MountID: "m", Chain: top, ImageID: d("config")})
	})
	if err != nil {
		t.Fatal(err)
	}
	return base, top
}

func check(t testing.TB, db *DB) []Problem {
	t.Helper()
	var out []Problem
	err := db.View(t.Context(), func(tx *Tx) (err error) {
		out, err = tx.Check()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestInvariants(t *testing.T) {
	db := newDB(t)
	base, top := fill(t, db)
	bad, _ := layer("", "three", "c3")
	forged, fc := layer(base, "four", "c4")
	forged.ChainID = d("something else")
	other, oc := layer(d("nowhere"), "five", "c5")
	dup, dc := layer("", "one", "c6")
	for _, tc := range []struct {
		name string
		is   error
		do   func(tx *Tx) error
	}{
		{"layer without content", ErrNotFound, func(tx *Tx) error { return tx.AddLayer(bad, nil) }},
		{"forged chainID", ErrInvariant, func(tx *Tx) error { return tx.AddLayer(forged, fc) }},
		{"no parent", ErrNotFound, func(tx *Tx) error { return tx.AddLayer(other, oc) }},
		{"layer twice", ErrExists, func(tx *Tx) error { return tx.AddLayer(dup, dc) }},
		{"foreign content", ErrInvariant, func(tx *Tx) error { bad.CacheID = "c1"; return tx.AddLayer(bad, nil) }},
		{"layer in use", ErrInUse, func(tx *Tx) error { _, err := tx.DeleteLayer(top); return err }},
		{"layer with a child", ErrInUse, func(tx *Tx) error { _, err := tx.DeleteLayer(base); return err }},
		{"image with a name", ErrInUse, func(tx *Tx) error { return tx.DeleteImage(d("config")) }},
		{"image without layer", ErrInvariant, func(tx *Tx) error {
			_, err := tx.AddImage(Image{ID: d("x"), TopChain: d("no")}, []byte("x"))
			return err
		}},
		{"name for nothing", ErrNotFound, func(tx *Tx) error { _, err := tx.SetRef("x", Ref{ImageID: d("no")}); return err }},
		{"container name taken", ErrExists, func(tx *Tx) error {
			return tx.AddContainer(Container{ID: "id2", Name: "name", MountID: "m2", ImageID: d("config")})
		}},
		{"mount ID taken", ErrExists, func(tx *Tx) error {
			return tx.AddContainer(Container{ID: "id2", Name: "n2", MountID: "m", ImageID: d("config")})
		}},
		{"mounted container", ErrInUse, func(tx *Tx) error {
			if err := tx.PutLive(Live{Target: "/m", BootID: "b", ContainerID: "id"}); err != nil {
				return err
			}
			_, err := tx.DeleteContainer("id")
			return err
		}},
		{"stage that was swept", ErrNotFound, func(tx *Tx) error { return tx.DeleteIngest("x") }},
		{"lease that was swept", ErrNotFound, func(tx *Tx) error { return tx.LeaseLayer("x", top) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := db.Update(t.Context(), tc.do); !errors.Is(err, tc.is) {
				t.Errorf("%v, expected %v", err, tc.is)
			}
		})
	}
	if p := check(t, db); len(p) > 0 {
		t.Error(p)
	}
}

func TestDeleteEverything(t *testing.T) {
	db := newDB(t)
	base, top := fill(t, db)
	err := db.Update(t.Context(), func(tx *Tx) error {
		if err := tx.AddLease(Lease{ID: "l"}); err != nil {
			return err
		}
		if err := tx.LeaseLayer("l", top); err != nil {
			return err
		}
		if _, err := tx.DeleteContainer("id"); err != nil {
			return err
		}
		if err := tx.DeleteRef("r:1"); err != nil {
			return err
		}
		if err := tx.DeleteImage(d("config")); err != nil {
			return err
		}
		if _, err := tx.DeleteLayer(top); !errors.Is(err, ErrInUse) {
			t.Error("the lease does not keep it:", err)
		}
		if kept, err := tx.EndLease("l"); err != nil || len(kept) != 1 {
			t.Error(kept, err)
		}
		for _, c := range []digest.Digest{top, base} {
			if orphan, err := tx.DeleteLayer(c); err != nil || orphan == "" {
				t.Error(orphan, err)
			}
		}
		for _, b := range append(append([][]byte{}, primaries...), indexes...) {
			if k, _ := tx.b(b).Cursor().First(); k != nil && string(b) != "meta" {
				t.Errorf("bucket %s still has %q", b, k)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestIndexes damages each index and has it found and rebuilt.
func TestIndexes(t *testing.T) {
	db := newDB(t)
	fill(t, db)
	for _, idx := range indexes {
		t.Run(string(idx), func(t *testing.T) {
			err := db.Update(t.Context(), func(tx *Tx) error {
				if k, _ := tx.b(idx).Cursor().First(); k != nil {
					if err := tx.b(idx).Delete(k); err != nil {
						return err
					}
				}
				return tx.b(idx).Put([]byte("stray\x00entry"), nil)
			})
			if err != nil {
				t.Fatal(err)
			}
			found := check(t, db)
			if len(found) == 0 || found[0].Invariant != "K9" {
				t.Errorf("not found: %v", found)
			}
			if err := db.Update(t.Context(), func(tx *Tx) error { return tx.RebuildIndexes() }); err != nil {
				t.Fatal(err)
			}
			if p := check(t, db); len(p) > 0 {
				t.Error(p)
			}
		})
	}
}

func TestCheckFindsBrokenRows(t *testing.T) {
	for _, tc := range []struct {
		inv string
		do  func(tx *Tx, base, top digest.Digest) error
	}{
		{"K4", func(tx *Tx, base, _ digest.Digest) error { return tx.b(bktLayers).Delete([]byte(base)) }},
		{"K5", func(tx *Tx, _, _ digest.Digest) error { return tx.b(bktCache).Delete([]byte("c1")) }},
		{"K7", func(tx *Tx, _, _ digest.Digest) error {
			return put(tx, bktCache, []byte("cx"), Cache{CacheID: "cx", DiffID: d("x")})
		}},
		{"K10", func(tx *Tx, _, _ digest.Digest) error {
			return tx.b(bktConfigs).Put([]byte(d("config")), []byte("other"))
		}},
		{"K11", func(tx *Tx, _, top digest.Digest) error { return tx.b(bktLayers).Delete([]byte(top)) }},
		{"K12", func(tx *Tx, _, _ digest.Digest) error { return tx.b(bktImages).Delete([]byte(d("config"))) }},
		{"K13", func(tx *Tx, _, top digest.Digest) error { return tx.b(bktLayers).Delete([]byte(top)) }},
	} {
		t.Run(tc.inv, func(t *testing.T) {
			db := newDB(t)
			base, top := fill(t, db)
			if err := db.Update(t.Context(), func(tx *Tx) error { return tc.do(tx, base, top) }); err != nil {
				t.Fatal(err)
			}
			for _, p := range check(t, db) {
				if p.Invariant == tc.inv {
					return
				}
			}
			t.Error("not found")
		})
	}
}

func TestLock(t *testing.T) {
	db := newDB(t)
	hold, err := bolt.Open(db.path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.View(t.Context(), func(*Tx) error { return nil })
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "process") {
		t.Error(err)
	}
	// It is waited for, once with a word to the user.
	told := make(chan string, 10)
	db.opts.LockTimeout, db.opts.OnWait = time.Minute, func(msg string) {
		told <- msg
		_ = hold.Close()
	}
	if err := db.Update(t.Context(), func(*Tx) error { return nil }); err != nil {
		t.Error(err)
	}
	if len(told) != 1 || !strings.Contains(<-told, db.path) {
		t.Error("the wait was not announced once")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := db.View(ctx, func(*Tx) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	for name, content := range map[string]string{"garbage": strings.Repeat("garbage!", 4096), "empty": ""} {
		t.Run(name, func(t *testing.T) {
			p := filepath.Join(t.TempDir(), "x.db")
			if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := New(p, Options{}).Init(t.Context()); err == nil {
				t.Error("accepted")
			}
		})
	}
	db := newDB(t)
	err := db.Update(t.Context(), func(tx *Tx) error { return tx.b(bktMeta).Put(keySchema, []byte("2.0")) })
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Init(t.Context()); !errors.Is(err, ErrSchema) {
		t.Error(err)
	}
	// A database that has vanished does not come back empty.
	db = newDB(t)
	if err := os.Remove(db.path); err != nil {
		t.Fatal(err)
	}
	if err := db.View(t.Context(), func(*Tx) error { return nil }); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestRollback(t *testing.T) {
	db := newDB(t)
	stop := errors.New("stop")
	err := db.Update(t.Context(), func(tx *Tx) error {
		if err := tx.AddLease(Lease{ID: "l"}); err != nil {
			return err
		}
		return stop
	})
	if !errors.Is(err, stop) {
		t.Fatal(err)
	}
	err = db.View(t.Context(), func(tx *Tx) error {
		l, err := tx.Leases()
		if len(l) > 0 {
			t.Error("the change stayed")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestReplaceContent: the old directory's row goes with the last layer that has it, and
// the indexes follow.
func TestReplaceContent(t *testing.T) {
	db := newDB(t)
	base, _ := fill(t, db)
	second, _ := layer(d("two"), "one", "c1") // the same content on another chain
	err := db.Update(t.Context(), func(tx *Tx) error {
		l, c := layer("", "two", "c9")
		return errors.Join(tx.AddLayer(l, c), tx.AddLayer(second, nil))
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		chain  digest.Digest
		cache  Cache
		orphan string
		is     error
	}{
		{base, Cache{CacheID: "n1", DiffID: d("two")}, "", ErrInvariant},
		{base, Cache{CacheID: "c2", DiffID: d("one")}, "", ErrInvariant},
		{d("nowhere"), Cache{CacheID: "n1", DiffID: d("one")}, "", ErrNotFound},
		{base, Cache{CacheID: "n1", DiffID: d("one")}, "", nil},
		{second.ChainID, Cache{CacheID: "n2", DiffID: d("one")}, "c1", nil},
	} {
		err := db.Update(t.Context(), func(tx *Tx) error {
			orphan, err := tx.ReplaceContent(tc.chain, tc.cache)
			if err == nil && orphan != tc.orphan {
				t.Errorf("%s: orphan %q, expected %q", tc.cache.CacheID, orphan, tc.orphan)
			}
			return err
		})
		if !errors.Is(err, tc.is) {
			t.Errorf("%s: %v, expected %v", tc.cache.CacheID, err, tc.is)
		}
		if p := check(t, db); len(p) > 0 {
			t.Errorf("%s: %+v", tc.cache.CacheID, p)
		}
	}
}
