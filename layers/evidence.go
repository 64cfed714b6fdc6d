package layers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/whiteout"
)

// evidence is what there is of a store outside of its database, or in databases that
// are not in use: the sidecars, the rows that can be read in a damaged database, the
// copies. Everything in it is checked as far as it can be by itself.
type evidence struct {
	caches     map[string]metadata.Cache          // by cacheID; the directory is there
	layers     map[digest.Digest][]metadata.Layer // candidates for one row, the best first
	images     []metadata.SavedImage
	doubtful   []metadata.SavedImage // only in a copy: may have been removed since
	containers []metadata.Container
	salvaged   []*metadata.Salvaged // for what only a database knows, the best first
	buried     map[string]bool      // paths that were to be deleted
	notes      []string             // what could not be used, and why
	sources    []string
}

// gather collects the evidence. With db, the database file itself is read too, without
// trust.
func (s *Store) gather(ctx context.Context, db bool) (*evidence, error) {
	e := &evidence{caches: map[string]metadata.Cache{}, layers: map[digest.Digest][]metadata.Layer{}}
	if err := e.readLayers(ctx, s); err != nil {
		return nil, err
	}
	if db {
		e.readDatabase(s, s.db.Path(), "the damaged database", false)
	}
	if err := e.readImages(s); err != nil {
		return nil, err
	}
	if err := e.readContainers(s); err != nil {
		return nil, err
	}
	copies, err := s.copies()
	if err != nil {
		return nil, err
	}
	for _, n := range copies {
		if e.readDatabase(s, s.root+"/"+copiesName+"/"+n, copiesName+"/"+n, true) {
			break // the newest that is whole
		}
	}
	return e, nil
}

func (e *evidence) note(format string, a ...any) {
	e.notes = append(e.notes, fmt.Sprintf(format, a...))
}

// candidate adds a layer row if it is possible.
func (e *evidence) candidate(l metadata.Layer) {
	if checkDigest(l.DiffID) != nil || l.Parent != "" && checkDigest(l.Parent) != nil || l.ChainID != metadata.ChainID(l.Parent, l.DiffID) {
		return
	}
	if c, ok := e.caches[l.CacheID]; !ok || c.DiffID != l.DiffID {
		return
	}
	for i, have := range e.layers[l.ChainID] {
		if have.CacheID != l.CacheID {
			continue
		}
		if have.Blob == "" { // sidecars of images do not say
			have.Blob, have.BlobSize, have.MediaType = l.Blob, l.BlobSize, l.MediaType
			e.layers[l.ChainID][i] = have
		}
		return
	}
	e.layers[l.ChainID] = append(e.layers[l.ChainID], l)
}

// readLayers reads the sidecars of layers.
func (e *evidence) readLayers(ctx context.Context, s *Store) error {
	names, err := listDir(s.layersFd)
	if err != nil {
		return err
	}
	slices.Sort(names)
	found := false
	var worse []Sidecar
	for _, n := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		side, err := s.verifySidecar(n)
		if err != nil {
			e.note("%s/%s: %v", layersName, n, err)
			if errors.Is(err, errSplit) {
				side.Cache.Broken = "K22: " + err.Error()
				worse = append(worse, side)
			}
			continue
		}
		found = true
		e.caches[n] = side.Cache
		e.candidate(side.Layer)
	}
	// Without its record a layer can be mounted, and cannot be saved. That is better
	// than none, and a load heals it.
	for _, side := range worse {
		found = true
		e.caches[side.Cache.CacheID] = side.Cache
		e.candidate(side.Layer)
	}
	if found {
		e.sources = append(e.sources, "the sidecars of layers")
	}
	return nil
}

// errSplit is that of a layer directory in which nothing but the tar-split record is
// known to be damaged.
var errSplit = errors.New("the record of its tar is damaged")

// verifySidecar reads the sidecar of a layer directory and checks that it is that of
// this directory, whose tar-split record is whole.
func (s *Store) verifySidecar(name string) (Sidecar, error) {
	dir, err := fsat.OpenName(s.layersFd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return Sidecar{}, err
	}
	defer fsat.Close(dir)
	side, err := readSidecar(dir)
	if err != nil {
		return side, err
	}
	c := side.Cache
	if _, derr := whiteout.ParseDialect(c.Dialect); derr != nil || !validID(c.CacheID) || checkDigest(c.DiffID) != nil || side.Layer.DiffID != c.DiffID {
		return side, fmt.Errorf("%w: its sidecar is none of ours", ErrCorrupt)
	}
	err = verifyDirectory(dir, c)
	if c.CacheID != name {
		var st unix.Stat_t
		if (err == nil || errors.Is(err, errSplit)) && fsat.IsAbsent(fsat.Stat(s.layersFd, c.CacheID, &st)) {
			return side, fmt.Errorf("%w: it is that of %s", errMoved, c.CacheID)
		}
		return side, fmt.Errorf("%w: its sidecar is that of another layer", ErrCorrupt)
	}
	return side, err
}

// errMoved is that of a layer directory which belongs under another name, where there is
// none.
var errMoved = errors.New("the directory has been renamed")

