package snapshotter

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"go.uber.org/zap"

	"github.com/plyfs/plyfs/layers"
)

// The tests of this file do the first steps of a change only, and look what the next
// process makes of them: the crash table of doc.go, line by line.

// gone waits for the trash to be empty and expects nothing of a snapshot.
func (p *place) gone(id string) {
	p.t.Helper()
	if err := p.purge(p.t.Context(), p.log); err != nil {
		p.t.Error(err)
	}
	for _, d := range []string{p.of(id), p.dirs.gone(id)} {
		if _, err := os.Lstat(d); !errors.Is(err, fs.ErrNotExist) {
			p.t.Errorf("%s is left: %v", d, err)
		}
	}
}

func TestCrashInPrepare(t *testing.T) {
	p := newPlace(t)
	p.layer("base", "")
	id := newID()
	if err := p.makeSnapshot(id, p.id("base")); err != nil { // 1
		t.Fatal(err)
	}
	p.again()
	p.gone(id)

	now := time.Now().UTC()
	if _, err := p.make("work", row{ID: newID(), Kind: Active, Parent: "base", Created: now, Updated: now}); err != nil { // 2
		t.Fatal(err)
	}
	p.again()
	ms, err := p.Mounts(t.Context(), "work")
	if target := p.mnt(p.id("work")); err != nil || ms[0].Source != target || p.unions.mounted[target].upper == "" {
		t.Errorf("mounts %v %v, unions %v", ms, err, p.unions.mounted)
	}
	p.again() // 3
	if _, err := p.Mounts(t.Context(), "work"); err != nil || len(p.unions.mounted) != 1 {
		t.Errorf("mounted again: %v, unions %v", err, p.unions.mounted)
	}
}

func TestCrashInCommit(t *testing.T) {
	p := newPlace(t)
	p.layer("base", "")
	p.prepare("work", "base")
	id := p.id("work")
	clear(p.unions.mounted) // 2
	p.again()
	if in, err := p.Stat("work"); err != nil || in.Kind != Active {
		t.Errorf("%+v %v", in, err)
	}
	if _, err := p.Mounts(t.Context(), "work"); err != nil || len(p.unions.mounted) != 1 {
		t.Errorf("mounts: %v, unions %v", err, p.unions.mounted)
	}
	clear(p.unions.mounted)
	if err := p.db.update(func(t tx) error { return t.commit("work", "done", nil, Usage{}, time.Now()) }); err != nil { // 3
		t.Fatal(err)
	}
	if _, err := os.Lstat(p.work(id)); err != nil {
		t.Fatal(err)
	}
	p.again()
	for _, d := range p.ofUnion(id) {
		if _, err := os.Lstat(d); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", d, err)
		}
	}
	p.prepare("next", "done")
}

func TestCrashInRemove(t *testing.T) {
	p := newPlace(t)
	for _, steps := range []int{2, 3} {
		p.prepare("work", "")
		id := p.id("work")
		if err := os.WriteFile(p.fs(id)+"/file", nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := p.db.update(func(t tx) error { return t.remove("work") }); err != nil {
			t.Fatal(err)
		}
		if steps == 3 {
			if err := p.discard(id); err != nil {
				t.Fatal(err)
			}
		}
		p.again()
		p.gone(id)
	}
}

// TestUnreadableRow: a directory may belong to a row that cannot be read, so it stays.
func TestUnreadableRow(t *testing.T) {
	p := newPlace(t)
	p.prepare("work", "")
	id := p.id("work")
	err := p.db.update(func(t tx) error { return t.t.Bucket(bucketSnapshots).Put([]byte("work"), []byte("{")) })
	if err != nil {
		t.Fatal(err)
	}
	p.again()
	if _, err := os.Lstat(p.fs(id)); err != nil {
		t.Error(err)
	}
	_, err = p.Stat("work")
	wantError(t, "stat", layers.ErrCorrupt, err)
}

func TestOneProcess(t *testing.T) {
	p := newPlace(t)
	_, err := Open(p.root, zap.NewNop())
	wantError(t, "a second process", layers.ErrInUse, err)
}

func TestDamagedDatabase(t *testing.T) {
	for _, text := range []string{"no database", ""} {
		root := t.TempDir()
		file := make([]byte, 1<<16)
		copy(file, text)
		if err := os.WriteFile(filepath.Join(root, dbName), file, 0o600); err != nil {
			t.Fatal(err)
		}
		if s, err := Open(root, zap.NewNop()); err == nil {
			t.Errorf("a file of %q is taken for a database: %v", text, s.Close())
		}
	}
	root := t.TempDir()
	b, err := bolt.Open(filepath.Join(root, dbName), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = b.Update(func(t *bolt.Tx) error {
		m, err := t.CreateBucket(bucketMeta)
		if err != nil {
			return err
		}
		return m.Put(keySchema, []byte("2"))
	})
	if err := errors.Join(err, b.Close()); err != nil {
		t.Fatal(err)
	}
	_, err = Open(root, zap.NewNop())
	wantError(t, "a newer schema", layers.ErrUnsupported, err)
}
