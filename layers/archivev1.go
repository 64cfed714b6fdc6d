package layers

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/plyfs/plyfs/layers/foreign"
)

// An archive as Docker before 1.10 wrote it. Each layer is an image, below the one
// that its document calls its parent:
//
//	ID/VERSION      1.0
//	ID/json         document of the image
//	ID/layer.tar    its layer
//	repositories    {NAME: {TAG: ID}}
//
// The IDs are random. An image gets a config made of its documents, by the rules of
// Docker 1.10, which gave such images the IDs that they have had since.

var v1Document = regexp.MustCompile(`^([0-9a-f]{64})/json$`)

// v1Plans finds the images that have a name, and those that no other image is
// made from.
func (a *archive) v1Plans(ctx context.Context, o LoadOptions) ([]*plan, error) {
	var repos map[string]map[string]string
	switch m, err := a.get(ctx, "repositories"); {
	case err == nil:
		if err := decodeJSON(m.json, a.s.limits.JSONDepth, &repos); err != nil {
			return nil, fmt.Errorf("repositories: %w", err)
		}
	case a.failed() != nil:
		return nil, a.failed()
	}
	v := &v1Archive{a: a, images: map[string]*v1Image{}}
	refs := map[string][]string{}
	for name, tags := range repos {
		for tag, id := range tags {
			refs[id] = append(refs[id], name+":"+tag)
		}
	}
	// A directory is read by the names that are known, a stream has been read.
	for _, id := range sortedNames(refs) {
		if _, err := v.image(ctx, id); err != nil {
			return nil, fmt.Errorf("image %q: %w", refs[id][0], err)
		}
	}
	for _, name := range sortedNames(a.members) {
		if m := v1Document.FindStringSubmatch(name); m != nil {
			if _, err := v.image(ctx, m[1]); err != nil {
				return nil, fmt.Errorf("image %s: %w", m[1], err)
			}
		}
	}
	inner := map[string]bool{}
	for _, img := range v.images {
		inner[img.parent] = true
	}
	var out []*plan
	for _, id := range sortedNames(v.images) {
		if inner[id] && len(refs[id]) == 0 {
			continue
		}
		names := refs[id]
		slices.Sort(names)
		if len(names) == 0 && o.Ref != "" {
			names = []string{o.Ref}
		}
		p, err := v.plan(id, names)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", id, err)
		}
		out = append(out, p)
	}
	return out, nil
}

// v1Archive is the images that have been looked at.
type v1Archive struct {
	a      *archive
	images map[string]*v1Image
}

type v1Image struct {
	parent   string // ID; empty: none
	document json.RawMessage
	layer    *layerData
}

// image looks at an image and all below it.
func (v *v1Archive) image(ctx context.Context, id string) (*v1Image, error) {
	first, err := v.one(ctx, id)
	if err != nil {
		return nil, err
	}
	depth := 1
	for at := first; at.parent != ""; depth++ {
		if depth >= v.a.s.limits.Layers {
			return nil, fmt.Errorf("%w: more than %d layers, or a circle of parents", ErrUnsupported, v.a.s.limits.Layers)
		}
		if at, err = v.one(ctx, at.parent); err != nil {
			return nil, fmt.Errorf("its ancestor: %w", err)
		}
	}
	return first, nil
}

func (v *v1Archive) one(ctx context.Context, id string) (*v1Image, error) {
	if img := v.images[id]; img != nil {
		return img, nil
	}
	if !v1Document.MatchString(id + "/json") {
		return nil, fmt.Errorf("%w: %q is not the ID of an image", ErrCorrupt, id)
	}
	doc, err := v.a.get(ctx, id+"/json")
	if err != nil {
		return nil, err
	}
	if doc.json == nil {
		return nil, fmt.Errorf("%q: %w: it is not JSON", doc.name, ErrCorrupt)
	}
	var d struct {
		ID     string `json:"id"`
		Parent string `json:"parent"`
	}
	if err := decodeJSON(doc.json, v.a.s.limits.JSONDepth, &d); err != nil {
		return nil, fmt.Errorf("%q: %w", doc.name, err)
	}
	if d.ID != "" && d.ID != id {
		return nil, fmt.Errorf("%q: %w: it is the document of %q", doc.name, ErrCorrupt, d.ID)
	}
	m, err := v.a.get(ctx, id+"/layer.tar")
	switch {
	case err != nil:
		return nil, err
	case m.err != nil:
		return nil, fmt.Errorf("%q: %w", m.name, m.err)
	case m.layer == nil:
		return nil, fmt.Errorf("%q: %w: it is JSON, not a layer", m.name, ErrCorrupt)
	}
	img := &v1Image{d.Parent, doc.json, m.layer}
	v.images[id] = img
	return img, nil
}

func (v *v1Archive) plan(id string, names []string) (p *plan, err error) {
	p = &plan{}
	if p.refs, err = canonicalRefs(names); err != nil {
		return nil, err
	}
	var steps []json.RawMessage
	var diffIDs []digest.Digest
	for at := v.images[id]; at != nil; at = v.images[at.parent] {
		steps = append(steps, at.document)
		diffIDs = append(diffIDs, at.layer.diffID)
		p.layers = append(p.layers, at.layer)
	}
	slices.Reverse(steps)
	slices.Reverse(diffIDs)
	slices.Reverse(p.layers)
	if p.config, err = foreign.ConfigFromSteps(steps, diffIDs, v.a.s.limits.JSONDepth); err != nil {
		return nil, mapForeign(err)
	}
	p.id = digest.FromBytes(p.config)
	p.spec, err = parseConfig(p.config, v.a.s.limits)
	return p, err
}

// isV1 reports whether an archive without a manifest is one of these.
func (a *archive) isV1(ctx context.Context) bool {
	if _, err := a.get(ctx, "repositories"); err == nil {
		return true
	}
	for name := range a.members {
		if v1Document.MatchString(name) {
			return true
		}
	}
	return false
}
