package layers

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

var errDryRun = errors.New("dry run")

// GC removes images that have lost their names and that nothing uses, layers
// that nothing needs, what dead processes have left, and trash. A dry run says what it would do.
func (s *Store) GC(ctx context.Context, dryRun bool) (GCReport, error) {
	rep := GCReport{DryRun: dryRun}
	if err := s.gcStray(ctx, &rep, dryRun); err != nil {
		return rep, err
	}
	if !dryRun {
		if err := s.sweep(ctx); err != nil {
			return rep, err
		}
	}
	// An image that never had a name was meant to have none. What is left of the names of
	// one may be the digest that a registry had for it.
	lost := func(i metadata.Image, refs []string) bool { return i.Tagged && onlyDigests(refs, "") }
	err := s.collectGarbage(ctx, &rep, lost, true)
	return rep, err
}

// Prune removes images without a name, be there a digest or not, and with All those with names too, that no
// container, mount or other image needs, and the layers that only they had.
func (s *Store) Prune(ctx context.Context, o PruneOptions) (GCReport, error) {
	rep := GCReport{DryRun: o.DryRun}
	err := s.collectGarbage(ctx, &rep, func(_ metadata.Image, refs []string) bool { return o.All || onlyDigests(refs, "") }, false)
	return rep, err
}

// collectGarbage removes the images that pick chooses, unless something needs them, and
// their layers; with all, every layer that nothing needs.
func (s *Store) collectGarbage(ctx context.Context, rep *GCReport, pick func(metadata.Image, []string) bool, all bool) error {
	g := garbage{pick: pick}
	// Mostly there is none: look before taking the lock that others wait for.
	err := s.view(ctx, func(tx *metadata.Tx) (err error) {
		if g.images, err = g.candidates(tx); err != nil {
			return err
		}
		if all {
			g.layers = tx.UnusedLayers()
		}
		return nil
	})
	if err != nil || len(g.images)+len(g.layers) == 0 {
		return err
	}
	err = s.updateFreeing(ctx, func(tx *metadata.Tx) error {
		if err := g.remove(tx, all); err != nil {
			return err
		}
		if rep.DryRun {
			return errDryRun
		}
		return nil
	})
	if err != nil && !errors.Is(err, errDryRun) {
		return err
	}
	rep.Images, rep.Layers, rep.Untagged = g.gone, g.goneLayers, g.untagged
	rep.Reclaimed += g.reclaimed
	if !rep.DryRun {
		s.purge(ctx, g.junk)
	}
	return nil
}

// garbage is what one transaction removes.
type garbage struct {
	pick   func(metadata.Image, []string) bool
	images []digest.Digest // candidates
	layers []digest.Digest

	gone       []digest.Digest
	goneLayers []digest.Digest
	untagged   []string
	reclaimed  int64
	junk       []metadata.Trash
}

// candidates returns the images that may go as things are.
func (g *garbage) candidates(tx *metadata.Tx) (out []digest.Digest, err error) {
	live, err := tx.LiveMounts()
	if err != nil {
		return nil, err
	}
	mounted := map[digest.Digest]bool{}
	for _, l := range live {
		mounted[l.ImageID] = true
	}
	rows, err := tx.Images()
	if err != nil {
		return nil, err
	}
	for _, i := range rows {
		if g.pick(i, tx.RefsOf(i.ID)) && len(tx.ImageChildren(i.ID)) == 0 && len(tx.ContainersByImage(i.ID)) == 0 && !mounted[i.ID] {
			out = append(out, i.ID)
		}
	}
	return out, nil
}

func (g *garbage) remove(tx *metadata.Tx, all bool) (err error) {
	g.gone, g.goneLayers, g.untagged, g.reclaimed, g.junk = nil, nil, nil, 0, nil
	for {
		images, err := g.candidates(tx)
		if err != nil {
			return err
		}
		if len(images) == 0 { // one that goes may have been the last child of another
			break
		}
		for _, id := range images {
			if err := g.image(tx, id); err != nil {
				return err
			}
		}
	}
	if all {
		for _, c := range tx.UnusedLayers() {
			if err := g.chain(tx, c); err != nil {
				return err
			}
		}
	}
	return nil
}

