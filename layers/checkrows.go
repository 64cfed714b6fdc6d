package layers

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/plyfs/plyfs/metadata"
)

// badRows looks for rows that cannot be decoded. Those of layers, images and
// containers are taken from the sidecars, the others dropped.
func (c *checker) badRows() error {
	var bad []metadata.BadRow
	if err := c.s.db.View(c.ctx, func(tx *metadata.Tx) error { bad = tx.BadRows(); return nil }); err != nil {
		return c.s.mapErr(err)
	}
	if len(bad) == 0 {
		return nil
	}
	var fixed error
	if c.o.Repair {
		fixed = c.replaceBadRows(bad)
	}
	for _, b := range bad {
		repair := "drop it"
		switch b.Bucket {
		case "layers", "cache", "images", "containers", "refs":
			repair = "take it from what lies beside the database, or drop it"
		}
		c.found("K27", fmt.Sprintf("%s %q", b.Bucket, b.Key), "the row cannot be decoded: "+b.Err.Error(), repair, func() error { return fixed })
	}
	return nil
}

func (c *checker) replaceBadRows(bad []metadata.BadRow) error {
	e, err := c.evidence()
	if err != nil {
		return err
	}
	return c.s.update(c.ctx, func(tx *metadata.Tx) error {
		for _, b := range bad {
			if err := tx.DropBadRow(b); err != nil {
				return err
			}
		}
		if err := tx.RebuildIndexes(); err != nil {
			return err
		}
		if err := e.restore(tx, &RebuildReport{}); err != nil {
			return err
		}
		return tx.RebuildIndexes()
	})
}

// rows checks the database against itself. A repair may bring to light what was hidden
// behind the problem, so there is more than one round.
func (c *checker) rows() error {
	seen := map[string]bool{}
	if c.o.Repair {
		if err := c.putBack(seen); err != nil {
			return err
		}
	}
	for range 5 {
		probs, err := c.problems()
		if err != nil {
			return err
		}
		changed, err := c.round(probs, seen)
		if err != nil || !changed || !c.o.Repair {
			return err
		}
	}
	return nil
}

// putBack is the first repair: indexes are made anew, and what the sidecars have and the
// rows have not is put back, before anything is dropped because something it names is
// missing.
func (c *checker) putBack(seen map[string]bool) error {
	probs, err := c.problems()
	if err != nil || len(probs) == 0 {
		return err
	}
	e, err := c.evidence()
	if err != nil {
		return err
	}
	err = c.s.update(c.ctx, func(tx *metadata.Tx) error {
		if err := tx.RebuildIndexes(); err != nil {
			return err
		}
		return e.restore(tx, &RebuildReport{})
	})
	if err != nil {
		return fmt.Errorf("put rows back: %w", err)
	}
	left, err := c.problems()
	if err != nil {
		return err
	}
	still := map[string]bool{}
	for _, p := range left {
		still[p.Invariant+p.Object+p.Text] = true
	}
	for _, p := range probs {
		key := p.Invariant + p.Object + p.Text
		if still[key] || seen[key] {
			continue
		}
		seen[key] = true
		repair := "take it from what lies beside the database"
		if p.Invariant == "K9" {
			repair = "rebuild the index"
		}
		c.found(p.Invariant, p.Object, p.Text, repair, func() error { return nil })
	}
	return nil
}

func (c *checker) problems() (probs []metadata.Problem, err error) {
	err = c.s.view(c.ctx, func(tx *metadata.Tx) (err error) {
		probs, err = tx.Check()
		return err
	})
	// Indexes first: the other repairs go by them. Then layers, before what names
	// them.
	rank := map[string]int{"K9": 0, "K3": 1, "K4": 1, "K5": 1, "K7": 2, "K10": 3, "K11": 4}
	sort.SliceStable(probs, func(i, j int) bool {
		at := func(p metadata.Problem) int {
			if r, ok := rank[p.Invariant]; ok {
				return r
			}
			return 9
		}
		return at(probs[i]) < at(probs[j])
	})
	return probs, err
}

