package metadata

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// filled is a database of several pages, as bytes.
func filled(t testing.TB) []byte {
	t.Helper()
	db := newDB(t)
	fill(t, db)
	err := db.Update(t.Context(), func(tx *Tx) error {
		for i := range 100 {
			l, c := layer("", fmt.Sprint("layer ", i), fmt.Sprint("dir ", i))
			if err := tx.AddLayer(l, c); err != nil {
				return err
			}
			config := fmt.Appendf(nil, `{"n":%d}`, i)
			if _, err := tx.AddImage(Image{ID: d(string(config))}, config); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(db.Path())
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// use does with a database what can be done, and reports errors that do not say that it
// is damaged.
func use(t *testing.T, db *DB, what string) {
	t.Helper()
	for name, op := range map[string]func() error{
		"view": func() error {
			return db.View(t.Context(), func(tx *Tx) error {
				_, _ = tx.Layers()
				_, _ = tx.Images()
				_, _ = tx.SavedImage(d("config"))
				_ = tx.BadRows()
				_, _ = tx.Check()
				return nil
			})
		},
		"update": func() error {
			return db.Update(t.Context(), func(tx *Tx) error {
				if err := tx.AddLease(Lease{ID: "x"}); err != nil {
					return err
				}
				return tx.RebuildIndexes()
			})
		},
		"check":  func() error { _, err := db.CheckFile(t.Context()); return err },
		"attach": func() error { return db.Attach(t.Context()) },
		"copy": func() error {
			p := db.Path() + ".copy"
			defer os.Remove(p)
			return db.CopyTo(t.Context(), p)
		},
	} {
		err := op()
		for _, known := range []error{nil, ErrCorrupt, ErrSchema, ErrNotFound, ErrInvariant} {
			if errors.Is(err, known) {
				err = nil
			}
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %s: %v", what, name, err)
		}
	}
}

// TestDamagedFile changes bytes anywhere in a database: it can be used, or is said to be
// damaged; no process dies of it, none waits for ever.
func TestDamagedFile(t *testing.T) {
	whole := filled(t)
	page := os.Getpagesize()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for round := range 150 {
		raw := bytes.Clone(whole)
		what := ""
		switch n := rng.IntN(len(raw) / page); round % 5 {
		case 0:
			what = fmt.Sprintf("page %d zeroed", n)
			clear(raw[n*page : (n+1)*page])
		case 1:
			what = fmt.Sprintf("page %d of random bytes", n)
			for i := range page {
				raw[n*page+i] = byte(rng.Uint32())
			}
		case 2:
			what = "header of a page changed"
			raw[n*page+rng.IntN(64)] ^= byte(1 + rng.IntN(255))
		case 3:
			size := rng.IntN(len(raw))
			what = fmt.Sprintf("truncated to %d bytes", size)
			raw = raw[:size]
		case 4:
			what = "some bytes changed"
			for range 20 {
				raw[rng.IntN(len(raw))] ^= byte(1 + rng.IntN(255))
			}
		}
		db := New(filepath.Join(t.TempDir(), "x.db"), Options{LockTimeout: 3 * time.Second})
		if err := os.WriteFile(db.Path(), raw, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Salvage(db.Path()); err != nil {
			t.Errorf("%s: salvage: %v", what, err)
		}
		use(t, db, what)
		if _, err := db.Rebuild(t.Context(), func(*Tx) error { return nil }); err != nil {
			t.Errorf("%s: rebuild: %v", what, err)
		}
		if p, err := db.CheckFile(t.Context()); err != nil || len(p) != 0 {
			t.Errorf("%s: after rebuild: %v %v", what, p, err)
		}
	}
}

// TestSalvageWhole: everything of a database that is whole can be read without bbolt.
func TestSalvageWhole(t *testing.T) {
	db := newDB(t)
	if err := os.WriteFile(db.Path(), filled(t), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Salvage(db.Path())
	if err != nil || len(s.Problems) != 0 {
		t.Fatal(s.Problems, err)
	}
	if len(s.Layers()) != 102 || len(s.Caches()) != 102 || len(s.Containers()) != 1 {
		t.Error(len(s.Layers()), len(s.Caches()), len(s.Containers()))
	}
	images := s.Images()
	refs := 0
	for _, i := range images {
		refs += len(i.Refs)
	}
	if len(images) != 101 || refs != 1 {
		t.Errorf("%d images, %d references", len(images), refs)
	}
}

// TestCompactLosesNothing: others write while the file is replaced again and again.
func TestCompactLosesNothing(t *testing.T) {
	db := newDB(t)
	const writers, each = 4, 40
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for w := range writers {
		wg.Go(func() {
			mine := New(db.Path(), Options{}) // as another process: no mutex in common
			for i := range each {
				err := mine.Update(t.Context(), func(tx *Tx) error { return tx.AddLease(Lease{ID: fmt.Sprint(w, "/", i)}) })
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	compacted := make(chan int)
	go func() {
		n := 0
		for {
			select {
			case <-stop:
				compacted <- n
				return
			default:
			}
			if _, _, err := New(db.Path(), Options{}).Compact(t.Context()); err != nil {
				t.Error(err)
			}
			n++
		}
	}()
	wg.Wait()
	close(stop)
	t.Logf("compacted %d times", <-compacted)
	err := db.View(t.Context(), func(tx *Tx) error {
		l, err := tx.Leases()
		if len(l) != writers*each {
			t.Errorf("%d rows, expected %d", len(l), writers*each)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if names, _ := filepath.Glob(db.Path() + ".*"); len(names) != 0 {
		t.Error("left over:", names)
	}
}

// FuzzPages: no file makes the reader of pages do anything but report.
func FuzzPages(f *testing.F) {
	db := newDB(f)
	fill(f, db)
	whole, err := os.ReadFile(db.Path())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(whole[:5000])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, err := openPages(bytes.NewReader(raw), int64(len(raw)))
		if err != nil {
			return
		}
		n := 0
		p.walk(func(_ string, k, v []byte) { n += len(k) + len(v) }, func(string) {})
		if n > 64*len(raw) {
			t.Errorf("%d bytes of rows in a file of %d", n, len(raw))
		}
	})
}