func (g *garbage) image(tx *metadata.Tx, id digest.Digest) error {
	row, err := tx.Image(id)
	if err != nil {
		return err
	}
	for _, ref := range tx.RefsOf(id) {
		if err := tx.DeleteRef(ref); err != nil {
			return err
		}
		g.untagged = append(g.untagged, familiar(ref))
	}
	if err := tx.DeleteImage(id); err != nil {
		return err
	}
	g.gone = append(g.gone, id)
	return g.chain(tx, row.TopChain)
}

// chain removes a layer and what lies below, as far as nothing needs them.
func (g *garbage) chain(tx *metadata.Tx, top digest.Digest) error {
	sizes := map[string]int64{}
	rows, _ := tx.Chain(top) // what there is of it
	for _, l := range rows {
		if c, err := tx.Cache(l.CacheID); err == nil {
			if sizes[l.CacheID] = c.SplitSize; c.Adopted == nil {
				sizes[l.CacheID] += c.Allocated
			}
		}
	}
	junk, err := releaseChain(tx, top, func(l metadata.Layer) {
		g.goneLayers = append(g.goneLayers, l.ChainID)
		if _, err := tx.Cache(l.CacheID); errors.Is(err, metadata.ErrNotFound) {
			g.reclaimed += sizes[l.CacheID]
		}
	})
	g.junk = append(g.junk, junk...)
	return err
}

// gcStray removes directories that no row names. Writable layers are left to
// their owner's judgement, and a layer that proves what it is to check --repair as long
// as something in the store lacks a layer.
func (s *Store) gcStray(ctx context.Context, rep *GCReport, dryRun bool) error {
	list, err := s.findStrays(func(fn func(*metadata.Tx) error) error { return s.view(ctx, fn) })
	if err != nil {
		return err
	}
	lacking, err := s.lacking(ctx)
	if err != nil {
		return err
	}
	for _, x := range list {
		lacking = lacking || x.dir == rwName
	}
	for _, x := range list {
		fd := s.layersFd
		switch x.dir {
		case rwName:
			continue
		case layersName:
			if _, err := s.verifySidecar(x.name); errors.Is(err, errMoved) || (err == nil || errors.Is(err, errSplit)) && lacking {
				s.log.Warn("a layer without a row is kept: plyfs check --repair puts it back", zap.String("name", x.name))
				continue
			}
			rep.Paths = append(rep.Paths, x.path())
		case stageName:
			fd = s.stageFd
			rep.Stages = append(rep.Stages, x.path())
		case trashName:
			fd = s.trashFd
			rep.Paths = append(rep.Paths, x.path())
		}
		size, err := s.sizeOf(fd, x.name)
		if err != nil {
			return err
		}
		rep.Reclaimed += size
		if dryRun {
			continue
		}
		if err := removeTree(fd, x.name); err != nil {
			return fmt.Errorf("remove %s: %w", x.path(), err)
		}
	}
	if err := s.gcBlobs(ctx, rep, dryRun); err != nil {
		return err
	}
	if err := s.gcLitter(rep, dryRun); err != nil {
		return err
	}
	return s.gcChains(ctx, rep, dryRun)
}

// litter are files that become a database, or a copy of one, under another name.
var litter = regexp.MustCompile(`^plyfs\.db\..*(new|compact|rebuild)\.[0-9a-f]{8}$`)

// gcLitter removes those of processes that died over them.
func (s *Store) gcLitter(rep *GCReport, dryRun bool) error {
	for dir, fd := range map[string]int{"": s.rootFd, copiesName + "/": s.copiesFd} {
		names, err := listDir(fd)
		if err != nil {
			return err
		}
		for _, n := range names {
			var st unix.Stat_t
			if !litter.MatchString(n) || fsat.Stat(fd, n, &st) != nil || time.Since(time.Unix(st.Mtim.Sec, st.Mtim.Nsec)) < tempAge {
				continue
			}
			rep.Paths, rep.Reclaimed = append(rep.Paths, dir+n), rep.Reclaimed+st.Blocks*512
			if dryRun {
				continue
			}
			if err := fsat.Unlink(fd, n); err != nil && !fsat.IsAbsent(err) {
				return fmt.Errorf("remove %s%s: %w", dir, n, err)
			}
		}
	}
	return nil
}