// round reports problems that were not seen before.
func (c *checker) round(probs []metadata.Problem, seen map[string]bool) (changed bool, err error) {
	if err := c.badLayers(probs, seen); err != nil {
		return false, err
	}
	indexes := error(nil)
	rebuilt := false
	for _, p := range probs {
		key := p.Invariant + p.Object + p.Text
		if seen[key] {
			continue
		}
		seen[key] = true
		n := len(c.r.Findings)
		tx := func(fn func(*metadata.Tx) error) func() error { return func() error { return c.s.update(c.ctx, fn) } }
		id := digest.Digest(p.Object)
		switch p.Invariant {
		case "K9":
			c.found(p.Invariant, p.Object, p.Text, "rebuild the index", func() error {
				if !rebuilt {
					rebuilt, indexes = true, c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.RebuildIndexes() })
				}
				return indexes
			})
		case "K7":
			c.found(p.Invariant, p.Object, p.Text, "remove the row", tx(func(tx *metadata.Tx) error { return tx.DropCache(p.Object) }))
		case "K10":
			c.badConfig(p, id)
		case "K11":
			c.badTop(p, id)
		case "K12":
			c.found(p.Invariant, p.Object, p.Text, "remove the reference", tx(func(tx *metadata.Tx) error { return tx.DropRef(p.Object) }))
		case "K13":
			c.badContainer(p)
		case "K26":
			repair := "remove the manifest"
			if p.Manifest == "" {
				repair = "remove the entry"
			}
			c.found(p.Invariant, p.Object, p.Text, repair, tx(func(tx *metadata.Tx) error {
				if p.Manifest != "" {
					return tx.DropManifest(p.Image, p.Manifest)
				}
				return tx.DropBuild(p.Build)
			}))
		}
		for _, f := range c.r.Findings[n:] {
			changed = changed || f.Fixed
		}
	}
	return changed, nil
}

// badLayers repairs rows of layers: each is taken from a sidecar, or goes with all that
// lie on top of it.
func (c *checker) badLayers(probs []metadata.Problem, seen map[string]bool) error {
	var (
		bad   []metadata.Problem
		drop  []digest.Digest
		depth []digest.Digest
	)
	for _, p := range probs {
		key := p.Invariant + p.Object + p.Text
		if p.Chain == "" || seen[key] {
			continue
		}
		seen[key] = true
		bad = append(bad, p)
		if p.Invariant == "K4" && strings.HasPrefix(p.Text, "depth") {
			depth = append(depth, p.Chain)
		} else {
			drop = append(drop, p.Chain)
		}
	}
	if len(bad) == 0 {
		return nil
	}
	var above map[digest.Digest][]string
	if err := c.s.view(c.ctx, func(tx *metadata.Tx) error { above = onTop(tx, drop); return nil }); err != nil {
		return err
	}
	var fixed error
	if c.o.Repair {
		fixed = c.replaceLayers(drop, depth)
	}
	for _, p := range bad {
		text, repair := p.Text, "correct it"
		if slices.Contains(drop, p.Chain) {
			repair = "take the row from a sidecar, or drop it with what lies on top"
			if len(above[p.Chain]) > 0 {
				text += "; on top of it: " + strings.Join(above[p.Chain], ", ")
			}
		}
		c.found(p.Invariant, p.Object, text, repair, func() error { return fixed })
	}
	return nil
}

// onTop names the layers and images on top of layers.
func onTop(tx *metadata.Tx, chains []digest.Digest) map[digest.Digest][]string {
	out := map[digest.Digest][]string{}
	for _, c := range chains {
		for _, d := range descendants(tx, c) {
			if d != c {
				out[c] = append(out[c], "layer "+ShortID(d))
			}
			for _, i := range tx.ImagesByChain(d) {
				out[c] = append(out[c], "image "+imageNames(tx, i))
			}
		}
	}
	return out
}

