package metadata

import (
	"context"
	"fmt"
	"sort"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// Problem is a broken invariant of the database.
type Problem struct {
	Invariant string // K1, K3, K4, K9, K10, K11, K12, K13, K26
	Object    string
	Text      string
}

// CheckFile verifies the structure of the file itself (K1).
func (db *DB) CheckFile(ctx context.Context) ([]Problem, error) {
	var out []Problem
	err := db.locked(ctx, true, func(b *bolt.DB) error {
		return b.View(func(tx *bolt.Tx) error {
			for err := range tx.Check() {
				out = append(out, Problem{"K1", db.path, err.Error()})
			}
			return nil
		})
	})
	return out, err
}

// Check verifies every invariant that the rows alone can show.
func (tx *Tx) Check() ([]Problem, error) {
	var out []Problem
	add := func(inv, obj, format string, a ...any) {
		out = append(out, Problem{inv, obj, fmt.Sprintf(format, a...)})
	}
	layers, err := tx.Layers()
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for _, l := range layers {
		if l.ChainID != ChainID(l.Parent, l.DiffID) {
			add("K3", l.ChainID.String(), "chainID does not follow from parent and diffID")
		}
		depth := 1
		if l.Parent != "" {
			p, err := tx.Layer(l.Parent)
			if err != nil {
				add("K4", l.ChainID.String(), "parent %s is missing", l.Parent)
			}
			depth = p.Depth + 1
		}
		if l.Depth != depth {
			add("K4", l.ChainID.String(), "depth %d, expected %d", l.Depth, depth)
		}
		if c, err := tx.Cache(l.CacheID); err != nil || c.DiffID != l.DiffID {
			add("K5", l.ChainID.String(), "content directory row %q is missing or not its own", l.CacheID)
		}
		used[l.CacheID] = true
	}
	caches, err := tx.Caches()
	if err != nil {
		return nil, err
	}
	for _, c := range caches {
		if !used[c.CacheID] {
			add("K7", c.CacheID, "content directory row that no layer names")
		}
	}
	images, err := tx.Images()
	if err != nil {
		return nil, err
	}
	for _, i := range images {
		raw := tx.b(bktConfigs).Get([]byte(i.ID))
		switch {
		case raw == nil:
			add("K10", i.ID.String(), "config is missing")
		case i.ID.Validate() != nil || i.ID.Algorithm().FromBytes(raw) != i.ID:
			add("K10", i.ID.String(), "config does not have the digest that is its name")
		}
		if i.TopChain != "" && !tx.HasLayer(i.TopChain) {
			add("K11", i.ID.String(), "top layer %s is missing", i.TopChain)
		}
	}
	_ = tx.b(bktConfigs).ForEach(func(k, _ []byte) error {
		if tx.b(bktImages).Get(k) == nil {
			add("K10", string(k), "config without an image")
		}
		return nil
	})
	_ = tx.b(bktManifests).ForEach(func(k, raw []byte) error {
		image, d := split(k)
		switch {
		case tx.b(bktImages).Get([]byte(image)) == nil:
			add("K26", image+" "+d, "a manifest without an image")
		case digest.Digest(d).Validate() != nil || digest.Digest(d).Algorithm().FromBytes(raw).String() != d:
			add("K26", image+" "+d, "the manifest does not have the digest that is its name")
		}
		return nil
	})
	_ = tx.b(bktBuildCache).ForEach(func(k, image []byte) error {
		if tx.b(bktImages).Get(image) == nil {
			add("K26", string(k), "the build cache names image %s, which does not exist", image)
		}
		return nil
	})
	names, refs, err := tx.Refs()
	if err != nil {
		return nil, err
	}
	for i, r := range refs {
		if tx.b(bktImages).Get([]byte(r.ImageID)) == nil {
			add("K12", names[i], "names image %s, which does not exist", r.ImageID)
		}
	}
	containers, err := tx.Containers()
	if err != nil {
		return nil, err
	}
	for _, c := range containers {
		if c.Chain != "" && !tx.HasLayer(c.Chain) {
			add("K13", c.Name, "layer %s is missing", c.Chain)
		}
		if tx.b(bktImages).Get([]byte(c.ImageID)) == nil {
			add("K13", c.Name, "image %s is missing", c.ImageID)
		}
	}
	want, err := tx.wantIndexes(layers, caches, images, names, refs, containers)
	if err != nil {
		return nil, err
	}
	for _, name := range indexes {
		have := map[string]string{}
		_ = tx.b(name).ForEach(func(k, v []byte) error { have[string(k)] = string(v); return nil })
		w := want[string(name)]
		for _, k := range sortedKeys(w) {
			if v, ok := have[k]; !ok || v != w[k] {
				add("K9", string(name), "entry %q is missing or wrong", k)
			}
		}
		for _, k := range sortedKeys(have) {
			if _, ok := w[k]; !ok {
				add("K9", string(name), "entry %q should not be there", k)
			}
		}
	}
	return out, nil
}

func sortedKeys(m map[string]string) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

// wantIndexes computes every index from the rows.
func (tx *Tx) wantIndexes(layers []Layer, caches []Cache, images []Image, names []string, refs []Ref, containers []Container) (map[string]map[string]string, error) {
	want := map[string]map[string]string{}
	for _, n := range indexes {
		want[string(n)] = map[string]string{}
	}
	set := func(b []byte, v string, parts ...string) { want[string(b)][string(key(parts...))] = v }
	for _, l := range layers {
		c := l.ChainID.String()
		set(idxCacheChain, "", l.CacheID, c)
		set(idxLayerDiff, "", l.DiffID.String(), c)
		if l.Blob != "" {
			set(idxLayerBlob, "", l.Blob.String(), c)
		}
		if l.Parent != "" {
			set(idxLayerChild, "", l.Parent.String(), c)
		}
	}
	for _, c := range caches {
		set(idxCacheDiff, "", c.DiffID.String(), c.CacheID)
	}
	for _, i := range images {
		if i.Parent != "" {
			set(idxImageChild, "", i.Parent.String(), i.ID.String())
		}
		if i.TopChain != "" {
			set(idxImageChain, "", i.TopChain.String(), i.ID.String())
		}
	}
	for i, r := range refs {
		set(idxRefImage, "", r.ImageID.String(), names[i])
	}
	for _, c := range containers {
		set(idxContainerName, c.ID, c.Name)
		set(idxContainerMount, c.ID, c.MountID)
		if c.Chain != "" {
			set(idxContainerChain, "", c.Chain.String(), c.ID)
		}
		set(idxContainerImage, "", c.ImageID.String(), c.ID)
	}
	_ = tx.b(bktManifests).ForEach(func(k, _ []byte) error {
		image, d := split(k)
		set(idxManifestDigest, "", d, image)
		return nil
	})
	_ = tx.b(bktBuildCache).ForEach(func(k, image []byte) error {
		set(idxBuildCacheImage, "", string(image), string(k))
		return nil
	})
	return want, nil
}

// RebuildIndexes writes every index anew from the rows.
func (tx *Tx) RebuildIndexes() error {
	layers, err := tx.Layers()
	if err != nil {
		return err
	}
	caches, err := tx.Caches()
	if err != nil {
		return err
	}
	images, err := tx.Images()
	if err != nil {
		return err
	}
	names, refs, err := tx.Refs()
	if err != nil {
		return err
	}
	containers, err := tx.Containers()
	if err != nil {
		return err
	}
	want, err := tx.wantIndexes(layers, caches, images, names, refs, containers)
	if err != nil {
		return err
	}
	for _, n := range indexes {
		if err := tx.tx.DeleteBucket(n); err != nil {
			return err
		}
		b, err := tx.tx.CreateBucket(n)
		if err != nil {
			return err
		}
		for k, v := range want[string(n)] {
			if err := b.Put([]byte(k), []byte(v)); err != nil {
				return err
			}
		}
	}
	return nil
}

// DropRef removes a reference row whose image is gone (repair of K12).
func (tx *Tx) DropRef(name string) error {
	if r, err := tx.Ref(name); err == nil {
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
