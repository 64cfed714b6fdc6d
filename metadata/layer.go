package metadata

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
)

// ChainID is the identity of a layer on top of a parent (image-spec,
// config.md, "Layer ChainID").
func ChainID(parent, diffID digest.Digest) digest.Digest {
	if parent == "" {
		return diffID
	}
	return digest.FromString(parent.String() + " " + diffID.String())
}

// Layer returns one layer.
func (tx *Tx) Layer(chain digest.Digest) (Layer, error) {
	return get[Layer](tx, bktLayers, chain.String(), "layer")
}

// HasLayer reports whether a layer exists.
func (tx *Tx) HasLayer(chain digest.Digest) bool {
	return chain != "" && tx.b(bktLayers).Get([]byte(chain)) != nil
}

// Layers returns all layers.
func (tx *Tx) Layers() ([]Layer, error) { return all[Layer](tx, bktLayers) }

// Chain returns a layer and all below it, topmost first; with an error, those above
// the first one that is missing.
func (tx *Tx) Chain(chain digest.Digest) ([]Layer, error) {
	var out []Layer
	var seen map[digest.Digest]bool
	for chain != "" {
		if len(out) > 1000 { // rarely: only then it may be a circle
			if seen == nil {
				seen = map[digest.Digest]bool{}
			}
			if seen[chain] {
				return out, fmt.Errorf("layer %s: %w: its parents form a circle", chain, ErrInvariant)
			}
			seen[chain] = true
		}
		l, err := tx.Layer(chain)
		if err != nil {
			return out, err
		}
		out = append(out, l)
		chain = l.Parent
	}
	return out, nil
}

// Cache returns one content directory.
func (tx *Tx) Cache(id string) (Cache, error) {
	return get[Cache](tx, bktCache, id, "content directory")
}

// Caches returns all content directories.
func (tx *Tx) Caches() ([]Cache, error) { return all[Cache](tx, bktCache) }