// descendants returns a layer and all on top of it, each after its parent.
func descendants(tx *metadata.Tx, chain digest.Digest) []digest.Digest {
	out := []digest.Digest{chain}
	seen := map[digest.Digest]bool{chain: true}
	for i := 0; i < len(out); i++ {
		for _, k := range tx.LayerChildren(out[i]) {
			if !seen[k] {
				seen[k] = true
				out = append(out, k)
			}
		}
	}
	return out
}

func (c *checker) replaceLayers(drop, depth []digest.Digest) error {
	e, err := c.evidence()
	if err != nil {
		return err
	}
	return c.s.update(c.ctx, func(tx *metadata.Tx) error {
		// What a row says of its content is newer than the sidecar.
		caches, err := tx.Caches()
		if err != nil {
			return err
		}
		for _, row := range caches {
			if have, ok := e.caches[row.CacheID]; ok && have.DiffID == row.DiffID && have.SplitSHA == row.SplitSHA {
				e.caches[row.CacheID] = row
			}
		}
		var all []digest.Digest
		for _, d := range drop {
			all = append(all, descendants(tx, d)...)
		}
		for _, d := range all {
			if l, err := tx.Layer(d); err == nil && l.ChainID == d && !slices.Contains(drop, d) {
				e.candidate(l) // it may come back on a parent that does
			}
		}
		for i := len(all) - 1; i >= 0; i-- {
			if _, err := tx.DropLayerRow(all[i]); err != nil {
				return err
			}
		}
		if len(drop) > 0 {
			if err := e.restore(tx, &RebuildReport{}); err != nil {
				return err
			}
		}
		return c.depths(tx, depth)
	})
}

// depths corrects depths, from the bottom up.
func (c *checker) depths(tx *metadata.Tx, chains []digest.Digest) error {
	all := map[digest.Digest]bool{}
	for _, d := range chains {
		for _, k := range descendants(tx, d) {
			all[k] = true
		}
	}
	order := slices.Sorted(maps.Keys(all))
	at := map[digest.Digest]int{}
	for _, d := range order {
		ls, err := tx.Chain(d)
		if err != nil {
			continue
		}
		at[d] = len(ls)
	}
	sort.SliceStable(order, func(i, j int) bool { return at[order[i]] < at[order[j]] })
	for _, d := range order {
		if at[d] == 0 {
			continue
		}
		if err := tx.SetLayerDepth(d); err != nil {
			return err
		}
	}
	return nil
}

// badConfig repairs K10: the config is in the image's sidecar, or the image is lost.
func (c *checker) badConfig(p metadata.Problem, id digest.Digest) {
	if strings.HasSuffix(p.Text, "without an image") {
		c.found(p.Invariant, p.Object, p.Text, "make a row for it, or remove it", func() error {
			return c.s.update(c.ctx, func(tx *metadata.Tx) error {
				if config, err := tx.Config(id); err == nil && id.Validate() == nil && id.Algorithm().FromBytes(config) == id {
					if saved, err := c.s.readSavedImage(imageFile(id)); err == nil {
						return tx.RestoreImage(saved)
					}
					if tx.FixImage(id) == nil {
						return nil
					}
				}
				return tx.DropImage(id)
			})
		})
		return
	}
	var saved metadata.SavedImage
	err := errors.New("no digest")
	if id.Validate() == nil {
		saved, err = c.s.readSavedImage(imageFile(id))
	}
	if err == nil {
		c.found(p.Invariant, p.Object, p.Text, "take it from the image's sidecar", func() error {
			return c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.SetConfig(id, saved.Config) })
		})
		return
	}
	f := Finding{Invariant: p.Invariant, Severity: SeverityError, Object: p.Object, Problem: p.Text}
	_ = c.s.view(c.ctx, func(tx *metadata.Tx) error { f.Images = familiars(tx.RefsOf(id)); return nil }) // names are only for the message
	f.Repair = "remove the image; " + reloadHint(f.Images)
	c.report(f, func() error {
		return c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.DropImage(id) })
	})
}

