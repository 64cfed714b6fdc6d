package snapshotter

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"runtime/debug"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/plyfs/plyfs/layers"
)

// The database has three buckets. Values are JSON; those of the index are names.
//
//	meta       schema → "1"
//	snapshots  name → row
//	children   id of the parent "/" id → name (index: what must go before the parent)
var (
	bucketMeta      = []byte("meta")
	bucketSnapshots = []byte("snapshots")
	bucketChildren  = []byte("children")
	keySchema       = []byte("schema")
)

const (
	dbName = "snapshots.db"
	schema = "1"
	// lockWait is how long a process that is about to end may still have the database.
	lockWait = 2 * time.Second
	// allocSize is by how much the file grows at once.
	allocSize = 1 << 20
)

// db is the database, open for the life of the process: a snapshotter is one process,
// and the lock on the file keeps it so.
type db struct {
	b    *bolt.DB
	path string
	// damage is set once bbolt has stopped in the middle of something: it may keep its
	// locks for ever.
	damage atomic.Pointer[markedError]
}

func openDB(root string) (*db, error) {
	d := &db{path: filepath.Join(root, dbName)}
	err := d.guard(func() (err error) {
		d.b, err = bolt.Open(d.path, 0o600, &bolt.Options{Timeout: lockWait})
		return err
	})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, markedf(layers.ErrInUse, "database %q: another process has it open, probably a `plyfs snapshotter` with the same root", d.path)
	case err != nil:
		return nil, fmt.Errorf("open database %q: %w", d.path, err)
	}
	d.b.AllocSize = allocSize
	err = d.update(func(tx tx) error {
		for _, name := range [][]byte{bucketMeta, bucketSnapshots, bucketChildren} {
			if _, err := tx.t.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		meta := tx.t.Bucket(bucketMeta)
		switch v := meta.Get(keySchema); {
		case v == nil:
			return meta.Put(keySchema, []byte(schema))
		case string(v) != schema:
			return markedf(layers.ErrUnsupported, "database %q: unknown schema %q: a newer plyfs has written it, use that one", d.path, v)
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

func (d *db) close() error { return d.guard(d.b.Close) }

// guard makes errors of the panics and faults with which bbolt meets a damaged file.
func (d *db) guard(f func() error) (err error) {
	if m := d.damage.Load(); m != nil {
		return m
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			m := &markedError{layers.ErrCorrupt, fmt.Errorf("database %q: %v", d.path, p)}
			d.damage.Store(m)
			err = m
		}
	}()
	return f()
}

// view and update run f, which does no more than to read and write rows, in a transaction.
func (d *db) view(f func(tx) error) error {
	return d.guard(func() error { return d.b.View(func(t *bolt.Tx) error { return f(tx{t}) }) })
}

func (d *db) update(f func(tx) error) error {
	return d.guard(func() error { return d.b.Update(func(t *bolt.Tx) error { return f(tx{t}) }) })
}

// tx is a transaction.
type tx struct{ t *bolt.Tx }

// get returns the row of a name.
func (t tx) get(name string) (r row, err error) {
	v := t.t.Bucket(bucketSnapshots).Get([]byte(name))
	if v == nil {
		return r, markedf(layers.ErrNotFound, "snapshot %q: not found", name)
	}
	if err := json.Unmarshal(v, &r); err != nil {
		return r, markedf(layers.ErrCorrupt, "snapshot %q: its row cannot be read: %v", name, err)
	}
	return r, nil
}

func (t tx) put(name string, r row) error {
	maps.DeleteFunc(r.Labels, func(_, v string) bool { return v == "" }) // containerd's way to remove one
	v, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("snapshot %q: %w", name, err)
	}
	if err := t.t.Bucket(bucketSnapshots).Put([]byte(name), v); err != nil {
		return fmt.Errorf("write the row of snapshot %q: %w", name, err)
	}
	return nil
}

// free reports an error if a name is taken.
func (t tx) free(name string) error {
	if t.t.Bucket(bucketSnapshots).Get([]byte(name)) != nil {
		return markedf(layers.ErrExists, "snapshot %q: already exists", name)
	}
	return nil
}

// chain returns the ids of the parents of a row, the nearest first.
func (t tx) chain(r row) (ids []string, err error) {
	for name := r.Parent; name != ""; {
		p, err := t.get(name)
		if err != nil {
			return nil, fmt.Errorf("parent %q: %w", name, err)
		}
		ids = append(ids, p.ID)
		name = p.Parent
		if len(ids) > maxChain { // a damaged database could hold a circle
			return nil, markedf(layers.ErrCorrupt, "snapshot %q has more than %d parents", r.ID, maxChain)
		}
	}
	return ids, nil
}

const maxChain = 10_000

func childKey(parent, id string) []byte { return []byte(parent + "/" + id) }

// link notes, or forgets, a snapshot under its parent.
func (t tx) link(name string, r row, linked bool) error {
	if r.Parent == "" {
		return nil
	}
	p, err := t.get(r.Parent)
	if err != nil {
		return fmt.Errorf("parent of %q: %w", name, err)
	}
	if linked {
		err = t.t.Bucket(bucketChildren).Put(childKey(p.ID, r.ID), []byte(name))
	} else {
		err = t.t.Bucket(bucketChildren).Delete(childKey(p.ID, r.ID))
	}
	if err != nil {
		return fmt.Errorf("note %q under its parent: %w", name, err)
	}
	return nil
}

// child returns the name of one child of a snapshot, or "".
func (t tx) child(r row) string {
	prefix := childKey(r.ID, "")
	k, v := t.t.Bucket(bucketChildren).Cursor().Seek(prefix)
	if k != nil && bytes.HasPrefix(k, prefix) {
		return string(v)
	}
	return ""
}

// create adds a row for a new snapshot. Its parent must still be the snapshot with this id.
func (t tx) create(name string, r row, parentID string) error {
	if err := t.free(name); err != nil {
		return err
	}
	if r.Parent != "" {
		p, err := t.parent(r.Parent)
		if err != nil {
			return err
		}
		if p.ID != parentID {
			return markedf(layers.ErrNotFound, "parent snapshot %q: was removed meanwhile", r.Parent)
		}
	}
	if err := t.put(name, r); err != nil {
		return err
	}
	return t.link(name, r, true)
}

// parent returns a snapshot that may have children.
func (t tx) parent(name string) (row, error) {
	p, err := t.get(name)
	switch {
	case err != nil:
		return p, fmt.Errorf("parent: %w", err)
	case p.Kind != Committed:
		return p, markedf(layers.ErrInvalid, "parent snapshot %q is not committed", name)
	}
	return p, nil
}

// commit makes a committed snapshot called to of the active one called from.
func (t tx) commit(from, to string, labels map[string]string, u Usage, now time.Time) error {
	if err := t.free(to); err != nil {
		return err
	}
	r, err := t.get(from)
	if err != nil {
		return err
	}
	if r.Kind != Active {
		return notActive(from, r)
	}
	r.Kind, r.Labels, r.Usage, r.Created, r.Updated = Committed, labels, u, now, now
	if err := t.t.Bucket(bucketSnapshots).Delete([]byte(from)); err != nil {
		return fmt.Errorf("remove the row of snapshot %q: %w", from, err)
	}
	if err := t.put(to, r); err != nil {
		return err
	}
	return t.link(to, r, true)
}

func notActive(name string, r row) error {
	return markedf(layers.ErrInUse, "snapshot %q is not active but %s: it cannot be committed", name, r.Kind)
}

// remove removes a row that has no children.
func (t tx) remove(name string) error {
	r, err := t.get(name)
	if err != nil {
		return err
	}
	if c := t.child(r); c != "" {
		return markedf(layers.ErrInUse, "snapshot %q cannot be removed: it has a child, %q", name, c)
	}
	if err := t.link(name, r, false); err != nil {
		return err
	}
	if err := t.t.Bucket(bucketSnapshots).Delete([]byte(name)); err != nil {
		return fmt.Errorf("remove the row of snapshot %q: %w", name, err)
	}
	return nil
}

// each calls f with every snapshot, by name. One whose row cannot be read is handed to bad.
func (t tx) each(f func(name string, r row) error, bad func(name string, err error)) error {
	return t.t.Bucket(bucketSnapshots).ForEach(func(k, v []byte) error {
		var r row
		if err := json.Unmarshal(v, &r); err != nil {
			bad(string(k), err)
			return nil
		}
		return f(string(k), r)
	})
}
