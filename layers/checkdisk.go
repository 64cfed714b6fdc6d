package layers

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// stray is a name on the disk that no row explains.
type stray struct{ dir, name string }

func (x stray) path() string { return x.dir + "/" + x.name }

// findStrays looks for names on disk that no row explains. Names are read before
// rows: a row precedes its directory, so what the later rows do not have was
// garbage when it was seen. Rows that cannot be decoded count: what they named is not
// known, but that they named something is.
func (s *Store) findStrays(tx func(func(*metadata.Tx) error) error) ([]stray, error) {
	names := map[string][]string{}
	dirs := map[string]int{layersName: s.layersFd, stageName: s.stageFd, rwName: s.rwFd, trashName: s.trashFd}
	for dir, fd := range dirs {
		list, err := listDir(fd)
		if err != nil {
			return nil, err
		}
		names[dir] = list
	}
	known := map[string]bool{}
	err := tx(func(tx *metadata.Tx) error {
		conts, err := tx.Containers()
		if err != nil {
			return err
		}
		trash, err := tx.TrashRows()
		if err != nil {
			return err
		}
		for _, id := range tx.CacheIDs() {
			known[layersName+"/"+id] = true
		}
		for _, id := range tx.IngestIDs() {
			known[layersName+"/"+id], known[stageName+"/"+id] = true, true
		}
		for _, id := range tx.MountIDs() {
			known[rwName+"/"+id] = true
		}
		for _, x := range conts {
			known[rwName+"/"+x.MountID], known[stageName+"/"+x.MountID] = true, true
		}
		for _, x := range trash {
			_, base, _ := strings.Cut(x.Path, "/")
			known[x.Path], known[trashName+"/"+base+"."+strconv.FormatUint(x.Seq, 10)] = true, true
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var out []stray
	for _, dir := range []string{layersName, stageName, rwName, trashName} {
		slices.Sort(names[dir])
		for _, n := range names[dir] {
			if known[dir+"/"+n] || (dir == stageName && s.youngProbe(n)) {
				continue
			}
			out = append(out, stray{dir, n})
		}
	}
	return out, nil
}

func (c *checker) strays() error {
	list, err := c.s.findStrays(func(fn func(*metadata.Tx) error) error { return c.s.view(c.ctx, fn) })
	if err != nil {
		return err
	}
	for _, x := range list {
		switch x.dir {
		case layersName:
			c.strayLayer(x)
		case stageName:
			c.found("K8", x.path(), "a stage that no row names", "remove", func() error { return removeTree(c.s.stageFd, x.name) })
		case trashName:
			c.found("K18", x.path(), "something that was to be deleted, and that no row names", "remove", func() error { return removeTree(c.s.trashFd, x.name) })
		case rwName:
			c.strayUpper(x)
		}
	}
	return nil
}

// strayLayer adopts a layer directory that proves what it is, on the chain it was made
// for. It may be the only copy of a layer: as long as something lacks a layer, one that
// lacks what lies below it is kept. Any other is removed.
func (c *checker) strayLayer(x stray) {
	remove := func() error { return removeTree(c.s.layersFd, x.name) }
	side, err := c.s.verifySidecar(x.name)
	if errors.Is(err, errMoved) {
		c.found("K7", x.path(), "a layer directory that no row names: "+err.Error(), "give it its name back", func() error {
			if err := fsat.Rename(c.s.layersFd, x.name, c.s.layersFd, side.Cache.CacheID, unix.RENAME_NOREPLACE); err != nil {
				return err
			}
			return unix.Fsync(c.s.layersFd)
		})
		return
	}
	if err != nil && !errors.Is(err, errSplit) {
		c.found("K7", x.path(), "a layer directory that no row names: "+err.Error(), "remove", remove)
		return
	}
	f := Finding{
		Invariant: "K7", Severity: SeverityError, Object: x.path(), Repair: "make its rows anew, or remove it if there is such a layer",
		Problem: fmt.Sprintf("the directory of layer %s, which no row names", side.Cache.DiffID),
	}
	if err != nil {
		f.Problem += "; " + err.Error()
	}
	if !c.o.Repair {
		c.report(f, nil)
		return
	}
	var lacking []string
	adopted := false
	fix := func() error {
		e, err := c.evidence()
		if err != nil {
			return err
		}
		if err = c.s.update(c.ctx, func(tx *metadata.Tx) (err error) {
			adopted, lacking = false, nil
			if _, err := tx.Cache(x.name); err == nil { // it came with what lies on top of it
				adopted = true
				return nil
			}
			if tx.HasLayer(side.Layer.ChainID) {
				return nil
			}
			if adopted, err = e.addChain(tx, side.Layer.ChainID, &RebuildReport{}); adopted || err != nil {
				return err
			}
			lacking, err = lackers(tx)
			return err
		}); err != nil || adopted {
			return err
		}
		if len(lacking) > 0 {
			return errNeedsLoad
		}
		return remove()
	}
	switch err := fix(); {
	case err == nil:
		f.Fixed = true
	case len(lacking) > 0:
		f.Problem += ", and what lies below it is missing"
		f.Images, f.Repair = lacking, reloadHint(lacking)+"; it is kept until then"
	default:
		f.Problem += "; repair failed: " + err.Error()
	}
	c.report(f, nil)
}

// strayUpper gives a writable layer back to the container that its sidecar describes,
// or puts it out of the way. It may hold somebody's data.
func (c *checker) strayUpper(x stray) {
	saved, err := c.s.readSavedContainer(x.name)
	if err == nil {
		c.found("K14", x.path(), fmt.Sprintf("the writable layer of container %q, which has no row", saved.Container.Name), "make the row anew", func() error {
			e, err := c.evidence()
			if err != nil {
				return err
			}
			return c.s.update(c.ctx, func(tx *metadata.Tx) error {
				if _, err := e.addChain(tx, saved.Container.Chain, &RebuildReport{}); err != nil {
					return err
				}
				return tx.RestoreContainer(saved.Container)
			})
		})
		return
	}
	c.found("K14", x.path(), "a writable layer that no container has: it may hold somebody's data", "move it to "+lostName+"/: look at it, and remove it by hand", func() error {
		return c.s.quarantine(x.name)
	})
}

// saved compares the sidecars of images and containers with the rows.
func (c *checker) saved() error {
	names, err := listDir(c.s.imagesFd) // before the rows: a sidecar goes after its row
	if err != nil {
		return err
	}
	want := map[string][]byte{}
	ids := map[string]digest.Digest{}
	type doc struct {
		id, name, mount string
		raw             []byte
	}
	var conts []doc
	var known map[string]bool
	err = c.s.view(c.ctx, func(tx *metadata.Tx) (err error) {
		if known, err = knownSaved(tx); err != nil {
			return err
		}
		for _, id := range tx.ImageIDs() {
			if id.Validate() != nil {
				continue
			}
			ids[imageFile(id)] = id
			raw, err := c.s.encodeImage(tx, id)
			if err != nil {
				continue // K10 and K27 tell
			}
			want[imageFile(id)] = raw
		}
		rows, err := tx.Containers()
		if err != nil {
			return err
		}
		for _, row := range rows {
			if row.State == metadata.Creating || !validID(row.MountID) {
				continue
			}
			raw, err := encodeContainer(tx, row)
			if err != nil {
				return err
			}
			conts = append(conts, doc{row.ID, row.Name, row.MountID, raw})
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, n := range sortedNames(want) {
		have, err := readFile(c.s.imagesFd, n, sidecarMax)
		if err == nil && bytes.Equal(have, want[n]) {
			continue
		}
		text := "the sidecar of the image does not agree with its rows"
		if err != nil {
			text = "the sidecar of the image cannot be read: " + err.Error()
		}
		c.found("K6", imagesName+"/"+n, text, "write it anew", func() error {
			return c.s.follow(c.ctx, metadata.Touched{Images: []digest.Digest{ids[n]}})
		})
	}
	for _, d := range conts {
		fd, err := fsat.OpenName(c.s.rwFd, d.mount, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			continue // K13 tells
		}
		have, err := readFile(fd, containerDoc, sidecarMax)
		fsat.Close(fd)
		if err == nil && bytes.Equal(have, d.raw) {
			continue
		}
		c.found("K6", rwName+"/"+d.mount+"/"+containerDoc, fmt.Sprintf("the sidecar of container %q is missing or does not agree with its row", d.name), "write it anew", func() error {
			return c.s.follow(c.ctx, metadata.Touched{Containers: []string{d.id}})
		})
	}
	slices.Sort(names)
	for _, n := range names {
		if !known[n] {
			c.straySaved(n)
		}
	}
	return nil
}

// straySaved is about a file in images/ that belongs to no image: what a crash has left
// of one that was removed, or all that is left of one whose row has gone. Only the
// second one still has all its layers.
func (c *checker) straySaved(n string) {
	object := imagesName + "/" + n
	remove := func() error {
		err := fsat.Unlink(c.s.imagesFd, n)
		if errors.Is(err, unix.EISDIR) {
			err = removeTree(c.s.imagesFd, n)
		}
		return err
	}
	saved, err := c.s.readSavedImage(n)
	whole := false
	if err == nil {
		spec, perr := parseConfig(saved.Config, c.s.limits)
		_ = c.s.view(c.ctx, func(tx *metadata.Tx) error { // only to know
			top := chainOf(spec.RootFS.DiffIDs)
			whole = perr == nil && (top == "" || tx.HasLayer(top))
			return nil
		})
	}
	if !whole {
		c.found("K6", object, "the sidecar of an image that is not there", "remove", remove)
		return
	}
	c.found("K6", object, "the sidecar of an image that has no row, but all its layers", "put the image back", func() error {
		return c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.RestoreImage(saved) })
	})
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
		c.container(row)
	}
	return nil
}

func (c *checker) container(row metadata.Container) {
	missing := ""
	for _, n := range []string{upperName, workName} {
		fd := -1
		if validID(row.MountID) {
			fd, _ = fsat.OpenBeneath(c.s.rwFd, row.MountID+"/"+n, unix.O_PATH|unix.O_DIRECTORY)
		}
		if fd < 0 && missing == "" {
			missing = n
		}
		fsat.Close(fd)
	}
	object := "container " + row.Name
	state := func(state string) func() error {
		return func() error {
			return c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.SetContainerState(row.ID, state) })
		}
	}
	gone := fmt.Sprintf("its directory %s/%s/%s is missing", rwName, row.MountID, missing)
	switch {
	case missing == workName:
		// It holds nothing that outlives a mount.
		c.found("K13", object, gone, "make it anew", func() error {
			dir, err := fsat.OpenName(c.s.rwFd, row.MountID, unix.O_RDONLY|unix.O_DIRECTORY, 0)
			if err != nil {
				return err
			}
			defer fsat.Close(dir)
			if err := fsat.Unlink(dir, workName); err != nil && !fsat.IsAbsent(err) { // something else
				return err
			}
			if err := fsat.Mkdir(dir, workName, 0o700); err != nil {
				return err
			}
			return unix.Fsync(dir)
		})
	case missing != "" && row.State == metadata.Broken:
		c.warn("K13", object, gone, "none: it is marked broken; remove it (plyfs rm)", nil)
	case missing != "":
		c.found("K13", object, gone, "mark it broken", state(metadata.Broken))
	case row.State == metadata.Broken:
		whole := false
		_ = c.s.view(c.ctx, func(tx *metadata.Tx) error { // only to know
			_, err := tx.Chain(row.Chain)
			_, ierr := tx.Image(row.ImageID)
			whole = err == nil && ierr == nil
			return nil
		})
		if whole {
			c.found("K13", object, "it is marked broken, but nothing is missing", "mark it ready", state(metadata.Ready))
		}
	}
}

// space looks at what will run out. Nothing is broken yet.
func (c *checker) space() error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(c.s.rootFd, &st); err != nil {
		return err
	}
	if free := int64(st.Bavail) * st.Bsize; st.Blocks > 0 && (free < 64<<20 || st.Bavail < st.Blocks/100) {
		c.warn("K25", c.s.root, fmt.Sprintf("%d MB are free", free>>20), "none: plyfs prune and plyfs gc remove what is not needed", nil)
	}
	if st.Files > 0 && st.Ffree < st.Files/100 {
		c.warn("K25", c.s.root, fmt.Sprintf("%d inodes are free", st.Ffree), "none: plyfs prune and plyfs gc remove what is not needed", nil)
	}
	if f, ok := fileSystems[int64(st.Type)&0xffffffff]; ok {
		c.warn("K25", c.s.root, fmt.Sprintf("the store lies on %s: %s", f.name, f.why), "none: move it", nil)
	}
	if u, err := c.s.db.FileUse(); err == nil && u.Size > 8<<20 && u.Free > u.Size/2 {
		c.warn("K25", dbName, fmt.Sprintf("%d of its %d MB hold nothing", u.Free>>20, u.Size>>20), "none: plyfs store compact gives them back", nil)
	}
	if lost, err := fsat.OpenName(c.s.rootFd, lostName, unix.O_RDONLY|unix.O_DIRECTORY, 0); err == nil {
		names, _ := listDir(lost) // none is as good as an empty one
		fsat.Close(lost)
		if len(names) > 0 {
			c.warn("K14", lostName, fmt.Sprintf("%d writable layers that belonged to nobody are kept here", len(names)), "none: look at them, and remove them by hand", nil)
		}
	}
	return nil
}
