package layers

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/go-digest"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/layers/foreign"
	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/whiteout/override"
)

// container takes over one container: what it has written becomes a layer of its own, on
// top of its image, and it gets a fresh writable layer.
func (a *adopter) container(ctx context.Context, fc *foreign.Container, ids map[string]digest.Digest) error {
	if fc.Running {
		return fmt.Errorf("%w: it is running; stop it first", ErrInUse)
	}
	if !containerName.MatchString(fc.Name) {
		return fmt.Errorf("%w: the name %q", ErrInvalid, fc.Name)
	}
	imageID := ids[fc.Image]
	var img Image
	var have metadata.Container
	present := false
	err := a.s.view(ctx, func(tx *metadata.Tx) (err error) {
		if have, err = tx.Container(fc.ID); err == nil {
			present, imageID = true, have.ImageID
			img, _, _, err = image(tx, imageID)
			return err
		}
		if id, taken := tx.ContainerByName(fc.Name); taken {
			return fmt.Errorf("%w: the name %q is that of the container %.12s here", ErrExists, fc.Name, id)
		}
		if imageID == "" {
			return fmt.Errorf("%w: its image %s was not adopted", ErrNotFound, ShortID(digest.Digest(fc.Image)))
		}
		img, _, _, err = image(tx, imageID)
		return err
	})
	if err != nil {
		return err
	}
	if present {
		lost, err := a.s.lost(ctx, have.Top)
		if err != nil {
			return err
		}
		if lost {
			if diffID, err := a.upper(ctx, fc, img.ChainID); err != nil {
				return err
			} else if metadata.ChainID(img.ChainID, diffID) != have.Top {
				return fmt.Errorf("%w: what it had written when it was adopted is gone, and it has written something else since", ErrCorrupt)
			}
		}
		a.rep.Containers = append(a.rep.Containers, AdoptedContainer{ID: fc.ID, Name: fc.Name, ImageID: imageID, Present: true})
		return nil
	}
	diffID, err := a.upper(ctx, fc, img.ChainID)
	if err != nil {
		return err
	}
	top := img.ChainID
	if diffID != "" {
		top = metadata.ChainID(top, diffID)
	}
	name := fc.ImageName
	if name == "" {
		name = ShortID(imageID)
	}
	made, err := a.s.createContainer(ctx, a.lease, img.ID, top, metadata.Container{ID: fc.ID, Name: fc.Name, ImageName: name})
	if err != nil {
		return err
	}
	a.rep.Containers = append(a.rep.Containers, AdoptedContainer{ID: made.ID, Name: made.Name, ImageID: made.ImageID})
	return nil
}

// upper makes a layer of the writable layer of a container, on top of a chain; "" if
// it holds nothing.
func (a *adopter) upper(ctx context.Context, fc *foreign.Container, top digest.Digest) (digest.Digest, error) {
	tree, err := a.src.OpenTree(fc.Upper)
	if err != nil {
		return "", mapForeign(fmt.Errorf("%s: %w", fc.Upper.Dir, err))
	}
	defer fsat.Close(tree)
	stack, err := a.s.stackOf(ctx, top)
	if err != nil {
		return "", err
	}
	write, empty, err := a.upperTar(ctx, fc, tree, stack)
	if err != nil {
		return "", err
	}
	c := chainer{s: a.s, lease: a.lease, top: top}
	defer c.discard()
	t := a.progress.start(fc.Name, "adopting", 0)
	defer t.done()
	refer := !a.copy && !fc.Upper.Whole
	var in inspection
	if refer {
		if in, err = a.inspect(ctx, fc.Upper, tree); err != nil {
			return "", err
		}
		// What it says is believed, as root has written it, but a layer cannot say it.
		refer = in.indirect == "" && !a.hasLinkIndex(fc.Upper) && !isOverridden(tree)
	}
	if refer {
		var diffID digest.Digest
		diffID, err = a.addReference(ctx, &c, fc.Upper, tree, in, "", "adopt", func(f *os.File) (recorded, error) {
			return a.record(ctx, tree, f, write)
		})
		if err != nil {
			return "", err
		}
		if *empty {
			a.rep.Referenced--
			return "", nil // the stage is thrown away
		}
		return diffID, c.publish(ctx)
	}
	st, err := a.s.stageFrom(ctx, "adopt", write)
	if err != nil {
		return "", err
	}
	diffID := st.u.stats.diffID
	if *empty {
		st.discard()
		return "", nil
	}
	if err := a.add(ctx, &c, fc.Name, st); err != nil {
		return "", err
	}
	return diffID, c.publish(ctx)
}

func (a *adopter) hasLinkIndex(t *foreign.Tree) bool {
	if t.Work == "" {
		return false
	}
	fd, err := a.src.OpenTree(&foreign.Tree{Dir: t.Work + "/index"})
	if err != nil {
		return false
	}
	defer fsat.Close(fd)
	names, err := namesIn(fd)
	return err != nil || len(names) > 0
}

// upperTar returns a function that writes the layer, and where it says that there was
// nothing to write.
func (a *adopter) upperTar(ctx context.Context, fc *foreign.Container, tree int, stack []LayerDir) (write func(io.Writer) error, empty *bool, err error) {
	empty = new(bool)
	var ids *foreign.IDs
	switch owners, err := a.src.Owners(); {
	case err != nil:
		return nil, nil, err
	case !owners.None():
		ids = &owners
	}
	if fc.Upper.Whole {
		return func(w io.Writer) (err error) {
			*empty, err = writeDifference(ctx, w, LayerDir{Path: a.src.Abs(fc.Base.Dir), ids: ids}, LayerDir{Path: a.src.Abs(fc.Upper.Dir), ids: ids})
			return err
		}, empty, nil
	}
	st := Stack{Upper: a.src.Abs(fc.Upper.Dir), Dialect: fc.Upper.Dialect, Lowers: stack, ids: ids}
	if isOverridden(tree) {
		st.Override = override.Containers
	}
	if a.hasLinkIndex(fc.Upper) {
		// Its names are those of the inodes that were copied up.
		if lowers := a.lowers(fc, ids); lowers != nil {
			st.Lowers = lowers
		}
	}
	if fc.Upper.Work != "" {
		if fd, err := a.src.OpenTree(&foreign.Tree{Dir: fc.Upper.Work}); err == nil {
			fsat.Close(fd)
			st.Work = a.src.Abs(fc.Upper.Work)
		}
	}
	return func(w io.Writer) (err error) {
		*empty, err = writeUpper(ctx, w, st)
		return err
	}, empty, nil
}

// lowers are the layers of a container's image where they lie in the other store,
// topmost first; nil if that does not keep layers.
func (a *adopter) lowers(fc *foreign.Container, ids *foreign.IDs) (out []LayerDir) {
	for _, i := range a.src.Images {
		if i.Key != fc.Image {
			continue
		}
		for n := len(i.Layers) - 1; n >= 0; n-- {
			t := i.Layers[n].Tree
			if t == nil || t.Whole {
				return nil
			}
			d := LayerDir{Path: a.src.Abs(t.Dir), Dialect: t.Dialect, ids: ids}
			if fd, err := a.src.OpenTree(t); err == nil {
				if isOverridden(fd) {
					d.Override = override.Containers
				}
				fsat.Close(fd)
			}
			out = append(out, d)
		}
	}
	return out
}

// isOverridden reports whether files of a directory say in an attribute what they are
// (podman's force_mask): its root does.
func isOverridden(tree int) bool {
	_, err := fsat.Getxattr(tree, "", override.Containers.Attr(), nil)
	return err == nil
}
