package layers

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/plyfs/plyfs/metadata"
)

// RemoveImage removes a reference and, with the last one, the image and every
// layer nothing else needs. Everything is decided in one transaction; the
// files are deleted after it.
func (s *Store) RemoveImage(ctx context.Context, nameOrID string, o RemoveOptions) ([]RemoveAction, error) {
	dead, err := s.deadMounts(ctx)
	if err != nil {
		return nil, err
	}
	var r remover
	err = s.updateFreeing(ctx, func(tx *metadata.Tx) error {
		r = remover{tx: tx, opts: o, dead: dead}
		return r.remove(nameOrID)
	})
	if err != nil {
		return nil, err
	}
	s.purge(ctx, r.junk)
	return r.actions, nil
}

type remover struct {
	tx      *metadata.Tx
	opts    RemoveOptions
	dead    map[string]bool // mounts whose process is gone
	actions []RemoveAction
	junk    []metadata.Trash
}

func (r *remover) remove(name string) error {
	img, err := resolve(r.tx, name)
	if err != nil {
		return err
	}
	refs := r.tx.RefsOf(img.id)
	if img.ref == "" {
		// By ID: its name goes, with the digests that registries know it by. Several
		// names are somebody's work each, as is what was made from the image.
		if kids := r.tx.ImageChildren(img.id); len(kids) > 0 {
			return fmt.Errorf("image %s: %w: the images %s were made from it", name, ErrInUse, r.names(kids))
		}
		if len(refs) > 0 && !isSingle(refs) && !r.opts.Force {
			return fmt.Errorf("image %s: %w: it has the names %s; remove them one by one, or use --force",
				ShortID(img.id), ErrInUse, strings.Join(familiars(refs), ", "))
		}
		if err := r.conflicts(img.id, name); err != nil {
			return err
		}
		for _, ref := range refs {
			if err := r.untag(ref); err != nil {
				return err
			}
		}
		return r.deleteImage(img.id)
	}
	also := goneWith(refs, img.ref)
	if last := len(refs) == 1+len(also); last {
		if users := r.tx.ContainersByImage(img.id); len(users) > 0 {
			if !r.opts.Force {
				return r.containerConflict(familiar(img.ref), users)
			}
			// Forced: the name goes, the image stays for the container.
			return r.untag(img.ref)
		}
		if err := r.conflicts(img.id, name); err != nil {
			return err
		}
	}
	if err := r.untag(img.ref); err != nil {
		return err
	}
	for _, ref := range also {
		if err := r.untag(ref); err != nil {
			return err
		}
	}
	if rest := r.tx.RefsOf(img.id); len(rest) > 0 {
		return nil
	}
	// Images were committed from it: they keep it, nameless.
	if len(r.tx.ImageChildren(img.id)) > 0 {
		return nil
	}
	return r.deleteImage(img.id)
}

func (r *remover) untag(ref string) error {
	if err := r.tx.DeleteRef(ref); err != nil {
		return err
	}
	r.actions = append(r.actions, RemoveAction{"Untagged", familiar(ref)})
	return nil
}

// conflicts names what forbids deleting an image. Mounts forbid it for good,
// containers too: their lower layers are the image.
func (r *remover) conflicts(id digest.Digest, name string) error {
	if users := r.tx.ContainersByImage(id); len(users) > 0 {
		return r.containerConflict(name, users)
	}
	live, err := r.tx.LiveMounts()
	if err != nil {
		return err
	}
	row, err := r.tx.Image(id)
	if err != nil {
		return err
	}
	for _, l := range live {
		if l.ImageID != id && (l.ChainID == "" || l.ChainID != row.TopChain) {
			continue
		}
		if !r.dead[liveKey(l)] {
			return fmt.Errorf("image %s: %w: it is mounted on %s; unmount it first", name, ErrInUse, l.Target)
		}
		if err := r.tx.DeleteLive(l.BootID, l.Target); err != nil {
			return err
		}
	}
	return nil
}

func (r *remover) containerConflict(name string, ids []string) error {
	var names []string
	for _, id := range ids {
		c, err := r.tx.Container(id)
		if err != nil {
			return err
		}
		names = append(names, c.Name)
	}
	sort.Strings(names)
	return fmt.Errorf("image %s: %w: used by the container(s) %s; remove them first", name, ErrInUse, strings.Join(names, ", "))
}

func (r *remover) names(ids []digest.Digest) string {
	var out []string
	for _, id := range ids {
		if refs := r.tx.RefsOf(id); len(refs) > 0 {
			out = append(out, familiar(refs[0]))
		} else {
			out = append(out, ShortID(id))
		}
	}
	return strings.Join(out, ", ")
}

// deleteImage deletes an image without names, its layers as far as nothing
// else needs them, and then its parents that have no name either.
func (r *remover) deleteImage(id digest.Digest) error {
	row, err := r.tx.Image(id)
	if err != nil {
		return err
	}
	if kids := r.tx.ImageChildren(id); len(kids) > 0 {
		return nil
	}
	if err := r.tx.DeleteImage(id); err != nil {
		return err
	}
	r.actions = append(r.actions, RemoveAction{"Deleted", id.String()})
	junk, err := releaseChain(r.tx, row.TopChain, func(l metadata.Layer) {
		r.actions = append(r.actions, RemoveAction{"Deleted", l.ChainID.String()})
	})
	if err != nil {
		return err
	}
	r.junk = append(r.junk, junk...)
	if row.Parent == "" || r.opts.NoPrune {
		return nil
	}
	if _, err := r.tx.Image(row.Parent); errors.Is(err, metadata.ErrNotFound) {
		return nil
	}
	if len(r.tx.RefsOf(row.Parent)) > 0 || len(r.tx.ContainersByImage(row.Parent)) > 0 {
		return nil
	}
	return r.deleteImage(row.Parent)
}

// isSingle reports whether references are of one repository, with one tag at most.
func isSingle(refs []string) bool {
	repos, tags := map[string]bool{}, 0
	for _, r := range refs {
		repo, tag := splitRef(r)
		repos[repo] = true
		if tag != noTag {
			tags++
		}
	}
	return len(repos) == 1 && tags <= 1
}

// onlyDigests reports whether all references but one are digests.
func onlyDigests(refs []string, but string) bool {
	for _, r := range refs {
		if r == but {
			continue
		}
		named, err := reference.ParseNormalizedNamed(r)
		if err != nil {
			return false
		}
		if _, ok := named.(reference.Digested); !ok {
			return false
		}
	}
	return true
}

// goneWith are the references that go with ref: with the last tag of a repository,
// its digests.
func goneWith(refs []string, ref string) (out []string) {
	repo, tag := splitRef(ref)
	for _, r := range refs {
		switch other, t := splitRef(r); {
		case other != repo || r == ref:
		case tag == noTag || t != noTag:
			return nil
		default:
			out = append(out, r)
		}
	}
	return out
}
