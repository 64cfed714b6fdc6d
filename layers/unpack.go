package layers

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
)

// unpacker turns one layer tar into a stage directory. What depends on the
// layers below (attributes of directories the tar does not mention, hard links
// to files it does not have, an opaque root) is left for [unpacker.bind], and
// whatever a later entry may still change (whiteouts, attributes of
// directories) for [unpacker.finish]; so a layer can be unpacked before its
// image is known, and the order of its entries does not matter.
type unpacker struct {
	powers powers
	limits Limits
	dir    int // stage/<id>
	diff   int // stage/<id>/diff

	root      *node
	split     *splitWriter
	displaced map[int]bool
	pending   int // nodes of kindPending
	stats     unpackStats

	// The file system gives attributes to objects that nobody has set.
	foreignXattrs bool
	maker         maker
	sink          *sink

	curNode *node // directory behind curFd
	curFd   int
}

// keep returns the attributes of a finished object if its index needs them.
func (u *unpacker) keep(a *attrs) *attrs {
	if u.powers.privileged && len(a.xattrs) == 0 {
		return nil
	}
	return a
}

type unpackStats struct {
	entries    int64
	tarSize    int64
	apparent   int64
	allocated  int64
	inodes     int64
	contents   int64 // bytes of file content, for the limit
	duplicates bool
	ended      bool // the tar has an end mark
	incomplete bool // some attribute could not be applied
	diffID     digest.Digest
}

// ctxReader ends a stream when its context does.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// countReader counts what is read through it, up to a limit.
type countReader struct {
	r     io.Reader
	n     int64
	limit int64
}

func (c *countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if c.n += int64(n); c.n > c.limit {
		return n, fmt.Errorf("%w: more than %d bytes in one layer", ErrUnsupported, c.limit)
	}
	return n, err
}

// unpack reads the whole of r, which is a plain tar.
func (u *unpacker) unpack(ctx context.Context, r io.Reader, splitFile *os.File) (err error) {
	defer u.dropDir()
	count := &countReader{r: ctxReader{ctx, r}, limit: u.limits.LayerBytes}
	u.split, err = newSplitWriter(bufio.NewReaderSize(count, 64<<10), splitFile)
	if err != nil {
		return err
	}
	u.sink = newSink(u.powers)
	defer func() {
		if serr := u.sink.close(); err == nil {
			err = serr
		}
		u.stats.incomplete = u.stats.incomplete || u.sink.incomplete.Load()
		if err != nil {
			u.split.abort()
		}
	}()
	tr := tar.NewReader(u.split)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return tarError(err, u.stats.entries)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if u.stats.entries++; u.stats.entries > u.limits.Entries {
			return fmt.Errorf("%w: more than %d entries", ErrUnsupported, u.limits.Entries)
		}
		if err := u.sink.failed(); err != nil {
			return err
		}
		if err := u.entry(h, tr); err != nil {
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
	}
	u.stats.ended = u.split.zeros >= 512
	// What follows the end mark belongs to the diffID and to the copy that is
	// written out again.
	if _, err := io.Copy(io.Discard, u.split); err != nil {
		return tarError(err, u.stats.entries)
	}
	if err := u.split.close(); err != nil {
		return fmt.Errorf("write %s: %w", splitName, err)
	}
	u.stats.tarSize = count.n
	return nil
}

func tarError(err error, entries int64) error {
	switch {
	case errors.Is(err, tar.ErrHeader):
		return fmt.Errorf("%w: no valid tar header after %d entries: %w", ErrCorrupt, entries, err)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: tar is truncated after %d entries: %w", ErrCorrupt, entries, err)
	}
	return err
}

