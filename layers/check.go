package layers

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// Check verifies the invariants of the store: the database against itself,
// the database against the disk, and, when deep, every layer against its
// diffID. With Repair it mends what can be mended without losing anything a
// user has made; a writable layer is never deleted.
//
//	K1   structure of the database file          —
//	K3   chainIDs                                K4  parents, depth
//	K5   content directory of each layer         K6  sidecar equals rows
//	K7   directories of layers without a row     K8  stages without an owner
//	K9   indexes                                 K10 configs
//	K11  images' top layers                      K12 references
//	K13  containers' layers and directories      K14 writable layers without a row
//	K15  mounts whose process is gone            K16 work of dead processes
//	K18  trash                                   K19 (deep) content gives the diffID
//	K20  (deep) no object the tar does not have  K21 (deep) sizes
//	K22  files that lost their content           K23 indexes of layers
//	K24  indexes of chains                 K26 adopted content is where and as it was
func (s *Store) Check(ctx context.Context, o CheckOptions) (*Report, error) {
	c := &checker{s: s, ctx: ctx, o: o, r: &Report{Findings: []Finding{}}}
	probs, err := s.db.CheckFile(ctx)
	if err != nil {
		return nil, s.mapErr(err)
	}
	for _, p := range probs {
		c.found(p.Invariant, p.Object, p.Text, "none: restore a copy of the database", nil)
	}
	if len(probs) > 0 {
		return c.r, nil
	}
	if err := c.rows(); err != nil {
		return nil, err
	}
	if err := c.read(); err != nil {
		return nil, err
	}
	for _, f := range []func() error{c.leftovers, c.caches, c.chains, c.containers} {
		if err := f(); err != nil {
			return nil, err
		}
	}
	return c.r, nil
}

type checker struct {
	s   *Store
	ctx context.Context
	o   CheckOptions
	r   *Report

	layers []metadata.Layer
	cache  []metadata.Cache
	conts  []metadata.Container
	live   []metadata.Live
	ingest []metadata.Ingest
	leases []metadata.Lease
	trash  []metadata.Trash
}

// found reports a finding and repairs it if it may and can.
func (c *checker) found(inv, object, problem, repair string, fix func() error) {
	f := Finding{Invariant: inv, Object: object, Problem: problem, Repair: repair}
	if c.o.Repair && fix != nil {
		if err := fix(); err != nil {
			f.Problem += "; repair failed: " + err.Error()
		} else {
			f.Fixed = true
		}
	}
	c.r.Findings = append(c.r.Findings, f)
}

// rows checks the database against itself.
func (c *checker) rows() error {
	var probs []metadata.Problem
	err := c.s.view(c.ctx, func(tx *metadata.Tx) (err error) {
		probs, err = tx.Check()
		return err
	})
	if err != nil {
		return err
	}
	indexes := false
	for _, p := range probs {
		switch p.Invariant {
		case "K9":
			c.found(p.Invariant, p.Object, p.Text, "rebuild the index", func() error {
				if indexes {
					return nil
				}
				indexes = true
				return c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.RebuildIndexes() })
			})
		case "K12":
			c.found(p.Invariant, p.Object, p.Text, "remove the reference", func() error {
				return c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.DropRef(p.Object) })
			})
		case "K10", "K11":
			c.found(p.Invariant, p.Object, p.Text, "remove the image; load it again", func() error {
				return c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.DropImage(digest.Digest(p.Object)) })
			})
		case "K7":
			c.found(p.Invariant, p.Object, p.Text, "remove the row", func() error {
				return c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.DropCache(p.Object) })
			})
		default:
			c.found(p.Invariant, p.Object, p.Text, "none: load the image again into a new store", nil)
		}
	}
	return nil
}

func (c *checker) read() error {
	return c.s.view(c.ctx, func(tx *metadata.Tx) (err error) {
		var errs []error
		get := func(err error) { errs = append(errs, err) }
		c.layers, err = tx.Layers()
		get(err)
		c.cache, err = tx.Caches()
		get(err)
		c.conts, err = tx.Containers()
		get(err)
		c.live, err = tx.LiveMounts()
		get(err)
		c.ingest, err = tx.Ingests()
		get(err)
		c.leases, err = tx.Leases()
		get(err)
		c.trash, err = tx.TrashRows()
		get(err)
		images, err := tx.Images()
		get(err)
		c.r.Layers, c.r.Images, c.r.Containers = len(c.layers), len(images), len(c.conts)
		return errors.Join(errs...)
	})
}

