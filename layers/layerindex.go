package layers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata/chainindex"
)

// The index of a layer says what lstat(2), readlink(2) and listxattr(2) say
// about every object of its directory, so that nobody has to ask them. In a
// store without privileges it has the types, modes, owners and attributes of the
// tar, whatever the files are. It is written when the layer is made
// (treeindex.go), and made anew from the directory when it is missing or
// damaged (dirindex.go).

// indexID is the ID of a layer's index. In a store without privileges it is not
// that which older versions gave it: they had the files' owners in it where the tar
// says nothing, so theirs are made anew.
func indexID(cacheID string, privileged bool) string {
	if privileged {
		return cacheID
	}
	return cacheID + tarIndex
}

const tarIndex = " as in the tar"

// inodeOf is what the kernel says about an object.
func inodeOf(st *unix.Stat_t) chainindex.Inode {
	ts := func(t unix.Timespec) chainindex.Time { return chainindex.Time{Sec: t.Sec, Nsec: uint32(t.Nsec)} }
	n := chainindex.Inode{
		Mode: st.Mode, UID: st.Uid, GID: st.Gid, Nlink: uint32(st.Nlink), Size: uint64(st.Size), Ino: st.Ino, Blocks: uint64(st.Blocks),
		Mtime: ts(st.Mtim), Ctime: ts(st.Ctim), Atime: ts(st.Atim),
	}
	if t := st.Mode & unix.S_IFMT; t == unix.S_IFCHR || t == unix.S_IFBLK {
		n.Rdev = st.Rdev
	}
	return n
}

// userXattrs reads the extended attributes of an object as a mount shows them.
func userXattrs(dirfd int, name string, e encoding) (out []chainindex.Xattr, err error) {
	disk, err := fsat.Listxattr(dirfd, name)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	for _, n := range disk {
		user, visible := e.fromDisk(n)
		if !visible {
			continue
		}
		v, err := fsat.GetxattrValue(dirfd, name, n)
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EPERM) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read extended attribute %q: %w", n, err)
		}
		out = append(out, chainindex.Xattr{Name: user, Value: v})
	}
	return out, nil
}

func newLayerIndex(id, tempDir string) (*chainindex.Writer, error) {
	return chainindex.NewWriter(chainindex.WriterOptions{Kind: chainindex.KindLayer, ID: id, Layers: 1, TempDir: tempDir})
}

// readLayerIndex opens the index in a layer's directory. ErrCorrupt, ErrVersion
// and ErrFault of package chainindex, and fs.ErrNotExist, say that it has to be
// made anew.
func readLayerIndex(l layerFiles, id string) (*chainindex.Index, error) {
	fd, err := fsat.OpenRegular(l.dir, indexName, unix.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("open index: %w", err)
	}
	f := os.NewFile(uintptr(fd), indexName)
	x, err := chainindex.OpenFile(f)
	if cerr := f.Close(); err == nil && cerr != nil {
		err = errors.Join(cerr, x.Close())
	}
	if err != nil {
		return nil, err
	}
	if err := describes(x, l.diff, id); err != nil {
		return nil, errors.Join(err, x.Close())
	}
	return x, nil
}

var errChanged = errors.New("the layer was copied or changed after its index was written")

// describes checks that x is the index of the layer directory diff: not of
// another one, and not of one that this is a copy of, which has other inodes.
func describes(x *chainindex.Index, diff int, id string) error {
	if x.Kind() == chainindex.KindLayer && x.ID()+tarIndex == id {
		return fmt.Errorf("%w: an older version has written it, without all the owners of the tar", chainindex.ErrVersion)
	}
	if x.Kind() != chainindex.KindLayer || x.ID() != id {
		return fmt.Errorf("%w: it is the index of %v %q, expected layer %q", chainindex.ErrCorrupt, x.Kind(), x.ID(), id)
	}
	var st unix.Stat_t
	if err := fsat.Fstat(diff, &st); err != nil {
		return err
	}
	var root chainindex.Inode
	if err := x.Inode(chainindex.Root, &root); err != nil {
		return err
	}
	if have := inodeOf(&st); root.Ino != have.Ino || root.Ctime != have.Ctime {
		return fmt.Errorf("%w: %w", chainindex.ErrCorrupt, errChanged)
	}
	return nil
}

// layerIndex opens a layer's index. One that is missing or damaged is made
// anew; where it cannot be written, it is kept in memory.
func (s *Store) layerIndex(ctx context.Context, d LayerDir) (*chainindex.Index, error) {
	l, err := s.openFiles(d.CacheID)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	x, err := readLayerIndex(l, d.indexID())
	if err == nil {
		return x, nil
	}
	if !fsat.IsAbsent(err) {
		s.log.Warn("index of a layer is made anew", zap.String("layer", d.CacheID), zap.Error(err))
	}
	if err := s.rebuildIndex(ctx, l, d); err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		s.log.Warn("index of a layer is not kept", zap.String("layer", d.CacheID), zap.Error(err))
		return indexInMemory(ctx, l, d)
	}
	return readLayerIndex(l, d.indexID())
}

// rebuildIndex writes a layer's index from its directory.
func (s *Store) rebuildIndex(ctx context.Context, l layerFiles, d LayerDir) error {
	dir := filepath.Join(s.root, layersName, d.CacheID)
	w, err := newLayerIndex(d.indexID(), dir)
	if err != nil {
		return err
	}
	defer w.Discard()
	if err := indexDirectory(ctx, l, d, w); err != nil {
		return fmt.Errorf("index layer %s: %w", d.CacheID, err)
	}
	return w.Commit(filepath.Join(dir, indexName))
}

func indexInMemory(ctx context.Context, l layerFiles, d LayerDir) (*chainindex.Index, error) {
	w, err := newLayerIndex(d.indexID(), "")
	if err != nil {
		return nil, err
	}
	defer w.Discard()
	if err := indexDirectory(ctx, l, d, w); err != nil {
		return nil, fmt.Errorf("index layer %s: %w", d.CacheID, err)
	}
	var buf bytes.Buffer
	if _, err := w.WriteTo(&buf); err != nil {
		return nil, err
	}
	return chainindex.New(buf.Bytes())
}
