package metadata

import (
	"slices"

	"github.com/opencontainers/go-digest"
)

// Touched says which images and containers a transaction has changed or removed.
// What is kept of them outside the database has to follow.
type Touched struct {
	Images     []digest.Digest
	Containers []string // IDs
}

// Touched returns what the transaction has changed so far.
func (tx *Tx) Touched() Touched { return tx.touched }

func (tx *Tx) touchImage(id digest.Digest) {
	if !slices.Contains(tx.touched.Images, id) {
		tx.touched.Images = append(tx.touched.Images, id)
	}
}

func (tx *Tx) touchContainer(id string) {
	if !slices.Contains(tx.touched.Containers, id) {
		tx.touched.Containers = append(tx.touched.Containers, id)
	}
}

// Skipped is how many rows the transaction has met, while it listed rows, that cannot
// be decoded. They are left out; [Tx.BadRows] names them.
func (tx *Tx) Skipped() int { return tx.skipped }