func (u *unpacker) entry(h *tar.Header, tr *tar.Reader) error {
	comps, err := tarPath(h.Name, u.limits.Depth)
	if err != nil {
		return err
	}
	a, err := headerAttrs(h, u.limits.XattrBytes)
	if err != nil {
		return err
	}
	if u.root.since == nil {
		u.root.since = a
	}
	if len(comps) == 0 {
		if h.Typeflag != tar.TypeDir {
			return fmt.Errorf("%w: the root of a layer must be a directory", ErrCorrupt)
		}
		u.root.attrs, u.root.implicit = a, false
		return nil
	}
	dirs, base := comps[:len(comps)-1], comps[len(comps)-1]
	if skip, err := checkMarkers(dirs); skip || err != nil {
		return err
	}
	mark, target := whiteout.ParseMarker(base)
	switch mark {
	case whiteout.MarkerMeta:
		return nil
	case whiteout.MarkerInvalid:
		return fmt.Errorf("%w: whiteout of an impossible name", ErrCorrupt)
	case whiteout.MarkerWhiteout:
		if len(target) == 0 || len(target) > 255 {
			return fmt.Errorf("%w: whiteout of an impossible name", ErrCorrupt)
		}
	}
	parent, err := u.root.walk(dirs, func(p *node, name string) (*node, error) { return u.mkdir(p, name, a) })
	if err != nil {
		return err
	}
	switch mark {
	case whiteout.MarkerWhiteout:
		if parent.whiteouts == nil {
			parent.whiteouts = map[string]struct{}{}
		}
		parent.whiteouts[target] = struct{}{}
		return nil
	case whiteout.MarkerOpaque:
		parent.opaque = true
		return nil
	}
	old := parent.children[base]
	if h.Typeflag == tar.TypeDir && old != nil && old.kind == kindDir {
		if !old.implicit {
			u.stats.duplicates = true
		}
		old.attrs, old.implicit = a, false
		return nil
	}
	dirfd, err := u.open(parent)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeLink {
		return u.link(parent, base, dirfd, h.Linkname)
	}
	if old != nil {
		if err := u.remove(old, dirfd); err != nil {
			return fmt.Errorf("replace an earlier entry: %w", err)
		}
		if dirfd, err = u.open(parent); err != nil {
			return err
		}
	}
	switch h.Typeflag {
	case tar.TypeReg, '\x00', tar.TypeCont, tar.TypeGNUSparse:
		return u.file(parent, base, dirfd, a, h, tr)
	case tar.TypeDir:
		n, err := u.mkdir(parent, base, a)
		if err == nil {
			n.attrs, n.implicit = a, false
		}
		return err
	case tar.TypeSymlink:
		return u.symlink(parent, base, dirfd, a, h.Linkname)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return u.special(parent, base, dirfd, a, h)
	}
	return fmt.Errorf("%w: tar entry type %q", ErrUnsupported, h.Typeflag)
}

// mkdir makes a directory that no entry has described yet.
func (u *unpacker) mkdir(parent *node, name string, since *attrs) (*node, error) {
	dirfd, err := u.open(parent)
	if err != nil {
		return nil, err
	}
	if err := fsat.Mkdir(dirfd, name, 0o700); err != nil {
		return nil, fmt.Errorf("mkdir: %w", err)
	}
	return parent.add(&node{name: name, kind: kindDir, payload: -1, children: map[string]*node{}, implicit: true, since: since}), nil
}

// open returns a descriptor of a directory of the stage. It is valid until the
// next call.
func (u *unpacker) open(n *node) (int, error) {
	if n.parent == nil {
		return u.diff, nil
	}
	if u.curNode == n {
		return u.curFd, nil
	}
	u.dropDir()
	fd, err := fsat.OpenBeneath(u.diff, n.path(), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1, fmt.Errorf("open directory %q of the stage: %w", n.path(), err)
	}
	u.curNode, u.curFd = n, fd
	return fd, nil
}

func (u *unpacker) dropDir() {
	fsat.Close(u.curFd)
	u.curNode, u.curFd = nil, -1
}