// badTop repairs K11. An image whose layers are gone stays, with its names and
// containers: when it is loaded again it is whole.
func (c *checker) badTop(p metadata.Problem, id digest.Digest) {
	if strings.HasPrefix(p.Text, "its top layer") {
		c.found(p.Invariant, p.Object, p.Text, "correct the row", func() error {
			return c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.FixImage(id) })
		})
		return
	}
	f := Finding{Invariant: p.Invariant, Severity: SeverityError, Object: p.Object, Problem: p.Text}
	back := false
	if e, err := c.evidence(); err == nil {
		_ = c.s.view(c.ctx, func(tx *metadata.Tx) error { // only to know
			f.Images = []string{imageNames(tx, id)}
			if config, err := tx.Config(id); err == nil {
				back = e.completes(tx, metadata.SavedImage{Image: metadata.Image{ID: id}, Config: config})
			}
			return nil
		})
	}
	if !back {
		f.Repair = reloadHint(f.Images)
		c.report(f, nil)
		return
	}
	f.Images, f.Repair = nil, "make the rows of its layers anew from their sidecars"
	c.report(f, func() error {
		return c.s.update(c.ctx, func(tx *metadata.Tx) error {
			config, err := tx.Config(id)
			if err != nil {
				return err
			}
			return c.e.addImage(tx, metadata.SavedImage{Image: metadata.Image{ID: id}, Config: config}, &RebuildReport{})
		})
	})
}

// badContainer reports K13. A container without its image or layers waits for them;
// its data stays.
func (c *checker) badContainer(p metadata.Problem) {
	f := Finding{Invariant: p.Invariant, Severity: SeverityError, Object: "container " + p.Object, Problem: p.Text}
	var row metadata.Container
	err := c.s.view(c.ctx, func(tx *metadata.Tx) (err error) {
		id, _ := tx.ContainerByName(p.Object)
		row, err = tx.Container(id)
		return err
	})
	if err == nil {
		f.Images = []string{row.ImageName}
	}
	// The init layer is not in any archive: it is made again.
	if err == nil && row.Top != row.Chain && c.remakeInit(row, false) == nil {
		f.Images, f.Repair = nil, "make the init layer of its image again"
		c.report(f, func() error { return c.remakeInit(row, true) })
		return
	}
	f.Repair = reloadHint(f.Images)
	c.report(f, nil)
	if c.o.Repair && err == nil && row.State == metadata.Ready {
		_ = c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.SetContainerState(row.ID, metadata.Broken) }) // the finding tells
	}
}

// remakeInit makes the init layer of a container's image again; it can if the image's
// layers are there.
func (c *checker) remakeInit(row metadata.Container, do bool) error {
	have := false
	err := c.s.view(c.ctx, func(tx *metadata.Tx) error {
		_, err := tx.Chain(row.Top)
		have = row.Top == "" || err == nil
		if _, err := tx.Image(row.ImageID); err != nil {
			have = false
		}
		return nil
	})
	if err == nil && !have {
		err = fmt.Errorf("layer %s: %w", row.Top, ErrNotFound)
	}
	if err != nil || !do {
		return err
	}
	lease, err := c.s.newLease(c.ctx)
	if err != nil {
		return err
	}
	defer c.s.dropLease(lease)
	l, err := c.s.ensureInit(c.ctx, lease, row.Top)
	if err != nil {
		return err
	}
	if l.ChainID != row.Chain {
		return fmt.Errorf("%w: the init layer is now %s, the container has %s", ErrCorrupt, l.ChainID, row.Chain)
	}
	return nil
}

// reloadHint says what heals images.
func reloadHint(images []string) string {
	if len(images) == 0 {
		return "none: load the image that has it again (plyfs load)"
	}
	return "none: load " + strings.Join(images, ", ") + " again (plyfs load, or plyfs rmi)"
}