// CachesByDiff returns the content directories that hold a diffID.
func (tx *Tx) CachesByDiff(diffID digest.Digest) ([]Cache, error) {
	var out []Cache
	for _, id := range tx.seconds(idxCacheDiff, diffID.String()) {
		c, err := tx.Cache(id)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// ChainsByCache returns the layers that share a content directory.
func (tx *Tx) ChainsByCache(id string) []digest.Digest { return digests(tx.seconds(idxCacheChain, id)) }

// ChainsByDiff returns the layers with a diffID.
func (tx *Tx) ChainsByDiff(d digest.Digest) []digest.Digest {
	return digests(tx.seconds(idxLayerDiff, d.String()))
}

// ChainsByBlob returns the layers that came from a blob.
func (tx *Tx) ChainsByBlob(d digest.Digest) []digest.Digest {
	return digests(tx.seconds(idxLayerBlob, d.String()))
}

// ChainPrefix returns the chainIDs that start with prefix.
func (tx *Tx) ChainPrefix(prefix string) []digest.Digest { return tx.prefixed(bktLayers, prefix) }

func digests(ss []string) []digest.Digest {
	out := make([]digest.Digest, len(ss))
	for i, s := range ss {
		out[i] = digest.Digest(s)
	}
	return out
}

// AddLayer inserts a layer. Its content is either a new directory, whose row
// is given, or an existing one, and then c is nil.
func (tx *Tx) AddLayer(l Layer, c *Cache) error {
	switch {
	case l.ChainID != ChainID(l.Parent, l.DiffID):
		return fmt.Errorf("layer %s: %w: chainID does not follow from parent %s and diffID %s", l.ChainID, ErrInvariant, l.Parent, l.DiffID)
	case tx.HasLayer(l.ChainID):
		return fmt.Errorf("layer %s: %w", l.ChainID, ErrExists)
	}
	l.Depth = 1
	if l.Parent != "" {
		p, err := tx.Layer(l.Parent)
		if err != nil {
			return fmt.Errorf("parent of layer %s: %w", l.ChainID, err)
		}
		l.Depth = p.Depth + 1
	}
	if c != nil {
		if c.CacheID != l.CacheID || c.DiffID != l.DiffID {
			return fmt.Errorf("layer %s: %w: content directory %q does not belong to it", l.ChainID, ErrInvariant, c.CacheID)
		}
		if tx.b(bktCache).Get([]byte(c.CacheID)) != nil {
			return fmt.Errorf("content directory %q: %w", c.CacheID, ErrExists)
		}
		if err := put(tx, bktCache, []byte(c.CacheID), c); err != nil {
			return err
		}
		if err := tx.mark(idxCacheDiff, c.DiffID.String(), c.CacheID); err != nil {
			return err
		}
	} else if have, err := tx.Cache(l.CacheID); err != nil {
		return fmt.Errorf("layer %s: %w", l.ChainID, err)
	} else if have.DiffID != l.DiffID {
		return fmt.Errorf("layer %s: %w: content directory %q holds %s", l.ChainID, ErrInvariant, l.CacheID, have.DiffID)
	}
	if err := put(tx, bktLayers, []byte(l.ChainID), l); err != nil {
		return err
	}
	return tx.indexLayer(l)
}

func (tx *Tx) indexLayer(l Layer) error {
	c := l.ChainID.String()
	if err := tx.putBrief(l); err != nil {
		return err
	}
	if err := tx.mark(idxCacheChain, l.CacheID, c); err != nil {
		return err
	}
	if err := tx.mark(idxLayerDiff, l.DiffID.String(), c); err != nil {
		return err
	}
	if l.Blob != "" {
		if err := tx.mark(idxLayerBlob, l.Blob.String(), c); err != nil {
			return err
		}
	}
	if l.Parent != "" {
		return tx.mark(idxLayerChild, l.Parent.String(), c)
	}
	return nil
}

// SetBlob remembers the blob a layer was found in.
func (tx *Tx) SetBlob(chain, blob digest.Digest, size int64, mediaType string) error {
	l, err := tx.Layer(chain)
	if err != nil || blob == "" || l.Blob == blob {
		return err
	}
	if l.Blob != "" {
		if err := tx.unmark(idxLayerBlob, l.Blob.String(), chain.String()); err != nil {
			return err
		}
	}
	l.Blob, l.BlobSize, l.MediaType = blob, size, mediaType
	if err := put(tx, bktLayers, []byte(chain), l); err != nil {
		return err
	}
	return tx.mark(idxLayerBlob, blob.String(), chain.String())
}

// PutCache rewrites the row of an existing content directory.
func (tx *Tx) PutCache(c Cache) error {
	old, err := tx.Cache(c.CacheID)
	if err != nil {
		return err
	}
	if old.DiffID != c.DiffID {
		return fmt.Errorf("content directory %q: %w: its diffID is fixed", c.CacheID, ErrInvariant)
	}
	if err := put(tx, bktCache, []byte(c.CacheID), c); err != nil || old.Apparent == c.Apparent {
		return err
	}
	for _, chain := range tx.ChainsByCache(c.CacheID) {
		if l, err := tx.Layer(chain); err != nil {
			return err
		} else if err := tx.putBrief(l); err != nil {
			return err
		}
	}
	return nil
}

// Brief is what sums over many layers need of each.
type Brief struct {
	Parent digest.Digest
	Size   int64 // Cache.Apparent
}

// putBrief writes the index entry of a layer whose content has a row.
func (tx *Tx) putBrief(l Layer) error {
	c, err := tx.Cache(l.CacheID)
	if err != nil {
		return err
	}
	return tx.b(idxLayerBrief).Put([]byte(l.ChainID), []byte(brief(l, c)))
}

func brief(l Layer, c Cache) string {
	return strconv.FormatInt(c.Apparent, 10) + " " + l.Parent.String()
}

// Briefs returns that of every layer, much faster than the rows themselves.
func (tx *Tx) Briefs() map[digest.Digest]Brief {
	out := map[digest.Digest]Brief{}
	_ = tx.b(idxLayerBrief).ForEach(func(k, v []byte) error { // which cannot fail
		size, parent, _ := strings.Cut(string(v), " ")
		n, _ := strconv.ParseInt(size, 10, 64) // K9 tells
		out[digest.Digest(k)] = Brief{Parent: digest.Digest(parent), Size: n}
		return nil
	})
	return out
}

// ReplaceCache puts whole content, c, in the place of a broken directory: every layer
// that had the old one has the new one.
func (tx *Tx) ReplaceCache(old string, c Cache) error {
	o, err := tx.Cache(old)
	if err != nil {
		return err
	}
	if o.DiffID != c.DiffID || tx.b(bktCache).Get([]byte(c.CacheID)) != nil {
		return fmt.Errorf("content directory %q in place of %q: %w", c.CacheID, old, ErrInvariant)
	}
	if err := errors.Join(put(tx, bktCache, []byte(c.CacheID), c), tx.mark(idxCacheDiff, c.DiffID.String(), c.CacheID)); err != nil {
		return err
	}
	for _, chain := range tx.ChainsByCache(old) {
		l, err := tx.Layer(chain)
		if err != nil {
			return err
		}
		if err := tx.unmark(idxCacheChain, old, chain.String()); err != nil {
			return err
		}
		l.CacheID = c.CacheID
		if err := errors.Join(put(tx, bktLayers, []byte(chain), l), tx.indexLayer(l)); err != nil {
			return err
		}
		if err := tx.touchAbove(old, c.CacheID, chain); err != nil {
			return err
		}
	}
	return errors.Join(tx.b(bktCache).Delete([]byte(old)), tx.unmark(idxCacheDiff, o.DiffID.String(), old))
}

// touchAbove notes that a layer has another directory for all that lies on top of it,
// and corrects the containers whose init layer it is.
func (tx *Tx) touchAbove(old, now string, chain digest.Digest) error {
	todo := []digest.Digest{chain}
	seen := map[digest.Digest]bool{}
	for len(todo) > 0 {
		at := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[at] {
			continue
		}
		seen[at] = true
		todo = append(todo, digests(tx.seconds(idxLayerChild, at.String()))...)
		for _, id := range tx.ImagesByChain(at) {
			tx.touchImage(id)
		}
		for _, id := range tx.seconds(idxContainerChain, at.String()) {
			tx.touchContainer(id)
			if c, err := tx.Container(id); err == nil && c.Init == old {
				c.Init = now
				if err := put(tx, bktContainers, []byte(id), c); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// ReplaceContent gives a layer another content directory, whose row is inserted. If
// the layer was the last one on the old directory, that row goes and its cacheID is
// returned.
func (tx *Tx) ReplaceContent(chain digest.Digest, c Cache) (orphan string, err error) {
	l, err := tx.Layer(chain)
	if err != nil {
		return "", err
	}
	if c.DiffID != l.DiffID || tx.b(bktCache).Get([]byte(c.CacheID)) != nil {
		return "", fmt.Errorf("layer %s: %w: content directory %q does not belong to it, or is there", chain, ErrInvariant, c.CacheID)
	}
	old := l.CacheID
	l.CacheID = c.CacheID
	if err := errors.Join(put(tx, bktCache, []byte(c.CacheID), c), tx.mark(idxCacheDiff, c.DiffID.String(), c.CacheID),
		put(tx, bktLayers, []byte(chain), l), tx.unmark(idxCacheChain, old, chain.String()), tx.indexLayer(l), tx.touchAbove(old, c.CacheID, chain)); err != nil {
		return "", err
	}
	if tx.any(idxCacheChain, old) {
		return "", nil
	}
	if err := tx.b(bktCache).Delete([]byte(old)); err != nil {
		return "", err
	}
	return old, tx.unmark(idxCacheDiff, l.DiffID.String(), old)
}

// Users is what keeps a layer alive.
type Users struct {
	Layers     []digest.Digest // on top of it
	Images     []digest.Digest
	Containers []string
	Leases     []string
	Mounts     []string // targets
}

// None reports whether nothing does.
func (u Users) None() bool {
	return len(u.Layers)+len(u.Images)+len(u.Containers)+len(u.Leases)+len(u.Mounts) == 0
}

// LayerUsers returns what keeps a layer alive.
func (tx *Tx) LayerUsers(chain digest.Digest) (Users, error) {
	c := chain.String()
	u := Users{
		Layers:     digests(tx.seconds(idxLayerChild, c)),
		Images:     digests(tx.seconds(idxImageChain, c)),
		Containers: tx.seconds(idxContainerChain, c),
	}
	u.Leases = tx.seconds(idxLayerLease, c)
	for _, m := range tx.seconds(idxLiveChain, c) {
		_, target := split([]byte(m))
		u.Mounts = append(u.Mounts, target)
	}
	return u, nil
}

// UnusedLayers returns the layers that nothing keeps alive, not counting what lies only
// below them.
func (tx *Tx) UnusedLayers() (out []digest.Digest) {
	for _, c := range tx.keys(bktLayers) {
		used := false
		for _, idx := range [][]byte{idxLayerChild, idxImageChain, idxContainerChain, idxLayerLease, idxLiveChain} {
			used = used || tx.any(idx, c)
		}
		if !used {
			out = append(out, digest.Digest(c))
		}
	}
	return out
}

// DeleteLayer removes a layer that nothing uses. If it was the last one on its
// content directory, that row goes too and its cacheID is returned.
func (tx *Tx) DeleteLayer(chain digest.Digest) (orphan string, err error) {
	l, err := tx.Layer(chain)
	if err != nil {
		return "", err
	}
	u, err := tx.LayerUsers(chain)
	if err != nil {
		return "", err
	}
	if !u.None() {
		return "", fmt.Errorf("layer %s: %w", chain, ErrInUse)
	}
	return tx.dropLayer(l)
}

func (tx *Tx) dropLayer(l Layer) (orphan string, err error) {
	c := l.ChainID.String()
	if err := errors.Join(tx.b(bktLayers).Delete([]byte(c)), tx.b(idxLayerBrief).Delete([]byte(c))); err != nil {
		return "", err
	}
	for _, k := range []struct {
		b    []byte
		a, z string
	}{
		{idxCacheChain, l.CacheID, c},
		{idxLayerDiff, l.DiffID.String(), c},
		{idxLayerBlob, l.Blob.String(), c},
		{idxLayerChild, l.Parent.String(), c},
	} {
		if err := tx.unmark(k.b, k.a, k.z); err != nil {
			return "", err
		}
	}
	if tx.any(idxCacheChain, l.CacheID) {
		return "", nil
	}
	if err := tx.b(bktCache).Delete([]byte(l.CacheID)); err != nil {
		return "", err
	}
	return l.CacheID, tx.unmark(idxCacheDiff, l.DiffID.String(), l.CacheID)
}
