package layers

import (
	"archive/tar"
	"bytes"
	"context"
	"path"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/plyfs/plyfs/metadata"
)

// initEntries are what every container finds in its root, whatever the image
// has: the places where an engine mounts its own files and file systems.
var initEntries = []struct {
	path string
	typ  byte
	mode int64
	link string
}{
	{".dockerenv", tar.TypeReg, 0o755, ""},
	{"dev", tar.TypeDir, 0o755, ""},
	{"dev/console", tar.TypeReg, 0o755, ""},
	{"dev/pts", tar.TypeDir, 0o755, ""},
	{"dev/shm", tar.TypeDir, 0o755, ""},
	{"etc", tar.TypeDir, 0o755, ""},
	{"etc/hostname", tar.TypeReg, 0o755, ""},
	{"etc/hosts", tar.TypeReg, 0o755, ""},
	{"etc/mtab", tar.TypeSymlink, 0o777, "/proc/mounts"},
	{"etc/resolv.conf", tar.TypeReg, 0o755, ""},
	{"proc", tar.TypeDir, 0o755, ""},
	{"sys", tar.TypeDir, 0o755, ""},
}

// ensureInit makes sure of the init layer of a chain: a layer like any other
// on top of the image's, with those entries that the image does not have. What
// the image has stays as it is: a directory that only leads to an entry takes
// its attributes from the image, and an entry below a link goes where the link
// leads inside the image. It is shared by all containers of the image (and its
// directory by all images that lack the same), and it is not committed.
func (s *Store) ensureInit(ctx context.Context, lease string, top digest.Digest) (metadata.Layer, error) {
	raw, err := s.initTar(ctx, top)
	if err != nil {
		return metadata.Layer{}, err
	}
	if raw == nil { // the image has everything
		var l metadata.Layer
		err := s.view(ctx, func(tx *metadata.Tx) (err error) { l, err = tx.Layer(top); return err })
		l.CacheID = ""
		return l, err
	}
	var l metadata.Layer
	chain := metadata.ChainID(top, digest.FromBytes(raw))
	err = s.update(ctx, func(tx *metadata.Tx) (err error) {
		if !tx.HasLayer(chain) {
			return nil
		}
		have, err := tx.Layer(chain)
		if err != nil {
			return err
		}
		if c, err := tx.Cache(have.CacheID); err == nil && c.Broken != "" {
			return nil // made once more, in its place
		}
		l = have
		return tx.LeaseLayer(lease, chain)
	})
	if err != nil || l.ChainID != "" {
		return l, err
	}
	st, err := s.newStage(ctx, "init")
	if err != nil {
		return l, err
	}
	defer st.discard()
	if err := st.unpack(ctx, bytes.NewReader(raw)); err != nil {
		return l, err
	}
	if _, err = st.commit(ctx, target{parent: top, origin: "init", lease: lease}); err != nil {
		return l, err
	}
	err = s.view(ctx, func(tx *metadata.Tx) (err error) { l, err = tx.Layer(chain); return err })
	return l, err
}

// initTar is the init layer's tar: the same bytes for the same image tree, whoever
// asks. nil: there is nothing to add.
func (s *Store) initTar(ctx context.Context, top digest.Digest) ([]byte, error) {
	stack, err := s.stackOf(ctx, top)
	if err != nil {
		return nil, err
	}
	v, err := openView(ctx, stack)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	empty := true
	added := map[string]bool{}
	for _, e := range initEntries {
		at := e.path
		if dir := path.Dir(e.path); dir != "." && !added[dir] {
			parent, err := v.resolve(dir, true)
			if err != nil || parent == nil || !parent.isDir() {
				continue // the image wants it otherwise
			}
			at = join(parent.path, path.Base(e.path))
		}
		have, err := v.resolve(at, false)
		if err != nil {
			return nil, err
		}
		if have != nil {
			continue
		}
		h := &tar.Header{Name: at, Typeflag: e.typ, Mode: e.mode, Linkname: e.link, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
		if e.typ == tar.TypeDir {
			h.Name += "/"
		}
		if err := tw.WriteHeader(h); err != nil {
			return nil, err
		}
		added[at], empty = true, false
	}
	if empty && top != "" {
		return nil, nil
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}
