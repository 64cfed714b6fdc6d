package metadata

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sort"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// Problem is a broken invariant of the database.
type Problem struct {
	Invariant string // K1, K3, K4, K5, K7, K9, K10, K11, K12, K13, K26
	Object    string
	Text      string
	// Chain is the layer that K3, K4 and K5 are about, and Image and Manifest or
	// Build what K26 is about.
	Chain    digest.Digest
	Image    digest.Digest
	Manifest digest.Digest
	Build    string
}

// CheckFile verifies the structure of the file itself (K1). A file that cannot even
// be opened is a problem too, not an error.
func (db *DB) CheckFile(ctx context.Context) ([]Problem, error) {
	var out []Problem
	add := func(text string) { out = append(out, Problem{Invariant: "K1", Object: db.path, Text: text}) }
	err := db.locked(ctx, true, func(b *bolt.DB) error {
		// First without trust: bbolt's own check runs where its panics cannot be
		// caught.
		if err := scanFile(db.path, func(string, []byte, []byte) {}, add); err != nil || len(out) > 0 {
			return err
		}
		return b.View(func(tx *bolt.Tx) error {
			for err := range tx.Check() {
				add(err.Error())
			}
			if len(out) == 0 {
				if err := checkSchema(tx); err != nil {
					return err
				}
			}
			return nil
		})
	})
	if errors.Is(err, ErrCorrupt) || errors.Is(err, os.ErrNotExist) {
		add(err.Error())
		err = nil
	}
	return out, err
}

// scanFile reads the rows of a database file without bbolt.
func scanFile(path string, row func(bucket string, k, v []byte), report func(string)) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		report("it is not a regular file")
		return nil
	}
	p, err := openPages(f, st.Size())
	if err != nil {
		report(err.Error())
		return nil
	}
	p.walk(row, report)
	return nil
}

// Check verifies every invariant that the rows alone can show.
func (tx *Tx) Check() ([]Problem, error) {
	var out []Problem
	add := func(inv, obj, format string, a ...any) {
		out = append(out, Problem{Invariant: inv, Object: obj, Text: fmt.Sprintf(format, a...)})
	}
	layers, err := tx.Layers()
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	byChain := make(map[digest.Digest]Layer, len(layers))
	for _, l := range layers {
		byChain[l.ChainID] = l
	}
	for _, k := range tx.keys(bktLayers) {
		used[k] = true // a row under the key of another
	}
	for _, l := range layers {
		n := len(out)
		if l.ChainID != ChainID(l.Parent, l.DiffID) || !used[l.ChainID.String()] {
			add("K3", l.ChainID.String(), "chainID does not follow from parent and diffID")
		}
		depth := 1
		if l.Parent != "" {
			p, ok := byChain[l.Parent]
			if !ok {
				add("K4", l.ChainID.String(), "parent %s is missing", l.Parent)
			}
			depth = p.Depth + 1
		}
		if l.Depth != depth && len(out) == n {
			add("K4", l.ChainID.String(), "depth %d, expected %d", l.Depth, depth)
		}
		if c, err := tx.Cache(l.CacheID); err != nil || c.DiffID != l.DiffID {
			add("K5", l.ChainID.String(), "content directory row %q is missing or not its own", l.CacheID)
		}
		for i := n; i < len(out); i++ {
			out[i].Chain = l.ChainID
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
		if want, ok := configChain(raw); ok && i.TopChain != want {
			add("K11", i.ID.String(), "its top layer is %s, its config says %s", i.TopChain, want)
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
		n := len(out)
		defer func() {
			for i := n; i < len(out); i++ {
				out[i].Image, out[i].Manifest = digest.Digest(image), digest.Digest(d)
			}
		}()
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
			add("K26", "build cache", "it names image %s, which does not exist", image)
			out[len(out)-1].Build = string(k)
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
	if tx.skipped > 0 {
		return out, nil // indexes also speak of the rows that cannot be decoded
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

// configChain is the chainID that the layers of an image config make; ok is false if
// it is no config.
func configChain(config []byte) (chain digest.Digest, ok bool) {
	var c struct {
		RootFS struct {
			DiffIDs []digest.Digest `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if json.Unmarshal(config, &c) != nil {
		return "", false
	}
	for _, d := range c.RootFS.DiffIDs {
		chain = ChainID(chain, d)
	}
	return chain, true
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
	set := func(b []byte, v string, parts ...string) {
		if k := string(key(parts...)); k != "" { // of a row that says nothing
			want[string(b)][k] = v
		}
	}
	byID := make(map[string]Cache, len(caches))
	for _, c := range caches {
		byID[c.CacheID] = c
	}
	for _, l := range layers {
		c := l.ChainID.String()
		set(idxLayerBrief, brief(l, byID[l.CacheID]), c)
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
	for _, k := range tx.keys(bktLeaseLayer) {
		lease, c := split([]byte(k))
		set(idxLayerLease, "", c, lease)
	}
	live, err := tx.LiveMounts()
	if err != nil {
		return nil, err
	}
	for _, l := range live {
		if l.ChainID != "" {
			set(idxLiveChain, "", l.ChainID.String(), l.BootID, l.Target)
		}
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
func (tx *Tx) RebuildIndexes() error { return tx.fillIndexes(indexes...) }

// fillIndexes writes some indexes anew.
func (tx *Tx) fillIndexes(which ...[]byte) error {
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
	for _, n := range which {
		if err := tx.tx.DeleteBucket(n); err != nil {
			return err
		}
		b, err := tx.tx.CreateBucket(n)
		if err != nil {
			return err
		}
		w := want[string(n)]
		for _, k := range sortedKeys(w) {
			if err := b.Put([]byte(k), []byte(w[k])); err != nil {
				return err
			}
		}
	}
	return nil
}
