package metatest

import (
	"bytes"
	"os"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/plyfs/plyfs/metadata"
)

// Edit gives fn the raw rows of the database at path.
func Edit(t testing.TB, path string, fn func(b Buckets)) {
	t.Helper()
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error { fn(Buckets{t, tx}); return nil })
	if cerr := db.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Buckets are the rows of a database in a transaction.
type Buckets struct {
	t  testing.TB
	tx *bolt.Tx
}

// Keys returns the keys of a bucket in order.
func (b Buckets) Keys(bucket string) (out []string) {
	_ = b.tx.Bucket([]byte(bucket)).ForEach(func(k, _ []byte) error { out = append(out, string(k)); return nil })
	return out
}

// Get returns a value.
func (b Buckets) Get(bucket, key string) []byte {
	return bytes.Clone(b.tx.Bucket([]byte(bucket)).Get([]byte(key)))
}

// Put sets a value.
func (b Buckets) Put(bucket, key string, value []byte) {
	if err := b.tx.Bucket([]byte(bucket)).Put([]byte(key), value); err != nil {
		b.t.Fatal(err)
	}
}

// Delete removes a key.
func (b Buckets) Delete(bucket, key string) {
	if err := b.tx.Bucket([]byte(bucket)).Delete([]byte(key)); err != nil {
		b.t.Fatal(err)
	}
}

// Replace changes a part of the value of every key of a bucket.
func (b Buckets) Replace(bucket, from, to string) {
	for _, k := range b.Keys(bucket) {
		b.Put(bucket, k, bytes.ReplaceAll(b.Get(bucket, k), []byte(from), []byte(to)))
	}
}

// DropBucket removes a whole bucket.
func (b Buckets) DropBucket(bucket string) {
	if err := b.tx.DeleteBucket([]byte(bucket)); err != nil {
		b.t.Fatal(err)
	}
}

// Whole reports whether a database can be edited.
func Whole(path string) bool {
	st, err := os.Stat(path)
	if err != nil || !st.Mode().IsRegular() || st.Size() < 1<<16 {
		return false
	}
	s, err := metadata.Salvage(path)
	return err == nil && len(s.Problems) == 0
}