// leftovers looks for what dead processes have left.
func (c *checker) leftovers() error {
	sweep := func() error { return c.s.sweep(c.ctx) }
	for _, i := range c.ingest {
		if !alive(i.Owner, i.Started) {
			c.found("K16", "stage/"+i.ID, fmt.Sprintf("its owner, process %d, is gone", i.Owner.Pid), "remove", sweep)
		}
	}
	for _, l := range c.leases {
		if !alive(l.Owner, l.Started) {
			c.found("K16", "lease "+l.ID, fmt.Sprintf("its owner, process %d, is gone", l.Owner.Pid), "end it", sweep)
		}
	}
	for _, t := range c.trash {
		dir, name, _ := strings.Cut(t.Path, "/")
		if !trashDirs[dir] || strings.Contains(name, "/") {
			c.found("K18", t.Path, "a trash row names a path that is none of ours", "none", nil)
		}
	}
	for _, l := range c.live {
		if !liveOf(l).Alive() {
			c.found("K15", l.Target, fmt.Sprintf("process %d, which served the mount, is gone", l.Pid), "forget the mount", func() error {
				return c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.DeleteLive(l.BootID, l.Target) })
			})
		}
	}
	return c.strays()
}

// strays looks for names on disk that no row explains. Names are read before
// rows: a row precedes its directory, so what the later rows do not have was
// garbage when it was seen.
func (c *checker) strays() error {
	names := map[string][]string{}
	for dir, fd := range map[string]int{layersName: c.s.layersFd, stageName: c.s.stageFd, rwName: c.s.rwFd} {
		list, err := listDir(fd)
		if err != nil {
			return err
		}
		names[dir] = list
	}
	known := map[string]bool{}
	err := c.s.view(c.ctx, func(tx *metadata.Tx) error {
		caches, err := tx.Caches()
		if err != nil {
			return err
		}
		ingests, err := tx.Ingests()
		if err != nil {
			return err
		}
		conts, err := tx.Containers()
		if err != nil {
			return err
		}
		trash, err := tx.TrashRows()
		if err != nil {
			return err
		}
		for _, x := range caches {
			known[layersName+"/"+x.CacheID] = true
		}
		for _, x := range ingests {
			known[layersName+"/"+x.ID], known[stageName+"/"+x.ID] = true, true
		}
		for _, x := range conts {
			known[rwName+"/"+x.MountID], known[stageName+"/"+x.MountID] = true, true
		}
		for _, x := range trash {
			known[x.Path] = true
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, dir := range []string{layersName, stageName, rwName} {
		for _, n := range names[dir] {
			path := dir + "/" + n
			if known[path] || (dir == stageName && c.s.youngProbe(n)) {
				continue
			}
			switch dir {
			case layersName:
				c.found("K7", path, "a layer directory that no row names", "remove", func() error { return removeTree(c.s.layersFd, n) })
			case stageName:
				c.found("K8", path, "a stage that no row names", "remove", func() error { return removeTree(c.s.stageFd, n) })
			case rwName:
				c.found("K14", path, "a writable layer that no container has: it may hold somebody's data", "none: look at it, and remove it by hand", nil)
			}
		}
	}
	return nil
}

// caches checks the content directories.
func (c *checker) caches() error {
	byCache := map[string]metadata.Layer{}
	for _, l := range c.layers {
		byCache[l.CacheID] = l
	}
	for _, row := range c.cache {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		if err := c.one(row, byCache[row.CacheID]); err != nil {
			return err
		}
	}
	return nil
}

const (
	reload  = "none: remove the images that have it, and load them again"
	readopt = "none: put it back, adopt the store again, or load the image again"
)

func (c *checker) one(row metadata.Cache, l metadata.Layer) error {
	object := layersName + "/" + row.CacheID
	fd := -1
	if validID(row.CacheID) {
		fd, _ = fsat.OpenName(c.s.layersFd, row.CacheID, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	}
	if fd < 0 {
		c.found("K5", object, fmt.Sprintf("the directory of layer %s is missing", row.DiffID), reload, nil)
		return nil
	}
	files := layerFiles{dir: fd, diff: -1}
	defer func() { files.Close() }()
	var err error
	if row.Adopted != nil {
		files.adopted = true
		if files.diff, err = openAdopted(row.Adopted); err != nil {
			c.found("K26", object, err.Error(), readopt, nil)
			return nil
		}
	} else if files.diff, err = fsat.OpenName(fd, diffName, unix.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
		c.found("K5", object, fmt.Sprintf("the content of layer %s is missing: %v", row.DiffID, err), reload, nil)
		return nil
	}
	side, err := readSidecar(fd)
	switch {
	case err != nil:
		repair, fix := "write it anew", func() error { return writeSidecar(fd, Sidecar{Version: 1, Cache: row, Layer: l}) }
		if row.Duplicates {
			// Which contents were moved aside stands nowhere else.
			repair, fix = reload, nil
		}
		c.found("K6", object, "its sidecar cannot be read: "+err.Error(), repair, fix)
		side = Sidecar{Cache: row}
	case !sameAdopted(side.Cache.Adopted, row.Adopted) || side.Cache.DiffID != row.DiffID || side.Cache.CacheID != row.CacheID || side.Cache.Bind != row.Bind || side.Cache.SplitSHA != row.SplitSHA:
		side.Cache = row
		c.found("K6", object, "its sidecar does not agree with its row", "write it anew", func() error { return writeSidecar(fd, side) })
	}
	var st unix.Stat_t
	if err := fsat.Stat(fd, splitName, &st); (err != nil || st.Size != row.SplitSize) && (row.SplitSize > 0 || !fsat.IsAbsent(err)) {
		c.found("K22", object+"/"+splitName, fmt.Sprintf("expected %d bytes, got %d", row.SplitSize, st.Size), reload, nil)
		return nil
	}
	found := len(c.r.Findings)
	if c.o.Deep && row.SplitSize > 0 {
		if err := c.deep(row, files, side, object); err != nil {
			return err
		}
	}
	if len(c.r.Findings) > found {
		return nil // the index of what is damaged says nothing
	}
	return c.index(row, files, object)
}

// deep reads a layer's whole content.
func (c *checker) deep(row metadata.Cache, files layerFiles, side Sidecar, object string) error {
	p := &progress{fn: c.o.Progress}
	t := p.start(ShortID(row.DiffID), "verifying", row.TarSize)
	defer t.done()
	names := newTarNames()
	n, err := c.readTar(files, row, side, io.MultiWriter(t), names)
	c.r.Bytes += n
	switch {
	case c.ctx.Err() != nil:
		return c.ctx.Err()
	case err != nil:
		c.found("K19", object, err.Error(), reload, nil)
		return nil
	case n != row.TarSize:
		c.found("K19", object, fmt.Sprintf("its tar has %d bytes, the row says %d", n, row.TarSize), reload, nil)
	}
	use, err := measure(files.diff)
	if err != nil {
		return fmt.Errorf("%s: %w", object, err)
	}
	if use.apparent != row.Apparent || use.inodes != row.Inodes {
		if extra := names.extra(files.diff); len(extra) > 0 {
			c.found("K20", object, fmt.Sprintf("it holds %q, which the layer's tar does not have", extra[0]), reload, nil)
			return nil
		}
		c.found("K21", object, fmt.Sprintf("%d bytes in %d objects, the row says %d in %d", use.apparent, use.inodes, row.Apparent, row.Inodes), "correct the row", func() error {
			row.Apparent, row.Inodes, row.Allocated = use.apparent, use.inodes, use.allocated
			return c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.PutCache(row) })
		})
	}
	return nil
}

// readTar puts the layer's tar together, verifying it, and collects its names.
func (c *checker) readTar(files layerFiles, row metadata.Cache, side Sidecar, w io.Writer, names *tarNames) (int64, error) {
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		tr := tar.NewReader(pr)
		for {
			h, err := tr.Next()
			if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
				break
			}
			names.add(h.Name)
		}
		_, _ = io.Copy(io.Discard, pr) // the writer's error counts
	}()
	n, err := files.assemble(c.ctx, io.MultiWriter(w, pw), row.DiffID, side.displaced())
	_ = pw.Close() // never fails
	<-done
	return n, err
}

