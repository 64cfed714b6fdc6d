package layers

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// Export writes the merged tree of a container or image as a flat tar. Of a
// mounted container only after its server has been quiesced and synced.
func (s *Store) Export(ctx context.Context, nameOrRef string, w io.Writer) error {
	lease, err := s.newLease(ctx)
	if err != nil {
		return err
	}
	defer s.dropLease(lease)
	var dirs []LayerDir
	upper := false
	err = s.update(ctx, func(tx *metadata.Tx) error {
		c, err := findContainer(tx, nameOrRef)
		switch {
		case err == nil:
			st, err := s.containerStackTx(tx, c)
			if err != nil {
				return err
			}
			upper = true
			dirs = append([]LayerDir{{Path: st.Upper, Dialect: st.Dialect}}, st.Lowers...)
			return nil
		case !errors.Is(err, ErrNotFound):
			return err
		}
		r, err := resolve(tx, nameOrRef)
		if err != nil {
			return err
		}
		row, err := tx.Image(r.id)
		if err != nil {
			return err
		}
		if row.TopChain == "" {
			return nil
		}
		if dirs, err = s.stackTx(tx, row.TopChain); err != nil {
			return err
		}
		return tx.LeaseLayer(lease, row.TopChain)
	})
	if err != nil {
		return err
	}
	v, err := openView(dirs)
	if err != nil {
		return err
	}
	defer v.Close()
	t := newTreeWriter(ctx, w)
	root, err := v.root()
	if err != nil {
		return err
	}
	if root != nil {
		if err := v.walk(root, upper, func(n *vnode, fd int) error {
			return t.object(n.path, n.layer, fd, v.layers[n.layer].dialect)
		}); err != nil {
			return err
		}
	}
	return t.close()
}

// walk calls fn for every object of the union, parents first, siblings in
// order. checked says that layer 0 is an upper, in which a directory may point
// elsewhere.
func (v *view) walk(n *vnode, checked bool, fn func(*vnode, int) error) error {
	fd, err := v.open(n)
	if err == nil && checked && n.layer == 0 && n.isDir() {
		err = checkRedirect(fd, v.layers[0].dialect)
	}
	if err == nil {
		err = fn(n, fd)
	}
	fsat.Close(fd)
	if err != nil {
		return fmt.Errorf("%q: %w", "/"+n.path, err)
	}
	if !n.isDir() {
		return nil
	}
	names, err := v.list(n)
	if err != nil {
		return err
	}
	for _, c := range names {
		if err := v.walk(c, checked, fn); err != nil {
			return err
		}
	}
	return nil
}
