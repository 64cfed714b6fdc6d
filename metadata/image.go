package metadata

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// Image returns one image.
func (tx *Tx) Image(id digest.Digest) (Image, error) {
	return get[Image](tx, bktImages, id.String(), "image")
}

// Images returns all images.
func (tx *Tx) Images() ([]Image, error) { return all[Image](tx, bktImages) }

// Config returns a copy of an image's config.
func (tx *Tx) Config(id digest.Digest) ([]byte, error) {
	raw := tx.b(bktConfigs).Get([]byte(id))
	if raw == nil {
		return nil, fmt.Errorf("config of image %q: %w", id, ErrNotFound)
	}
	return bytes.Clone(raw), nil
}

// ImagePrefix returns the image IDs that start with prefix, which is hex with
// or without "sha256:".
func (tx *Tx) ImagePrefix(prefix string) []digest.Digest { return tx.prefixed(bktImages, prefix) }

func (tx *Tx) prefixed(bucket []byte, prefix string) []digest.Digest {
	if !strings.Contains(prefix, ":") {
		prefix = digest.Canonical.String() + ":" + prefix
	}
	var out []digest.Digest
	c := tx.b(bucket).Cursor()
	for k, _ := c.Seek([]byte(prefix)); k != nil && bytes.HasPrefix(k, []byte(prefix)); k, _ = c.Next() {
		out = append(out, digest.Digest(k))
	}
	return out
}

// ImageChildren returns the images that were committed from one.
func (tx *Tx) ImageChildren(id digest.Digest) []digest.Digest {
	return digests(tx.seconds(idxImageChild, id.String()))
}

// ImagesByChain returns the images whose top layer is chain.
func (tx *Tx) ImagesByChain(chain digest.Digest) []digest.Digest {
	return digests(tx.seconds(idxImageChain, chain.String()))
}

// brief takes from an image's config what lists show, so that they need not read it.
// A config that says nothing of it leaves the row as it is.
func (i *Image) brief(config []byte) {
	var c struct {
		Created *time.Time `json:"created"`
		RootFS  struct {
			DiffIDs []json.RawMessage `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if json.Unmarshal(config, &c) != nil {
		return
	}
	i.Made, i.Layers = time.Time{}, len(c.RootFS.DiffIDs)
	if c.Created != nil {
		i.Made = *c.Created
	}
}

// AddImage inserts an image with its config. An image that exists stays as it
// is, and created is false.
func (tx *Tx) AddImage(i Image, config []byte) (created bool, err error) {
	if tx.b(bktImages).Get([]byte(i.ID)) != nil {
		return false, nil
	}
	if i.TopChain != "" && !tx.HasLayer(i.TopChain) {
		return false, fmt.Errorf("image %s: %w: its top layer %s does not exist", i.ID, ErrInvariant, i.TopChain)
	}
	i.brief(config)
	tx.touchImage(i.ID)
	if err := put(tx, bktImages, []byte(i.ID), i); err != nil {
		return false, err
	}
	if err := tx.b(bktConfigs).Put([]byte(i.ID), config); err != nil {
		return false, err
	}
	return true, tx.indexImage(i)
}

func (tx *Tx) indexImage(i Image) error {
	if i.Parent != "" {
		if err := tx.mark(idxImageChild, i.Parent.String(), i.ID.String()); err != nil {
			return err
		}
	}
	if i.TopChain != "" {
		return tx.mark(idxImageChain, i.TopChain.String(), i.ID.String())
	}
	return nil
}

// DeleteImage removes an image that no reference names and no container uses.
func (tx *Tx) DeleteImage(id digest.Digest) error {
	i, err := tx.Image(id)
	if err != nil {
		return err
	}
	if tx.any(idxRefImage, id.String()) || tx.any(idxContainerImage, id.String()) {
		return fmt.Errorf("image %s: %w", id, ErrInUse)
	}
	return tx.dropImage(i)
}

func (tx *Tx) dropImage(i Image) error {
	id := i.ID.String()
	tx.touchImage(i.ID)
	if err := tx.b(bktImages).Delete([]byte(id)); err != nil {
		return err
	}
	if err := tx.b(bktConfigs).Delete([]byte(id)); err != nil {
		return err
	}
	if err := errors.Join(tx.dropManifests(i.ID), tx.dropBuilds(i.ID)); err != nil {
		return err
	}
	if err := tx.unmark(idxImageChild, i.Parent.String(), id); err != nil {
		return err
	}
	return tx.unmark(idxImageChain, i.TopChain.String(), id)
}

// SetImageParent changes or clears the image another was committed from.
func (tx *Tx) SetImageParent(id, parent digest.Digest) error {
	i, err := tx.Image(id)
	if err != nil {
		return err
	}
	if err := tx.unmark(idxImageChild, i.Parent.String(), id.String()); err != nil {
		return err
	}
	i.Parent = parent
	tx.touchImage(id)
	if err := put(tx, bktImages, []byte(id), i); err != nil {
		return err
	}
	return tx.indexImage(i)
}

// Ref returns what a canonical reference names.
func (tx *Tx) Ref(name string) (Ref, error) { return get[Ref](tx, bktRefs, name, "reference") }

// Refs returns all references in order.
func (tx *Tx) Refs() (names []string, refs []Ref, err error) {
	err = tx.b(bktRefs).ForEach(func(k, raw []byte) error {
		var r Ref
		if decode(raw, &r) != nil {
			tx.skipped++
			return nil
		}
		names, refs = append(names, string(k)), append(refs, r)
		return nil
	})
	return names, refs, err
}

// RefsOf returns the references of an image in order.
func (tx *Tx) RefsOf(id digest.Digest) []string { return tx.seconds(idxRefImage, id.String()) }

// SetRef makes a reference name an image and returns the one it named before.
func (tx *Tx) SetRef(name string, r Ref) (old digest.Digest, err error) {
	img, err := tx.Image(r.ImageID)
	if err != nil {
		return "", err
	}
	if !img.Tagged && !strings.Contains(name, "@") {
		img.Tagged = true
		if err := put(tx, bktImages, []byte(img.ID), img); err != nil {
			return "", err
		}
	}
	tx.touchImage(r.ImageID)
	if prev, err := tx.Ref(name); err == nil {
		old = prev.ImageID
		tx.touchImage(old)
		if err := tx.unmark(idxRefImage, old.String(), name); err != nil {
			return "", err
		}
	}
	if err := put(tx, bktRefs, []byte(name), r); err != nil {
		return "", err
	}
	return old, tx.mark(idxRefImage, r.ImageID.String(), name)
}

// DeleteRef removes a reference.
func (tx *Tx) DeleteRef(name string) error {
	r, err := tx.Ref(name)
	if err != nil {
		return err
	}
	tx.touchImage(r.ImageID)
	if err := tx.unmark(idxRefImage, r.ImageID.String(), name); err != nil {
		return err
	}
	return tx.b(bktRefs).Delete([]byte(name))
}