// tarNames are the names a tar explains: its entries and their parents.
type tarNames struct{ seen map[string]bool }

func newTarNames() *tarNames { return &tarNames{map[string]bool{}} }

func (t *tarNames) add(name string) {
	comps, err := tarPath(name, 1<<20)
	if err != nil {
		return
	}
	for i := range comps {
		t.seen[comps[i]] = true // by last name: entries may go through links
	}
	if n := len(comps); n > 0 {
		t.seen[strings.TrimPrefix(comps[n-1], ".wh.")] = true
	}
}

// extra returns names in the directory that no entry can have made.
func (t *tarNames) extra(fd int) (out []string) {
	var walk func(fd int, path string)
	walk = func(fd int, path string) {
		_ = fsat.ReadDirBeneath(fd, func(e fsat.Dirent) error {
			p := filepath.Join(path, e.Name)
			if !t.seen[e.Name] {
				out = append(out, p)
			}
			if c, err := fsat.OpenName(fd, e.Name, unix.O_PATH|unix.O_DIRECTORY, 0); err == nil {
				walk(c, p)
				fsat.Close(c)
			}
			return nil
		}) // what cannot be read shows as a wrong size
	}
	walk(fd, "")
	return out
}

// containers checks writable layers.
func (c *checker) containers() error {
	for _, row := range c.conts {
		if row.State == metadata.Creating {
			if !alive(row.Owner, row.Created) {
				c.found("K16", "container "+row.Name, "the process that was making it is gone", "remove", func() error { return c.s.sweep(c.ctx) })
			}
			continue
		}
		for _, n := range []string{upperName, workName} {
			fd := -1
			if validID(row.MountID) {
				fd, _ = fsat.OpenBeneath(c.s.rwFd, row.MountID+"/"+n, unix.O_PATH|unix.O_DIRECTORY)
			}
			if fd < 0 {
				c.found("K13", "container "+row.Name, fmt.Sprintf("its directory %s/%s/%s is missing", rwName, row.MountID, n), "mark it broken", func() error {
					return c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.SetContainerState(row.ID, metadata.Broken) })
				})
				break
			}
			fsat.Close(fd)
		}
	}
	return nil
}
