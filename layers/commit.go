package layers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/merge"
)

// Commit makes an image of a container's image and changes. An empty ref
// leaves it untagged. Of a mounted container only after its server has been
// quiesced and synced.
func (s *Store) Commit(ctx context.Context, container, ref string, o CommitOptions) (_ Image, err error) {
	changes, err := parseChanges(o.Changes)
	if err != nil {
		return Image{}, err
	}
	refs, err := optionalRef(ref)
	if err != nil {
		return Image{}, err
	}
	if err := s.sweep(ctx); err != nil {
		return Image{}, err
	}
	lease, err := s.newLease(ctx)
	if err != nil {
		return Image{}, err
	}
	defer s.dropLease(lease)
	var (
		row     metadata.Container
		st      Stack
		parent  []byte
		between []metadata.Layer // what an adopted container had written before
	)
	err = s.update(ctx, func(tx *metadata.Tx) error {
		if row, err = findContainer(tx, container); err != nil {
			return err
		}
		if st, err = s.containerStackTx(tx, row); err != nil {
			return err
		}
		if parent, err = tx.Config(row.ImageID); err != nil {
			return err
		}
		if between, err = layersBetween(tx, row); err != nil {
			return err
		}
		return tx.LeaseLayer(lease, row.Chain)
	})
	if err != nil {
		return Image{}, err
	}
	// Before the work: a change may not fit the image.
	if _, err := childConfig(parent, ocispec.History{}, "", changes); err != nil {
		return Image{}, err
	}
	p := &progress{fn: o.Progress}
	t := p.start(row.Name, "committing", 0)
	defer t.done()
	diffID, err := s.commitLayer(ctx, lease, row, st, t)
	if err != nil {
		return Image{}, fmt.Errorf("container %q: %w", row.Name, err)
	}
	for _, l := range between {
		h := ocispec.History{Created: &l.Created, CreatedBy: "plyfs adopt: container " + row.Name}
		if parent, err = childConfig(parent, h, l.DiffID, nil); err != nil {
			return Image{}, err
		}
	}
	now := time.Now().UTC()
	h := ocispec.History{Created: &now, CreatedBy: "plyfs commit " + row.Name, Author: o.Author, Comment: o.Message, EmptyLayer: diffID == ""}
	config, err := childConfig(parent, h, diffID, changes)
	if err != nil {
		return Image{}, err
	}
	return s.addMade(ctx, lease, config, refs, metadata.Image{Parent: row.ImageID, Origin: "commit"})
}

// layersBetween are the layers that a container has on top of its image, bottom first.
func layersBetween(tx *metadata.Tx, c metadata.Container) (out []metadata.Layer, err error) {
	img, err := tx.Image(c.ImageID)
	if err != nil {
		return nil, err
	}
	for chain := c.Top; chain != img.TopChain; {
		l, err := tx.Layer(chain)
		if err != nil {
			return nil, fmt.Errorf("container %q: %w", c.Name, err)
		}
		out = append([]metadata.Layer{l}, out...)
		chain = l.Parent
	}
	return out, nil
}

// addMade records an image made here and ends the lease.
func (s *Store) addMade(ctx context.Context, lease string, config []byte, refs []string, row metadata.Image) (img Image, err error) {
	spec, err := parseConfig(config, s.limits)
	if err != nil {
		return img, err
	}
	now := time.Now().UTC()
	row.ID, row.TopChain, row.Created, row.Built = digest.FromBytes(config), chainOf(spec.RootFS.DiffIDs), now, true
	row.Platform = platformName(spec.OS, spec.Architecture, spec.Variant)
	var junk []metadata.Trash
	err = s.update(ctx, func(tx *metadata.Tx) error {
		if _, err := tx.AddImage(row, config); err != nil {
			return err
		}
		for _, r := range refs {
			if _, err := tx.SetRef(r, metadata.Ref{ImageID: row.ID, Updated: now}); err != nil {
				return err
			}
		}
		if junk, err = endLease(tx, lease); err != nil {
			return err
		}
		img, _, _, err = image(tx, row.ID)
		return err
	})
	if err == nil {
		s.purge(ctx, junk)
	}
	return img, err
}

