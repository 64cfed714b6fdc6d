package layers

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// caches checks the content directories.
func (c *checker) caches() error {
	by := map[string][]metadata.Layer{}
	for _, l := range c.layers {
		by[l.CacheID] = append(by[l.CacheID], l)
	}
	for _, row := range c.cache {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		if err := c.one(row, by[row.CacheID]); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) one(row metadata.Cache, ls []metadata.Layer) error {
	object := layersName + "/" + row.CacheID
	fd := -1
	if validID(row.CacheID) {
		fd, _ = fsat.OpenName(c.s.layersFd, row.CacheID, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	}
	if fd < 0 {
		c.damaged("K5", object, fmt.Sprintf("the directory of layer %s is missing", row.DiffID), row, ls)
		return nil
	}
	files := layerFiles{dir: fd, diff: -1}
	defer func() { files.Close() }()
	var err error
	if row.Adopted != nil {
		files.adopted = true
		if files.diff, err = openAdopted(row.Adopted); err != nil {
			c.report(Finding{Invariant: "K28", Severity: SeverityError, Object: object, Problem: err.Error(), Repair: readopt, Images: c.users(ls)}, nil)
			return nil
		}
	} else if files.diff, err = fsat.OpenName(fd, diffName, unix.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
		c.damaged("K5", object, fmt.Sprintf("the content of layer %s is missing: %v", row.DiffID, err), row, ls)
		return nil
	}
	side, err := readSidecar(fd)
	switch {
	case err != nil && row.Duplicates:
		// Which contents were moved aside stands nowhere else.
		c.damaged("K6", object, "its sidecar cannot be read: "+err.Error(), row, ls)
		return nil
	case err != nil && len(ls) > 0:
		c.found("K6", object, "its sidecar cannot be read: "+err.Error(), "write it anew", func() error {
			dropDirectory(fd, sidecarName)
			return writeSidecar(fd, Sidecar{Version: 1, Cache: row, Layer: ls[0]})
		})
		side = Sidecar{Cache: row}
	case !sameAdopted(side.Cache.Adopted, row.Adopted) || side.Cache.DiffID != row.DiffID || side.Cache.CacheID != row.CacheID || side.Cache.Bind != row.Bind || side.Cache.SplitSHA != row.SplitSHA:
		side.Cache = row
		if len(ls) > 0 && (side.Layer.DiffID != row.DiffID || side.Layer.CacheID != row.CacheID) {
			side.Layer = ls[0]
		}
		c.found("K6", object, "its sidecar does not agree with its row", "write it anew", func() error { return writeSidecar(fd, side) })
	}
	var st unix.Stat_t
	if err := fsat.Stat(fd, splitName, &st); (err != nil || st.Size != row.SplitSize) && (row.SplitSize > 0 || !fsat.IsAbsent(err)) {
		c.damaged("K22", object+"/"+splitName, fmt.Sprintf("expected %d bytes, got %d", row.SplitSize, st.Size), row, ls)
		return nil
	}
	if row.Broken != "" && !c.o.Deep {
		c.known(row, ls, object)
		return nil
	}
	found := len(c.r.Findings)
	var serr error
	if row.SplitSize > 0 { // otherwise it lies in another store, where there was no record of its tar
		serr = files.scan(c.ctx, side.displaced())
	}
	switch {
	case c.ctx.Err() != nil:
		return c.ctx.Err()
	case serr != nil:
		c.damaged("K22", object, serr.Error(), row, ls)
	case c.o.Deep && row.SplitSize > 0:
		if err := c.deep(row, files, side, object, ls); err != nil {
			return err
		}
	}
	for _, f := range c.r.Findings[found:] {
		if f.Invariant != "K21" {
			return nil // the index of what is damaged says nothing
		}
	}
	if row.Broken != "" {
		c.found("K5", object, "it is marked as broken, but it is whole", "remove the mark", func() error { return c.mark(row.CacheID, "") })
	}
	return c.index(row, files, side, object, ls)
}

// readopt is what can be done about content in another store.
const readopt = "none: put it back, adopt the store again, or load the image again"

// known reports what an earlier check has found and marked.
func (c *checker) known(row metadata.Cache, ls []metadata.Layer, object string) {
	inv, text, ok := strings.Cut(row.Broken, ": ")
	if !ok {
		inv, text = "K5", row.Broken
	}
	c.damaged(inv, object, text, row, ls)
}

// users names the images that have any of some layers.
func (c *checker) users(ls []metadata.Layer) (names []string) {
	for _, l := range ls {
		for _, n := range c.images[l.ChainID] {
			if !slices.Contains(names, n) {
				names = append(names, n)
			}
		}
	}
	return names
}

func (c *checker) mark(cacheID, text string) error {
	return c.s.update(c.ctx, func(tx *metadata.Tx) error { return setBroken(tx, cacheID, text) })
}

func setBroken(tx *metadata.Tx, cacheID, text string) error {
	row, err := tx.Cache(cacheID)
	if err != nil || row.Broken == text {
		return err
	}
	row.Broken = text
	return tx.PutCache(row)
}

// damaged reports a layer whose content is not what it should be. What can be done
// without an archive is done: a layer that nothing needs goes, an init layer is made
// again, and one whose contents are whole, or are whole in another directory, is
// unpacked anew. Otherwise it is marked, so that the next load puts whole content in
// its place.
func (c *checker) damaged(inv, object, text string, row metadata.Cache, ls []metadata.Layer) {
	f := Finding{Invariant: inv, Severity: SeverityError, Object: object, Problem: text, Images: c.users(ls)}
	load, repair := reloadHint(f.Images), ""
	switch {
	case len(ls) > 0 && ls[0].Origin == "init":
		repair = "make it again"
	case inv == "K20" || inv == "K29": // all contents are there
		repair = "unpack it anew from its own record"
	}
	if f.Repair = load; repair != "" && !c.o.Repair {
		f.Repair, f.Images = repair, nil
	}
	if !c.o.Repair {
		c.report(f, nil)
		return
	}
	if err := c.mark(row.CacheID, inv+": "+text); err != nil {
		f.Problem += "; " + err.Error()
	}
	how, err := c.heal(row, ls)
	if err == nil {
		f.Fixed, f.Repair, f.Images = true, how, nil
	} else {
		if !errors.Is(err, errNeedsLoad) {
			f.Problem += "; repair failed: " + err.Error()
		}
		if len(f.Images) == 0 && len(ls) > 0 { // what is made again needs what lies below
			f.Images = c.images[ls[0].Parent]
			f.Repair = reloadHint(f.Images)
		}
	}
	c.report(f, nil)
}

var errNeedsLoad = errors.New("only a load can put it right")

// heal puts whole content in the place of a damaged layer, if there is any.
func (c *checker) heal(row metadata.Cache, ls []metadata.Layer) (how string, err error) {
	gone := false
	err = c.s.update(c.ctx, func(tx *metadata.Tx) error {
		for _, l := range ls {
			if _, err := releaseChain(tx, l.ChainID, nil); err != nil {
				return err
			}
		}
		_, err := tx.Cache(row.CacheID)
		gone = errors.Is(err, metadata.ErrNotFound)
		return nil
	})
	if err != nil || gone || len(ls) == 0 {
		return "remove it: nothing needs it", err
	}
	lease, err := c.s.newLease(c.ctx)
	if err != nil {
		return "", err
	}
	defer c.s.dropLease(lease)
	l := ls[0]
	if l.Origin == "init" {
		_, err := c.s.ensureInit(c.ctx, lease, l.Parent)
		return "make it again", err
	}
	st, err := c.s.restage(c.ctx, row.DiffID)
	if errors.Is(err, ErrCorrupt) || errors.Is(err, ErrNotFound) {
		return "", errNeedsLoad
	}
	if err != nil {
		return "", err
	}
	defer st.discard()
	_, err = st.commit(c.ctx, target{parent: l.Parent, origin: l.Origin, blob: l.Blob, blobSize: l.BlobSize, lease: lease})
	return "unpack it anew from its own record", err
}

// scan looks at the files that the layer's tar has content for, without reading them: a
// file that has lost its content, as after a power cut, is shorter than the record says.
func (l layerFiles) scan(ctx context.Context, displaced map[int]bool) error {
	fd, err := fsat.OpenRegular(l.dir, splitName, unix.O_RDONLY)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrCorrupt, splitName, err)
	}
	f := os.NewFile(uintptr(fd), splitName)
	defer f.Close()
	zr, err := zstd.NewReader(bufio.NewReader(f), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return err
	}
	defer zr.Close()
	dec := json.NewDecoder(zr)
	for {
		var e storage.Entry
		if err := dec.Decode(&e); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("%w: %s: %w", ErrCorrupt, splitName, err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if e.Type != storage.FileType || e.Size <= 0 {
			continue
		}
		at, path := l.place(&e, displaced[e.Position])
		p, err := fsat.OpenBeneath(at, path, unix.O_PATH|unix.O_NOFOLLOW)
		if err != nil {
			return fmt.Errorf("%w: content of %q: %w", ErrCorrupt, e.GetName(), err)
		}
		var st unix.Stat_t
		err = fsat.Fstat(p, &st)
		fsat.Close(p)
		if err != nil {
			return err
		}
		if err := isContent(&e, &st); err != nil {
			return err
		}
	}
}

// deep reads a layer's whole content.
func (c *checker) deep(row metadata.Cache, files layerFiles, side Sidecar, object string, ls []metadata.Layer) error {
	p := &progress{fn: c.o.Progress}
	t := p.start(ShortID(row.DiffID), "verifying", row.TarSize)
	defer t.done()
	n, err := files.assemble(c.ctx, t, row.DiffID, side.displaced())
	c.r.Bytes += n
	switch {
	case c.ctx.Err() != nil:
		return c.ctx.Err()
	case err != nil:
		c.damaged("K19", object, err.Error(), row, ls)
		return nil
	}
	d, err := c.s.layerDir(row)
	if err != nil {
		c.damaged("K5", object, err.Error(), row, ls)
		return nil
	}
	if _, err := compareTar(c.ctx, files, row, d, side); err != nil {
		if c.ctx.Err() != nil {
			return c.ctx.Err()
		}
		inv := "K20"
		var m *mismatch
		if errors.As(err, &m) {
			inv = m.inv
		}
		c.damaged(inv, object, err.Error(), row, ls)
		return nil
	}
	use, err := measure(files.diff)
	if err != nil {
		return fmt.Errorf("%s: %w", object, err)
	}
	if use.apparent != row.Apparent || use.inodes != row.Inodes || n != row.TarSize {
		c.found("K21", object, fmt.Sprintf("%d bytes in %d objects, a tar of %d; the row says %d in %d, %d",
			use.apparent, use.inodes, n, row.Apparent, row.Inodes, row.TarSize), "correct the row", func() error {
			return c.s.update(c.ctx, func(tx *metadata.Tx) error {
				now, err := tx.Cache(row.CacheID)
				if err != nil {
					return err
				}
				now.Apparent, now.Inodes, now.Allocated, now.TarSize = use.apparent, use.inodes, use.allocated, n
				return tx.PutCache(now)
			})
		})
	}
	return nil
}
