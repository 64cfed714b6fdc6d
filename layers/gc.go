package layers

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
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
	var junk []metadata.Trash
	err := s.updateFreeing(ctx, func(tx *metadata.Tx) error {
		rep.Images, rep.Layers, junk = nil, nil, nil
		sizes := map[digest.Digest]int64{}
		rows, err := tx.Layers()
		if err != nil {
			return err
		}
		for _, l := range rows {
			c, err := tx.Cache(l.CacheID)
			if err != nil {
				return err
			}
			sizes[l.ChainID] = c.Allocated + c.SplitSize
		}
		gone := func(l metadata.Layer) { rep.Layers = append(rep.Layers, l.ChainID) }
		if err := gcImages(tx, &rep, &junk, gone); err != nil {
			return err
		}
		// Layers without users, topmost first: releaseChain goes down.
		for _, l := range rows {
			more, err := releaseChain(tx, l.ChainID, gone)
			if err != nil {
				return err
			}
			junk = append(junk, more...)
		}
		caches := map[string]bool{}
		for _, l := range rows {
			for _, g := range rep.Layers {
				if l.ChainID == g && !caches[l.CacheID] {
					if _, err := tx.Cache(l.CacheID); errors.Is(err, metadata.ErrNotFound) {
						caches[l.CacheID] = true
						rep.Reclaimed += sizes[g]
					}
				}
			}
		}
		if dryRun {
			return errDryRun
		}
		return nil
	})
	if err != nil && !errors.Is(err, errDryRun) {
		return rep, err
	}
	if !dryRun {
		s.purge(ctx, junk)
	}
	return rep, nil
}

// gcImages deletes images that had a tag and lost it (what is left may be the digest
// that a registry had for it), without children, containers or mounts,
// until there are none.
func gcImages(tx *metadata.Tx, rep *GCReport, junk *[]metadata.Trash, gone func(metadata.Layer)) error {
	live, err := tx.LiveMounts()
	if err != nil {
		return err
	}
	mounted := map[digest.Digest]bool{}
	for _, l := range live {
		mounted[l.ImageID] = true
	}
	for again := true; again; {
		again = false
		rows, err := tx.Images()
		if err != nil {
			return err
		}
		for _, i := range rows {
			refs := tx.RefsOf(i.ID)
			if !i.Tagged || !onlyDigests(refs, "") || len(tx.ImageChildren(i.ID)) > 0 || len(tx.ContainersByImage(i.ID)) > 0 || mounted[i.ID] {
				continue
			}
			for _, r := range refs { // under which nobody has asked for it, or by a tag too
				if err := tx.DeleteRef(r); err != nil {
					return err
				}
			}
			if err := tx.DeleteImage(i.ID); err != nil {
				return err
			}
			rep.Images = append(rep.Images, i.ID)
			again = true
			more, err := releaseChain(tx, i.TopChain, gone)
			if err != nil {
				return err
			}
			*junk = append(*junk, more...)
		}
	}
	return nil
}

// gcStray removes directories that no row names. Writable layers are left to
// their owner's judgement.
func (s *Store) gcStray(ctx context.Context, rep *GCReport, dryRun bool) error {
	c := &checker{s: s, ctx: ctx, o: CheckOptions{Repair: !dryRun}, r: &Report{}}
	if err := c.strays(); err != nil {
		return err
	}
	for _, f := range c.r.Findings {
		switch f.Invariant {
		case "K7":
			rep.Paths = append(rep.Paths, f.Object)
		case "K8":
			rep.Stages = append(rep.Stages, f.Object)
		}
	}
	if err := s.gcBlobs(ctx, rep, dryRun); err != nil {
		return err
	}
	return s.gcChains(ctx, rep, dryRun)
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
			mounted[l.ChainID.Encoded()] = true
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

// DiskUsage says where the bytes are.
func (s *Store) DiskUsage(ctx context.Context) (DiskUsage, error) {
	var (
		u      DiskUsage
		caches []metadata.Cache
		initID = map[string]bool{}
		active = map[string]bool{}
		conts  []metadata.Container
		live   []metadata.Live
	)
	err := s.view(ctx, func(tx *metadata.Tx) (err error) {
		if caches, err = tx.Caches(); err != nil {
			return err
		}
		if conts, err = tx.Containers(); err != nil {
			return err
		}
		if live, err = tx.LiveMounts(); err != nil {
			return err
		}
		images, err := tx.Images()
		if err != nil {
			return err
		}
		for _, i := range images {
			u.Images.Count++
			if len(tx.ContainersByImage(i.ID)) == 0 {
				continue
			}
			u.Images.Active++
			rows, err := tx.Chain(i.TopChain)
			if err != nil {
				return err
			}
			for _, l := range rows {
				active[l.CacheID] = true
			}
		}
		layers, err := tx.Layers()
		for _, l := range layers {
			if l.Origin == "init" {
				initID[l.CacheID] = true
			}
		}
		return err
	})
	if err != nil {
		return u, err
	}
	for _, c := range caches {
		size, err := s.sizeOf(s.layersFd, c.CacheID)
		if err != nil {
			return u, err
		}
		if initID[c.CacheID] {
			u.Init += size
			continue
		}
		u.Layers.Count++
		u.Layers.Size += size
		if active[c.CacheID] {
			u.Layers.Active++
		} else {
			u.Layers.Reclaimable += size
		}
	}
	u.Images.Size, u.Images.Reclaimable = u.Layers.Size, u.Layers.Reclaimable
	mounted := map[string]bool{}
	for _, l := range live {
		if liveOf(l).Alive() {
			mounted[l.ContainerID] = true
		}
	}
	for _, c := range conts {
		size, err := s.sizeOf(s.rwFd, c.MountID)
		if err != nil {
			return u, err
		}
		u.Containers.Count++
		u.Containers.Size += size
		if mounted[c.ID] {
			u.Containers.Active++
		} else {
			u.Containers.Reclaimable += size
		}
	}
	for _, d := range []struct {
		name string
		to   *int64
	}{{chainsName, &u.Chains}, {stageName, &u.Stage}, {trashName, &u.Trash}} {
		if *d.to, err = s.sizeOf(s.rootFd, d.name); err != nil {
			return u, err
		}
	}
	kept, partial, err := s.blobUse()
	if err != nil {
		return u, err
	}
	u.Blobs, u.Stage = kept, u.Stage+partial
	// The rest of what du(1) would count: the database, the reserve for full
	// disks, and the directories themselves.
	for _, name := range []string{"", dbName, reserveName, layersName, rwName} {
		var st unix.Stat_t
		switch err := fsat.Stat(s.rootFd, name, &st); {
		case err == nil:
			u.Database += st.Blocks * 512
		case !fsat.IsAbsent(err):
			return u, fmt.Errorf("measure %q: %w", name, err)
		}
	}
	u.Total = u.Layers.Size + u.Init + u.Containers.Size + u.Chains + u.Blobs + u.Stage + u.Trash + u.Database
	return u, nil
}

// sizeOf is what a directory occupies; nothing if it is gone.
func (s *Store) sizeOf(dirfd int, name string) (int64, error) {
	fd, err := fsat.OpenName(dirfd, name, unix.O_PATH|unix.O_DIRECTORY, 0)
	if fsat.IsAbsent(err) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("measure %q: %w", name, err)
	}
	defer fsat.Close(fd)
	u, err := measure(fd)
	return u.allocated, err
}