func optionalRef(ref string) ([]string, error) {
	if ref == "" {
		return nil, nil
	}
	return canonicalRefs([]string{ref})
}

// commitLayer makes a layer of the upper, on top of the image's layers: the
// init layer is left out, since the upper is a difference to it. An upper
// without changes gives none.
func (s *Store) commitLayer(ctx context.Context, lease string, c metadata.Container, st Stack, t *track) (digest.Digest, error) {
	empty := false
	stage, err := s.stageFrom(ctx, "commit", func(w io.Writer) (err error) {
		empty, err = writeUpper(ctx, io.MultiWriter(w, t), st)
		return err
	})
	if err != nil {
		return "", err
	}
	defer stage.discard()
	if empty {
		return "", nil
	}
	l, err := stage.commit(ctx, target{parent: c.Top, origin: "commit", lease: lease})
	return l.DiffID, err
}

// writeUpper writes an upper as a layer tar. What the upper only refers to is
// written out: the layer needs nothing that an image cannot say.
func writeUpper(ctx context.Context, w io.Writer, st Stack) (empty bool, err error) {
	c := committer{t: newTreeWriter(ctx, w)}
	if c.union, err = openUnion(ctx, st); err != nil {
		return false, err
	}
	defer c.union.Close()
	if c.lower, err = openView(ctx, st.Lowers); err != nil {
		return false, err
	}
	defer c.lower.Close()
	if c.links, err = c.union.otherLinks(ctx, true); err != nil {
		return false, err
	}
	root, err := c.union.root()
	if err != nil {
		return false, err
	}
	below, err := c.lower.root()
	if err != nil {
		return false, err
	}
	changed, err := c.rootChanged(root, below)
	if err != nil {
		return false, err
	}
	if err := c.dir(root, below, false); err != nil {
		return false, err
	}
	// The first entry is the root itself.
	return c.t.count == 1 && !changed, c.t.close()
}

// committer writes a layer that turns the lower layers into the union.
type committer struct {
	t            *treeWriter
	union, lower *view
	links        nameSet // to be written although the upper does not have them
}

// rootChanged compares everything of the roots but their times.
func (c *committer) rootChanged(root, below *vnode) (bool, error) {
	if below == nil {
		return false, nil
	}
	a, err := c.union.attrs(root)
	if err != nil {
		return false, err
	}
	b, err := c.lower.attrs(below)
	if err != nil {
		return false, err
	}
	a.mtime = b.mtime
	return a.String() != b.String(), nil
}

// dir writes one directory of the union: itself, what it deletes, what it
// holds. below is what the lower layers have in its place, nil if nothing or
// if an opaque directory above hides it. In a whole directory everything is
// written, whichever layer it is in, and nothing below is left to delete.
func (c *committer) dir(n, below *vnode, whole bool) error {
	fail := func(err error) error { return fmt.Errorf("%q: %w", "/"+n.path, err) }
	if err := c.t.object(c.union, n); err != nil {
		return fail(err)
	}
	names, gone, opaque := map[string]bool{}, map[string]bool{}, false
	if !whole && n.layer == 0 {
		var err error
		if opaque, err = c.union.isOpaque(n); err != nil {
			return fail(err)
		}
		opaque = opaque && n.path != ""
	}
	switch {
	case whole:
	case n.moved:
		whole, opaque = true, below != nil
	case n.layer == 0:
		l, err := c.union.layers[0].listing(n.at)
		if err != nil {
			return fail(err)
		}
		for _, e := range l.Entries {
			if e.Kind == merge.Whiteout {
				gone[e.Name] = true
			} else {
				names[e.Name] = true
			}
		}
	}
	if whole {
		list, err := c.union.list(n)
		if err != nil {
			return err
		}
		for _, child := range list {
			names[child.name] = true
		}
	}
	for name := range c.links[n.path] {
		names[name] = true
	}
	for _, name := range sortedNames(names) {
		if m, _ := whiteout.ParseMarker(name); m != whiteout.NotMarker {
			return fmt.Errorf("%q: %w: an image layer cannot hold a name that begins with %q: it would delete something", "/"+join(n.path, name), ErrUnsupported, whiteout.MarkerPrefix)
		}
	}
	if opaque {
		below = nil
		if err := c.t.marker(join(n.path, whiteout.OpaqueMarker)); err != nil {
			return fail(err)
		}
	} else {
		for _, name := range sortedNames(gone) {
			if err := c.t.marker(join(n.path, whiteout.MarkerPrefix+name)); err != nil {
				return fail(err)
			}
		}
	}
	for _, name := range sortedNames(names) {
		lower := below
		if gone[name] { // a marker beside the object
			lower = nil
		}
		if err := c.child(n, lower, name, whole); err != nil {
			return err
		}
	}
	return nil
}