// lacking reports whether something in the store lacks a layer, as far as is known. An
// image that only its sidecar knows may lack all of its layers.
func (s *Store) lacking(ctx context.Context) (lacks bool, err error) {
	saved, err := listDir(s.imagesFd) // before the rows: a sidecar goes after its row
	if err != nil {
		return false, err
	}
	err = s.view(ctx, func(tx *metadata.Tx) error {
		names, err := lackers(tx)
		lacks = len(names) > 0 || tx.Skipped() > 0
		if err != nil {
			return err
		}
		known, err := knownSaved(tx)
		lacks = lacks || slices.ContainsFunc(saved, func(n string) bool { return imageOfFile(n) != "" && !known[n] })
		return err
	})
	return lacks, err
}

// knownSaved are the names in images/ that rows explain.
func knownSaved(tx *metadata.Tx) (map[string]bool, error) {
	trash, err := tx.TrashRows()
	known := map[string]bool{}
	for _, t := range trash {
		if name, ok := strings.CutPrefix(t.Path, imagesName+"/"); ok {
			known[name] = true
		}
	}
	for _, id := range tx.ImageIDs() {
		known[imageFile(id)] = true
	}
	return known, err
}

// lackers names the images that lack layers, and those of containers that do.
func lackers(tx *metadata.Tx) (names []string, err error) {
	images, err := tx.Images()
	if err != nil {
		return nil, err
	}
	conts, err := tx.Containers()
	if err != nil {
		return nil, err
	}
	if _, err = tx.Layers(); err != nil {
		return nil, err
	}
	for _, i := range images {
		if i.TopChain != "" && !tx.HasLayer(i.TopChain) {
			names = append(names, imageNames(tx, i.ID))
		}
	}
	for _, c := range conts {
		if c.Chain != "" && !tx.HasLayer(c.Chain) && !slices.Contains(names, c.ImageName) {
			names = append(names, c.ImageName)
		}
	}
	return names, nil
}

// gcChains removes the indexes of chains that are gone.
func (s *Store) gcChains(ctx context.Context, rep *GCReport, dryRun bool) error {
	names, err := listDir(s.chainsFd)
	if err != nil {
		return err
	}
	if names, err = s.unusedChains(ctx, names); err != nil {
		return err
	}
	for _, n := range names {
		var st unix.Stat_t
		if err := fsat.Stat(s.chainsFd, n, &st); err != nil {
			continue // somebody else was faster
		}
		if !dryRun {
			if err := fsat.Unlink(s.chainsFd, n); err != nil && !fsat.IsAbsent(err) {
				return fmt.Errorf("remove %s/%s: %w", chainsName, n, err)
			}
		}
		rep.Paths = append(rep.Paths, chainsName+"/"+n)
		rep.Reclaimed += st.Blocks * 512
	}
	return nil
}

// DropChains removes the merged indexes of all chains that are not mounted,
// which the next mount of each makes anew, and returns the bytes they took.
func (s *Store) DropChains(ctx context.Context) (freed int64, err error) {
	names, err := listDir(s.chainsFd)
	if err != nil {
		return 0, err
	}
	mounted := map[string]bool{}
	err = s.view(ctx, func(tx *metadata.Tx) error {
		live, err := tx.LiveMounts()
		for _, l := range live {
			mounted[hexOf(l.ChainID)] = true
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	for _, n := range names {
		hex, _, _ := strings.Cut(n, "-")
		var st unix.Stat_t
		if filepath.Ext(n) != chainExt || mounted[hex] || fsat.Stat(s.chainsFd, n, &st) != nil {
			continue
		}
		if err := fsat.Unlink(s.chainsFd, n); err != nil && !fsat.IsAbsent(err) {
			return freed, fmt.Errorf("remove %s/%s: %w", chainsName, n, err)
		}
		freed += st.Blocks * 512
	}
	return freed, nil
}
