package metadata

import (
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// fixture is a database as a released schema had it.
func fixture(t testing.TB, name string) *DB {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".db.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	db := New(filepath.Join(t.TempDir(), "x.db"), Options{})
	if err := os.WriteFile(db.path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return db
}

// TestMigrate opens a database of each older schema.
func TestMigrate(t *testing.T) {
	files, err := filepath.Glob("testdata/schema-*.db.gz")
	if err != nil || len(files) == 0 {
		t.Fatal("no fixtures", err)
	}
	for _, f := range files {
		name := filepath.Base(f[:len(f)-len(".db.gz")])
		t.Run(name, func(t *testing.T) {
			db := fixture(t, name)
			if err := db.Init(t.Context()); err != nil {
				t.Fatal(err)
			}
			if p := check(t, db); len(p) != 0 {
				t.Error(p)
			}
			err := db.Update(t.Context(), func(tx *Tx) error {
				r, err := tx.Ref("localhost/old:1")
				if err != nil {
					return err
				}
				if _, ok := tx.ContainerByName("keep"); !ok {
					t.Error("the container is gone")
				}
				return tx.AddManifest(r.ImageID, d("m"), []byte("m"))
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// TestOtherSchema: a newer minor version is read and not written, another major
// version is neither.
func TestOtherSchema(t *testing.T) {
	for _, tc := range []struct {
		version     string
		read, write bool
	}{{"1.999", true, false}, {"2.0", false, false}, {"0.9", false, false}, {"1", false, false}, {"", false, false}} {
		db := newDB(t)
		err := db.locked(t.Context(), false, func(b *bolt.DB) error {
			return b.Update(func(tx *bolt.Tx) error { return tx.Bucket(bktMeta).Put(keySchema, []byte(tc.version)) })
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, op := range []struct {
			what string
			want bool
			err  error
		}{
			{"init", tc.read, db.Init(t.Context())},
			{"view", tc.read, db.View(t.Context(), func(*Tx) error { return nil })},
			{"update", tc.write, db.Update(t.Context(), func(*Tx) error { return nil })},
		} {
			if (op.err == nil) != op.want || op.err != nil && !errors.Is(op.err, ErrSchema) {
				t.Errorf("%s of version %q: %v", op.what, tc.version, op.err)
			}
		}
	}
}

// TestWhatGoesWithAnImage: manifests and what the build cache knows end with it.
func TestWhatGoesWithAnImage(t *testing.T) {
	db := newDB(t)
	err := db.Update(t.Context(), func(tx *Tx) error {
		for _, i := range []string{"a", "b"} {
			if _, err := tx.AddImage(Image{ID: d(i)}, []byte(i)); err != nil {
				return err
			}
			if err := errors.Join(tx.AddManifest(d(i), d("m"), []byte("m")), tx.PutBuild("", "step of "+i, d(i)), tx.PutBuild(d("a"), "step", d(i))); err != nil {
				return err
			}
		}
		if err := tx.AddManifest(d("a"), d("m"), []byte("another")); !errors.Is(err, ErrInvariant) {
			t.Error("a manifest with the digest of another:", err)
		}
		if err := tx.AddManifest(d("no"), d("m"), []byte("m")); !errors.Is(err, ErrNotFound) {
			t.Error("a manifest of no image:", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if p := check(t, db); len(p) != 0 {
		t.Error(p)
	}
	err = db.Update(t.Context(), func(tx *Tx) error { return tx.DeleteImage(d("b")) })
	if err != nil {
		t.Fatal(err)
	}
	if p := check(t, db); len(p) != 0 {
		t.Error(p)
	}
	_ = db.View(t.Context(), func(tx *Tx) error {
		if ids := tx.ImagesByManifest(d("m")); len(ids) != 1 || ids[0] != d("a") {
			t.Error("images with the manifest:", ids)
		}
		if raw, err := tx.Manifest(d("a"), d("m")); string(raw) != "m" {
			t.Error("manifest:", raw, err)
		}
		for hash, want := range map[string]digest.Digest{"step of a": d("a"), "step of b": ""} {
			if got, _ := tx.Build("", hash); got != want {
				t.Errorf("%s: %s, expected %s", hash, got, want)
			}
		}
		if got, ok := tx.Build(d("a"), "step"); ok {
			t.Error("a step that made the image that is gone:", got)
		}
		return nil
	})
}
