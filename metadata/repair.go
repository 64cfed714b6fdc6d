package metadata

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// BadRow is a row that cannot be decoded, or that is under the key of another.
type BadRow struct {
	Bucket, Key string
	Err         error
}

// BadRows looks for rows that cannot be decoded.
func (tx *Tx) BadRows() (out []BadRow) {
	for _, b := range []struct {
		name []byte
		row  func() any
	}{
		{bktLayers, func() any { return &Layer{} }},
		{bktCache, func() any { return &Cache{} }},
		{bktImages, func() any { return &Image{} }},
		{bktRefs, func() any { return &Ref{} }},
		{bktContainers, func() any { return &Container{} }},
		{bktLive, func() any { return &Live{} }},
		{bktIngests, func() any { return &Ingest{} }},
		{bktLeases, func() any { return &Lease{} }},
		{bktTrash, func() any { return &Trash{} }},
		{bktBlobs, func() any { return &Blob{} }},
		{bktWanted, func() any { return &Wanted{} }},
	} {
		_ = tx.b(b.name).ForEach(func(k, v []byte) error {
			row := b.row()
			err := decode(v, row)
			id := string(k)
			switch r := row.(type) {
			case *Layer:
				id = r.ChainID.String()
			case *Cache:
				id = r.CacheID
			case *Image:
				id = r.ID.String()
			case *Container:
				id = r.ID
			case *Live:
				id = string(key(r.BootID, r.Target))
			case *Ingest:
				id = r.ID
			case *Lease:
				id = r.ID
			case *Blob:
				id = r.Digest.String()
			case *Trash:
				id = string(binary.BigEndian.AppendUint64(nil, r.Seq))
			}
			if err == nil && id != string(k) {
				err = fmt.Errorf("%w: it is the row of %q", ErrCorrupt, id)
			}
			if err != nil {
				out = append(out, BadRow{string(b.name), string(k), err})
			}
			return nil
		})
	}
	return out
}

// DropBadRow removes a row that cannot be decoded. Indexes have to be rebuilt after
// it.
func (tx *Tx) DropBadRow(r BadRow) error {
	b := tx.b([]byte(r.Bucket))
	if b == nil {
		return fmt.Errorf("bucket %q: %w", r.Bucket, ErrNotFound)
	}
	switch r.Bucket {
	case string(bktImages):
		tx.touchImage(digest.Digest(r.Key))
	case string(bktContainers):
		tx.touchContainer(r.Key)
	}
	return b.Delete([]byte(r.Key))
}

// CacheIDs returns the names of all content directories that have a row, also one
// that cannot be decoded.
func (tx *Tx) CacheIDs() []string { return tx.keys(bktCache) }

// MountIDs returns the names of all writable layers that a container has, also one
// whose row cannot be decoded.
func (tx *Tx) MountIDs() (out []string) {
	_ = tx.b(idxContainerMount).ForEach(func(k, id []byte) error { // which cannot fail
		if tx.b(bktContainers).Get(id) != nil {
			out = append(out, string(k))
		}
		return nil
	})
	return out
}

// IngestIDs returns the IDs of all stages, also of rows that cannot be decoded.
func (tx *Tx) IngestIDs() []string { return tx.keys(bktIngests) }

// ImageIDs returns the IDs of all images, also of rows that cannot be decoded.
func (tx *Tx) ImageIDs() []digest.Digest { return digests(tx.keys(bktImages)) }

// DropLayerRow removes a layer whatever names it (repair of K3, K4, K5). The ID of its
// content directory is returned if no other layer has it; its row is gone too.
func (tx *Tx) DropLayerRow(chain digest.Digest) (orphan string, err error) {
	l, err := tx.Layer(chain)
	if err != nil {
		return "", errors.Join(tx.b(bktLayers).Delete([]byte(chain)), tx.b(idxLayerBrief).Delete([]byte(chain)))
	}
	if l.ChainID != chain {
		l.ChainID = chain // what its key says is what is removed
	}
	return tx.dropLayer(l)
}

