package metadata

import "github.com/opencontainers/go-digest"

// Blob returns a compressed layer that is kept.
func (tx *Tx) Blob(d digest.Digest) (Blob, error) {
	return get[Blob](tx, bktBlobs, d.String(), "blob")
}

// Blobs returns all compressed layers that are kept.
func (tx *Tx) Blobs() ([]Blob, error) { return all[Blob](tx, bktBlobs) }

// PutBlob records a compressed layer that is kept. It lives as long as a layer
// that came from it.
func (tx *Tx) PutBlob(b Blob) error { return put(tx, bktBlobs, []byte(b.Digest), b) }

// DeleteBlob forgets one.
func (tx *Tx) DeleteBlob(d digest.Digest) error { return tx.b(bktBlobs).Delete([]byte(d)) }