// verifyDirectory checks that a layer directory has its content, and that its tar-split
// record is the one of a row.
func verifyDirectory(dir int, c metadata.Cache) error {
	if c.Adopted == nil {
		var st unix.Stat_t
		if err := fsat.Stat(dir, diffName, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return fmt.Errorf("%w: its content is missing", ErrCorrupt)
		}
	}
	if err := verifySplit(dir, c); err != nil {
		return fmt.Errorf("%w: %w", errSplit, err)
	}
	return nil
}

// verifySplit checks the tar-split record of a layer directory against its row.
func verifySplit(dir int, c metadata.Cache) error {
	fd, err := fsat.OpenRegular(dir, splitName, unix.O_RDONLY)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrCorrupt, splitName, err)
	}
	f := os.NewFile(uintptr(fd), splitName)
	defer f.Close()
	sum := digest.SHA256.Digester()
	n, err := io.Copy(sum.Hash(), io.LimitReader(f, c.SplitSize+1))
	if err != nil {
		return fmt.Errorf("%s: %w", splitName, err)
	}
	if n != c.SplitSize || sum.Digest() != c.SplitSHA {
		return fmt.Errorf("%w: %s has %d bytes with digest %s, expected %d with %s", ErrCorrupt, splitName, n, sum.Digest(), c.SplitSize, c.SplitSHA)
	}
	return nil
}

// proves reports whether there is a layer directory that is that of a row, which has
// the digest of its record.
func (s *Store) proves(c metadata.Cache) bool {
	if !validID(c.CacheID) || c.SplitSize == 0 || checkDigest(c.DiffID) != nil {
		return false
	}
	dir, err := fsat.OpenName(s.layersFd, c.CacheID, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return false
	}
	defer fsat.Close(dir)
	return verifyDirectory(dir, c) == nil
}

func (e *evidence) readImages(s *Store) error {
	names, err := listDir(s.imagesFd)
	if err != nil {
		return err
	}
	slices.Sort(names)
	have := map[digest.Digest]bool{}
	found := false
	for _, n := range names {
		if e.buried[imagesName+"/"+n] {
			continue
		}
		img, err := s.readSavedImage(n)
		if err != nil {
			e.note("%s/%s: %v", imagesName, n, err)
			continue
		}
		found = true
		have[img.Image.ID] = true
		for _, l := range img.Layers {
			e.candidate(l)
		}
		// The sidecar is as new as the database, and it is whole.
		e.images = append(slices.DeleteFunc(e.images, func(o metadata.SavedImage) bool { return o.Image.ID == img.Image.ID }), img)
	}
	if found {
		e.sources = append(e.sources, "the sidecars of images")
	}
	return nil
}

func (e *evidence) readContainers(s *Store) error {
	names, err := listDir(s.rwFd)
	if err != nil {
		return err
	}
	slices.Sort(names)
	known := map[string]bool{}
	for _, c := range e.containers {
		known[c.MountID] = true
	}
	found := false
	for _, n := range names {
		if e.buried[rwName+"/"+n] {
			continue
		}
		saved, err := s.readSavedContainer(n)
		if err != nil {
			if !known[n] {
				e.note("%s/%s: %v", rwName, n, err)
			}
			continue
		}
		found = true
		for _, l := range saved.Layers {
			e.candidate(l)
		}
		e.containers = append(slices.DeleteFunc(e.containers, func(o metadata.Container) bool { return o.MountID == n }), saved.Container)
	}
	if found {
		e.sources = append(e.sources, "the sidecars of containers")
	}
	return nil
}

// readDatabase takes what can be read from a database file. It reports whether the
// file is whole.
func (e *evidence) readDatabase(s *Store, path, what string, old bool) bool {
	r, err := metadata.Salvage(path)
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			e.note("%s: %v", what, err)
		}
		return false
	}
	if len(r.Problems) > 0 {
		e.note("%s: %s", what, r.Problems[0])
	}
	rows := 0
	for _, c := range r.Caches() {
		have, ok := e.caches[c.CacheID]
		if !ok && s.proves(c) {
			e.caches[c.CacheID] = c // its sidecar is lost
			rows++
			continue
		}
		if !ok || have.DiffID != c.DiffID || have.SplitSHA != c.SplitSHA || have.Bind != c.Bind {
			continue
		}
		rows++
		if !old {
			e.caches[c.CacheID] = c // a check may have corrected it
		}
	}
	for _, l := range r.Layers() {
		e.candidate(l)
		rows++
	}
	for _, img := range r.Images() {
		rows++
		if old {
			e.doubtful = append(e.doubtful, img)
		} else {
			e.images = append(e.images, img)
		}
	}
	if !old {
		e.buried = r.Trash()
		for _, c := range r.Containers() {
			if validID(c.MountID) && containerID(c.ID) && containerName.MatchString(c.Name) && c.State != metadata.Creating {
				e.containers = append(e.containers, c)
			}
		}
	}
	e.salvaged = append(e.salvaged, r)
	if rows > 0 {
		e.sources = append(e.sources, what)
	}
	return len(r.Problems) == 0
}
