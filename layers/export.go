package layers

import (
	"context"
	"errors"
	"io"

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
	var st Stack
	err = s.update(ctx, func(tx *metadata.Tx) error {
		st = Stack{}
		c, err := findContainer(tx, nameOrRef)
		switch {
		case err == nil:
			st, err = s.containerStackTx(tx, c)
			return err
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
		if st.Lowers, err = s.stackTx(tx, row.TopChain); err != nil {
			return err
		}
		return tx.LeaseLayer(lease, row.TopChain)
	})
	if err != nil {
		return err
	}
	var v *view
	if st.Upper != "" {
		v, err = openUnion(ctx, st)
	} else {
		v, err = openView(ctx, st.Lowers)
	}
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
		if err := v.walk(root, func(n *vnode) error { return t.object(v, n) }); err != nil {
			return err
		}
	}
	return t.close()
}
