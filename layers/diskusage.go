package layers

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// DiskUsage says where the bytes are.
func (s *Store) DiskUsage(ctx context.Context) (DiskUsage, error) {
	var (
		u      DiskUsage
		caches []metadata.Cache
		initID = map[string]bool{}
		active = map[string]bool{}
		conts  []metadata.Container
		live   []metadata.Live
		trash  []metadata.Trash
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
		if trash, err = tx.TrashRows(); err != nil {
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
	known := map[string]bool{}
	for _, c := range caches {
		known[c.CacheID] = true
		size, err := s.sizeOf(s.layersFd, c.CacheID)
		if err != nil {
			return u, err
		}
		if initID[c.CacheID] {
			u.Init += size
			continue
		}
		if c.Adopted != nil {
			u.Adopted += c.Allocated
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
		known[c.MountID] = true
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
	removed := map[string]bool{}
	for _, t := range trash {
		removed[t.Path] = true
	}
	if err := s.restUsage(&u, known, removed); err != nil {
		return u, err
	}
	u.Total = u.Layers.Size + u.Init + u.Containers.Size + u.Chains + u.Blobs + u.Stage + u.Trash + u.Database + u.Records + u.Other
	return u, nil
}

// snapshotterName is a directory that `plyfs snapshotter` keeps in a store by default; it
// is no part of the store.
const snapshotterName = "snapshotter"

// restUsage adds what is neither a layer nor a container, so that nothing du(1) would
// count is left out, whatever it is.
func (s *Store) restUsage(u *DiskUsage, known, removed map[string]bool) error {
	var root unix.Stat_t
	if err := fsat.Fstat(s.rootFd, &root); err != nil {
		return err
	}
	u.Database += root.Blocks * 512
	names, err := listDir(s.rootFd)
	if err != nil {
		return err
	}
	for _, n := range names {
		if n == snapshotterName { // its unions are mounted in it, and may hang
			continue
		}
		if n == layersName || n == rwName {
			if err := s.strayUsage(u, n, known, removed); err != nil {
				return err
			}
			continue
		}
		size, err := s.sizeOf(s.rootFd, n)
		if fsat.IsAbsent(err) {
			continue
		}
		if err != nil {
			return err
		}
		switch {
		case n == chainsName:
			u.Chains += size
		case n == stageName:
			u.Stage += size
		case n == blobsName:
			kept, _, err := s.blobUse()
			if err != nil {
				return err
			}
			u.Blobs += kept
			u.Stage += size - kept
		case n == trashName:
			u.Trash += size
		case n == dbName || n == reserveName:
			u.Database += size
		case n == imagesName || n == copiesName || strings.HasPrefix(n, dbName+"."):
			u.Records += size
		default:
			u.Other += size
		}
	}
	return nil
}

// strayUsage adds a directory of ours itself, and what no row explains in it.
func (s *Store) strayUsage(u *DiskUsage, dir string, known, removed map[string]bool) error {
	fd := s.layersFd
	if dir == rwName {
		fd = s.rwFd
	}
	var st unix.Stat_t
	if err := fsat.Fstat(fd, &st); err != nil {
		return err
	}
	u.Database += st.Blocks * 512
	names, err := listDir(fd)
	if err != nil {
		return err
	}
	for _, n := range names {
		if known[n] {
			continue
		}
		size, err := s.sizeOf(fd, n)
		if err != nil && !fsat.IsAbsent(err) {
			return err
		}
		if removed[dir+"/"+n] {
			u.Trash += size
		} else {
			u.Other += size
		}
	}
	return nil
}

// sizeOf is what a directory occupies; nothing if it is gone.
func (s *Store) sizeOf(dirfd int, name string) (int64, error) {
	fd, err := fsat.OpenName(dirfd, name, unix.O_PATH|unix.O_DIRECTORY, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) { // not a directory
		var st unix.Stat_t
		err := fsat.Stat(dirfd, name, &st)
		return st.Blocks * 512, err
	}
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
