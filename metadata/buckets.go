package metadata

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

var (
	bktMeta       = []byte("meta")
	bktLayers     = []byte("layers")
	bktCache      = []byte("cache")
	bktConfigs    = []byte("configs")
	bktImages     = []byte("images")
	bktRefs       = []byte("refs")
	bktContainers = []byte("containers")
	bktLive       = []byte("live")
	bktIngests    = []byte("ingests")
	bktLeases     = []byte("leases")
	bktLeaseLayer = []byte("lease_layer")
	bktTrash      = []byte("trash")
	bktManifests  = []byte("manifests")
	bktBlobs      = []byte("blobs")
	bktBuildCache = []byte("buildcache")
	bktWanted     = []byte("wanted")

	idxCacheChain     = []byte("cache_chain")
	idxCacheDiff      = []byte("cache_diff")
	idxLayerChild     = []byte("layer_child")
	idxLayerDiff      = []byte("layer_diff")
	idxLayerBlob      = []byte("layer_blob")
	idxImageChain     = []byte("image_chain")
	idxImageChild     = []byte("image_child")
	idxRefImage       = []byte("ref_image")
	idxContainerName  = []byte("container_name")
	idxContainerChain = []byte("container_chain")
	idxContainerImage = []byte("container_image")
	idxContainerMount = []byte("container_mount")
	idxManifestDigest = []byte("manifest_digest")

	idxBuildCacheImage = []byte("buildcache_image")
	idxLayerBrief      = []byte("layer_brief")
	idxLayerLease      = []byte("layer_lease")
	idxLiveChain       = []byte("live_chain")

	primaries = [][]byte{
		bktMeta, bktLayers, bktCache, bktConfigs, bktImages, bktRefs, bktContainers,
		bktLive, bktIngests, bktLeases, bktLeaseLayer, bktTrash, bktManifests, bktBlobs, bktBuildCache, bktWanted,
	}
	indexes = [][]byte{
		idxCacheChain, idxCacheDiff, idxLayerChild, idxLayerDiff, idxLayerBlob,
		idxImageChain, idxImageChild, idxRefImage,
		idxContainerName, idxContainerChain, idxContainerImage, idxContainerMount, idxManifestDigest, idxBuildCacheImage,
		idxLayerBrief, idxLayerLease, idxLiveChain,
	}

	keySchema  = []byte("schema")
	keyUUID    = []byte("uuid")
	keyCreated = []byte("created")
	keyPlace   = []byte("place")
)

// key joins the parts of a composite key.
func key(parts ...string) []byte { return []byte(strings.Join(parts, "\x00")) }

// split is the inverse of key for two parts.
func split(k []byte) (a, b string) {
	x, y, _ := bytes.Cut(k, []byte{0})
	return string(x), string(y)
}

// decode decodes a row. Digests in it are ones: package digest ends a process over any
// that is none.
func decode(raw []byte, v any) error {
	if err := json.Unmarshal(raw, v); err != nil {
		return err
	}
	var need, may []digest.Digest
	switch r := v.(type) {
	case *Layer:
		need, may = []digest.Digest{r.ChainID, r.DiffID}, []digest.Digest{r.Parent, r.Blob}
	case *Cache:
		need, may = []digest.Digest{r.DiffID}, []digest.Digest{r.SplitSHA}
	case *Image:
		need, may = []digest.Digest{r.ID}, []digest.Digest{r.TopChain, r.Parent, r.Manifest}
	case *Ref:
		need = []digest.Digest{r.ImageID}
	case *Container:
		need, may = []digest.Digest{r.ImageID}, []digest.Digest{r.Chain, r.Top}
	case *Live:
		may = []digest.Digest{r.ImageID, r.ChainID}
	case *Wanted:
		may = []digest.Digest{r.ImageID}
	case *Blob:
		need = []digest.Digest{r.Digest}
	}
	for _, d := range need {
		if !isDigest(d) {
			return fmt.Errorf("%q is no digest", d)
		}
	}
	for _, d := range may {
		if d != "" && !isDigest(d) {
			return fmt.Errorf("%q is no digest", d)
		}
	}
	return nil
}

// isDigest is Validate without its regular expression.
func isDigest(d digest.Digest) bool {
	alg, hex, ok := strings.Cut(string(d), ":")
	size := 64
	switch alg {
	case "sha256":
	case "sha384":
		size = 96
	case "sha512":
		size = 128
	default:
		return false
	}
	return ok && len(hex) == size && strings.Trim(hex, "0123456789abcdef") == ""
}

// get decodes one row.
func get[T any](tx *Tx, bucket []byte, k, what string) (T, error) {
	var v T
	raw := tx.b(bucket).Get([]byte(k))
	if k == "" || raw == nil {
		return v, fmt.Errorf("%s %q: %w", what, k, ErrNotFound)
	}
	if err := decode(raw, &v); err != nil {
		return v, fmt.Errorf("%s %q: %w: %w", what, k, ErrCorrupt, err)
	}
	return v, nil
}

// put encodes one row.
func put(tx *Tx, bucket []byte, k []byte, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return tx.b(bucket).Put(k, raw)
}

// all decodes every row of a bucket in key order. One that cannot be decoded is left
// out: it must not hide the others.
func all[T any](tx *Tx, bucket []byte) ([]T, error) {
	var out []T
	err := tx.b(bucket).ForEach(func(_, raw []byte) error {
		var v T
		if err := decode(raw, &v); err != nil {
			tx.skipped++
			return nil
		}
		out = append(out, v)
		return nil
	})
	return out, err
}

// keys returns the keys of a bucket, those of rows that cannot be decoded too.
func (tx *Tx) keys(bucket []byte) []string {
	var out []string
	_ = tx.b(bucket).ForEach(func(k, _ []byte) error { // which cannot fail
		out = append(out, string(k))
		return nil
	})
	return out
}

// seconds returns the second parts of the keys that start with first.
func (tx *Tx) seconds(bucket []byte, first string) []string {
	var out []string
	prefix := key(first, "")
	c := tx.b(bucket).Cursor()
	for k, _ := c.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, _ = c.Next() {
		out = append(out, string(k[len(prefix):]))
	}
	return out
}

// any reports whether a key starts with first.
func (tx *Tx) any(bucket []byte, first string) bool {
	prefix := key(first, "")
	k, _ := tx.b(bucket).Cursor().Seek(prefix)
	return k != nil && bytes.HasPrefix(k, prefix)
}

func (tx *Tx) mark(bucket []byte, parts ...string) error {
	return tx.b(bucket).Put(key(parts...), []byte{})
}

func (tx *Tx) unmark(bucket []byte, parts ...string) error {
	return tx.b(bucket).Delete(key(parts...))
}

func (tx *Tx) b(name []byte) *bolt.Bucket { return tx.tx.Bucket(name) }
