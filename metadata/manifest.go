package metadata

import (
	"bytes"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// AddManifest keeps a manifest of an image, byte for byte: a registry knows the
// image by its digest. An image has one for each form in which it has been pulled
// or loaded.
func (tx *Tx) AddManifest(image, d digest.Digest, raw []byte) error {
	if _, err := tx.Image(image); err != nil {
		return err
	}
	if d.Validate() != nil || d.Algorithm().FromBytes(raw) != d {
		return fmt.Errorf("manifest %s of image %s: %w: it does not have this digest", d, image, ErrInvariant)
	}
	tx.touchImage(image)
	if err := tx.b(bktManifests).Put(key(image.String(), d.String()), raw); err != nil {
		return err
	}
	return tx.mark(idxManifestDigest, d.String(), image.String())
}

// Manifest returns a copy of a manifest of an image.
func (tx *Tx) Manifest(image, d digest.Digest) ([]byte, error) {
	raw := tx.b(bktManifests).Get(key(image.String(), d.String()))
	if raw == nil {
		return nil, fmt.Errorf("manifest %s of image %s: %w", d, image, ErrNotFound)
	}
	return bytes.Clone(raw), nil
}

// Manifests returns the digests of an image's manifests.
func (tx *Tx) Manifests(image digest.Digest) []digest.Digest {
	return digests(tx.seconds(bktManifests, image.String()))
}

// ImagesByManifest returns the images that have a manifest.
func (tx *Tx) ImagesByManifest(d digest.Digest) []digest.Digest {
	return digests(tx.seconds(idxManifestDigest, d.String()))
}

func (tx *Tx) dropManifests(image digest.Digest) error {
	for _, d := range tx.Manifests(image) {
		if err := tx.unmark(bktManifests, image.String(), d.String()); err != nil {
			return err
		}
		if err := tx.unmark(idxManifestDigest, d.String(), image.String()); err != nil {
			return err
		}
	}
	return nil
}

// Build returns the image that a step with this hash has made of parent, which is
// empty for a step on nothing.
func (tx *Tx) Build(parent digest.Digest, hash string) (image digest.Digest, ok bool) {
	v := tx.b(bktBuildCache).Get(key(parent.String(), hash))
	return digest.Digest(v), v != nil
}

// PutBuild remembers what a step has made, replacing what it made before.
func (tx *Tx) PutBuild(parent digest.Digest, hash string, image digest.Digest) error {
	if _, err := tx.Image(image); err != nil {
		return err
	}
	k := key(parent.String(), hash)
	if old := tx.b(bktBuildCache).Get(k); old != nil {
		if err := tx.unmark(idxBuildCacheImage, string(old), string(k)); err != nil {
			return err
		}
	}
	if err := tx.b(bktBuildCache).Put(k, []byte(image)); err != nil {
		return err
	}
	return tx.mark(idxBuildCacheImage, image.String(), string(k))
}

// dropBuilds forgets which steps have made an image.
func (tx *Tx) dropBuilds(image digest.Digest) error {
	for _, k := range tx.seconds(idxBuildCacheImage, image.String()) {
		if err := tx.b(bktBuildCache).Delete([]byte(k)); err != nil {
			return err
		}
		if err := tx.unmark(idxBuildCacheImage, image.String(), k); err != nil {
			return err
		}
	}
	return nil
}