// LayerChildren returns the layers on top of one.
func (tx *Tx) LayerChildren(chain digest.Digest) []digest.Digest {
	return digests(tx.seconds(idxLayerChild, chain.String()))
}

// SetLayerDepth corrects the depth of a layer from its parent's (repair of K4).
func (tx *Tx) SetLayerDepth(chain digest.Digest) error {
	l, err := tx.Layer(chain)
	if err != nil {
		return err
	}
	l.Depth = 1
	if l.Parent != "" {
		p, err := tx.Layer(l.Parent)
		if err != nil {
			return err
		}
		l.Depth = p.Depth + 1
	}
	return put(tx, bktLayers, []byte(chain), l)
}

// SetConfig puts back the config of an image (repair of K10).
func (tx *Tx) SetConfig(id digest.Digest, config []byte) error {
	if id.Validate() != nil || id.Algorithm().FromBytes(config) != id {
		return fmt.Errorf("config of image %s: %w: it does not have this digest", id, ErrInvariant)
	}
	tx.touchImage(id)
	return tx.b(bktConfigs).Put([]byte(id), config)
}

// FixImage makes the row of an image agree with its config (repair of K11), and makes
// one if there is none.
func (tx *Tx) FixImage(id digest.Digest) error {
	config, err := tx.Config(id)
	if err != nil {
		return err
	}
	top, ok := configChain(config)
	if !ok {
		return fmt.Errorf("config of image %s: %w: it is not JSON", id, ErrCorrupt)
	}
	i, err := tx.Image(id)
	if err != nil {
		i = Image{ID: id, Origin: "repair"}
	} else if err := tx.unmark(idxImageChain, i.TopChain.String(), id.String()); err != nil {
		return err
	}
	i.ID, i.TopChain = id, top
	i.brief(config)
	tx.touchImage(id)
	if err := put(tx, bktImages, []byte(id), i); err != nil {
		return err
	}
	return tx.indexImage(i)
}

// DropManifest removes one manifest of an image (repair of K26).
func (tx *Tx) DropManifest(image, d digest.Digest) error {
	tx.touchImage(image)
	return errors.Join(tx.unmark(bktManifests, image.String(), d.String()), tx.unmark(idxManifestDigest, d.String(), image.String()))
}

// DropBuild removes one entry of the build cache by its key (repair of K26).
func (tx *Tx) DropBuild(k string) error {
	if image := tx.b(bktBuildCache).Get([]byte(k)); image != nil {
		if err := tx.unmark(idxBuildCacheImage, string(image), k); err != nil {
			return err
		}
	}
	return tx.b(bktBuildCache).Delete([]byte(k))
}

// Place is what the database remembers of the file system it is on; empty if nothing.
func (tx *Tx) Place() string { return string(tx.b(bktMeta).Get(keyPlace)) }

// SetPlace remembers it.
func (tx *Tx) SetPlace(p string) error { return tx.b(bktMeta).Put(keyPlace, []byte(p)) }

// DropRef removes a reference row whose image is gone (repair of K12).
func (tx *Tx) DropRef(name string) error {
	if r, err := tx.Ref(name); err == nil {
		tx.touchImage(r.ImageID)
		_ = tx.unmark(idxRefImage, r.ImageID.String(), name)
	}
	return tx.b(bktRefs).Delete([]byte(name))
}

// DropImage removes an image row and its references (repair of K10, K11).
func (tx *Tx) DropImage(id digest.Digest) error {
	for _, r := range tx.RefsOf(id) {
		if err := tx.DropRef(r); err != nil {
			return err
		}
	}
	i, err := tx.Image(id)
	if err != nil {
		i = Image{ID: id} // what else names it
	}
	return tx.dropImage(i)
}

// DropCache removes a content row that no layer names (repair of K7).
func (tx *Tx) DropCache(id string) error {
	c, err := tx.Cache(id)
	if err != nil {
		return err
	}
	if tx.any(idxCacheChain, id) {
		return fmt.Errorf("content directory %q: %w", id, ErrInUse)
	}
	if err := tx.b(bktCache).Delete([]byte(id)); err != nil {
		return err
	}
	return tx.unmark(idxCacheDiff, c.DiffID.String(), id)
}