// remove takes an object away that a later entry replaces. Contents that the
// tar-split record refers to are moved aside.
func (u *unpacker) remove(n *node, dirfd int) error {
	u.stats.duplicates = true
	if err := u.sink.wait(); err != nil {
		return err
	}
	var displace func(*node) error
	displace = func(n *node) error {
		if n.payload >= 0 {
			if err := u.displace(n); err != nil {
				return err
			}
		}
		if n.kind == kindPending {
			u.pending--
		}
		for _, c := range n.children {
			if err := displace(c); err != nil {
				return err
			}
		}
		return nil
	}
	if err := displace(n); err != nil {
		return err
	}
	delete(n.parent.children, n.name)
	if n.kind == kindPending {
		return nil
	}
	if n.kind == kindDir {
		// The cached descriptor may lie below.
		fd, err := fsat.Reopen(dirfd, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer fsat.Close(fd)
		u.dropDir()
		if err := fsat.RemoveAll(fd, n.name); err != nil {
			return err
		}
		_, err = u.open(n.parent)
		return err
	}
	return fsat.Unlink(dirfd, n.name)
}

// displace keeps the content of a file that is about to go under dup/<position>.
func (u *unpacker) displace(n *node) error {
	if err := fsat.Mkdir(u.dir, dupName, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	dst := dupName + "/" + strconv.Itoa(n.payload)
	fd, err := fsat.OpenBeneath(u.diff, n.path(), unix.O_RDONLY|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	src := os.NewFile(uintptr(fd), n.path())
	defer src.Close()
	// A copy, not the inode: it may have other names that stay.
	dfd, err := unix.Openat(u.dir, dst, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	out := os.NewFile(uintptr(dfd), dst)
	_, err = io.Copy(out, src)
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if u.displaced == nil {
		u.displaced = map[int]bool{}
	}
	u.displaced[n.payload] = true
	return nil
}

func (u *unpacker) symlink(parent *node, base string, dirfd int, a *attrs, target string) error {
	if target == "" {
		return fmt.Errorf("%w: symbolic link to nothing", ErrCorrupt)
	}
	if err := fsat.Symlink(target, dirfd, base); err != nil {
		return fmt.Errorf("symlink: %w", err)
	}
	parent.add(&node{name: base, kind: kindSymlink, payload: -1, target: target, attrs: u.keep(a)})
	return u.applyName(dirfd, base, kindSymlink, a)
}

// applyName sets the attributes of a name.
func (u *unpacker) applyName(dirfd int, base string, k kind, a *attrs) error {
	complete, err := u.powers.apply(dirfd, base, k, a, nil)
	u.stats.incomplete = u.stats.incomplete || !complete
	return err
}

func (u *unpacker) special(parent *node, base string, dirfd int, a *attrs, h *tar.Header) error {
	typ, rdev := specialOf(h)
	if typ != unix.S_IFIFO && (h.Devmajor < 0 || h.Devminor < 0 || h.Devmajor >= 1<<12 || h.Devminor >= 1<<20) {
		return fmt.Errorf("%w: device number %d:%d is out of range", ErrCorrupt, h.Devmajor, h.Devminor)
	}
	if whiteout.IsDevice(typ, rdev) {
		return fmt.Errorf("%w: character device 0:0 is how overlay file systems write a whiteout; an image must not contain one", ErrUnsupported)
	}
	if err := u.powers.mknod(dirfd, base, typ, rdev); err != nil {
		return fmt.Errorf("make device or fifo: %w", err)
	}
	a.setType(typ, rdev)
	parent.add(&node{name: base, kind: kindNode, payload: -1, attrs: u.keep(a)})
	return u.applyName(dirfd, base, kindNode, a)
}

// link makes a hard link. The object's own entry has set its attributes.
func (u *unpacker) link(parent *node, base string, dirfd int, linkname string) error {
	comps, err := tarPath(linkname, u.limits.Depth)
	if err != nil {
		return fmt.Errorf("hard link target: %w", err)
	}
	if len(comps) == 0 {
		return fmt.Errorf("%w: hard link to the root directory", ErrCorrupt)
	}
	if skip, err := checkMarkers(comps); skip || err != nil {
		return fmt.Errorf("%w: hard link to the marker %q", ErrUnsupported, linkname)
	}
	dir, err := u.root.walk(comps[:len(comps)-1], nil)
	if err != nil {
		return fmt.Errorf("hard link target: %w", err)
	}
	last := comps[len(comps)-1]
	var target *node
	if dir != nil {
		target = dir.children[last]
	}
	old := parent.children[base]
	if old != nil && old == target {
		return nil // a link to itself
	}
	if old != nil {
		if err := u.remove(old, dirfd); err != nil {
			return fmt.Errorf("replace an earlier entry: %w", err)
		}
		if target != nil && target != dir.children[last] {
			return fmt.Errorf("%w: hard link to %q, which it replaces", ErrCorrupt, linkname)
		}
	}
	switch {
	case target == nil:
		// In a lower layer, or nowhere: known when the layer is bound.
		src := strings.Join(comps, "/")
		if dir != nil {
			src = childPath(dir, last)
		}
		u.pending++
		parent.add(&node{name: base, kind: kindPending, payload: -1, target: src})
		return nil
	case target.kind == kindDir:
		return fmt.Errorf("%w: hard link to the directory %q", ErrCorrupt, linkname)
	case target.kind == kindPending:
		u.pending++
		parent.add(&node{name: base, kind: kindPending, payload: -1, target: target.target})
		return nil
	}
	from, err := fsat.OpenBeneath(u.diff, dir.path(), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer fsat.Close(from)
	if dirfd, err = u.open(parent); err != nil {
		return err
	}
	if err := fsat.Link(from, last, dirfd, base); err != nil {
		return fmt.Errorf("hard link to %q: %w", linkname, err)
	}
	parent.add(&node{name: base, kind: target.kind, payload: -1, target: target.target, attrs: target.attrs})
	return nil
}