func (c *committer) child(dir, lowerDir *vnode, name string, whole bool) error {
	n, err := c.union.child(dir, name)
	if err != nil {
		return err
	}
	if n == nil {
		return fmt.Errorf("%q: it was removed while it was read", "/"+join(dir.path, name))
	}
	if !n.isDir() {
		if err := c.t.object(c.union, n); err != nil {
			return fmt.Errorf("%q: %w", "/"+n.path, err)
		}
		return nil
	}
	var below *vnode
	if !whole && lowerDir != nil && lowerDir.isDir() {
		if below, err = c.lower.child(lowerDir, name); err != nil {
			return err
		}
	}
	return c.dir(n, below, whole)
}

// childConfig is a parent's config with one more step. What we do not know in
// it is kept.
func childConfig(parent []byte, h ocispec.History, diffID digest.Digest, changes []change) ([]byte, error) {
	var top map[string]json.RawMessage
	if err := json.Unmarshal(parent, &top); err != nil {
		return nil, fmt.Errorf("config of the parent image: %w: %w", ErrCorrupt, err)
	}
	var known struct {
		History []json.RawMessage          `json:"history"`
		RootFS  map[string]json.RawMessage `json:"rootfs"`
		Config  map[string]json.RawMessage `json:"config"`
	}
	if err := json.Unmarshal(parent, &known); err != nil {
		return nil, fmt.Errorf("config of the parent image: %w: %w", ErrCorrupt, err)
	}
	if known.RootFS == nil {
		known.RootFS = map[string]json.RawMessage{"type": json.RawMessage(`"layers"`)}
	}
	if known.Config == nil {
		known.Config = map[string]json.RawMessage{}
	}
	var diffIDs []digest.Digest
	if raw := known.RootFS["diff_ids"]; raw != nil {
		if err := json.Unmarshal(raw, &diffIDs); err != nil {
			return nil, fmt.Errorf("config of the parent image: %w: %w", ErrCorrupt, err)
		}
	}
	if diffIDs == nil {
		diffIDs = []digest.Digest{}
	}
	if diffID != "" {
		diffIDs = append(diffIDs, diffID)
	}
	var errs []error
	raw := func(v any) json.RawMessage {
		b, err := json.Marshal(v)
		errs = append(errs, err)
		return b
	}
	delete(known.Config, "OnBuild") // they are for the first image built on that one
	edit := configEditor{config: known.Config}
	for _, c := range changes {
		errs = append(errs, c.wrap(c.apply(&edit)))
	}
	known.RootFS["diff_ids"] = raw(diffIDs)
	known.History = append(known.History, raw(h))
	top["history"], top["rootfs"], top["config"], top["created"] = raw(known.History), raw(known.RootFS), raw(known.Config), raw(h.Created)
	// They describe the parent, or the container that it was made in.
	for _, k := range []string{"container", "container_config", "parent", "id", "author", "comment"} {
		delete(top, k)
	}
	if h.Author != "" {
		top["author"] = raw(h.Author)
	}
	out := raw(top)
	return out, errors.Join(errs...)
}
