package layers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"sort"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/plyfs/plyfs/metadata"
)

var hexPrefix = regexp.MustCompile(`^(sha256:)?[0-9a-f]{1,64}$`)

// resolved is what a user's name for an image leads to.
type resolved struct {
	id  digest.Digest
	ref string // canonical, if the name was a reference
}

// resolve finds an image by full ID, reference, or unique ID prefix, in this
// order.
func resolve(tx *metadata.Tx, name string) (resolved, error) {
	id := digest.Digest(name)
	if len(name) == 64 {
		id = digest.NewDigestFromEncoded(digest.SHA256, name)
	}
	if id.Validate() == nil {
		if _, err := tx.Image(id); err == nil {
			return resolved{id: id}, nil
		}
	}
	named, err := reference.ParseNormalizedNamed(name)
	if err == nil {
		ref := reference.TagNameOnly(named).String()
		if d, ok := named.(reference.Digested); ok { // which decides, whatever the tag
			ref = reference.TrimNamed(named).String() + "@" + d.Digest().String()
		}
		if r, err := tx.Ref(ref); err == nil {
			return resolved{r.ImageID, ref}, nil
		}
	}
	if hexPrefix.MatchString(name) {
		switch ids := tx.ImagePrefix(name); {
		case len(ids) == 1:
			return resolved{id: ids[0]}, nil
		case len(ids) > 1:
			return resolved{}, fmt.Errorf("%w: image ID %q is ambiguous: it is the beginning of %s", ErrInvalid, name, shortList(ids))
		}
	} else if err != nil {
		return resolved{}, fmt.Errorf("%w: %q is neither an image name nor an ID: %w", ErrInvalid, name, err)
	}
	return resolved{}, fmt.Errorf("image %q: %w; see images for what there is", name, ErrNotFound)
}

func shortList(ids []digest.Digest) string {
	var out []string
	for _, id := range ids {
		out = append(out, ShortID(id))
	}
	return strings.Join(out, ", ")
}

// ShortID is the 12-digit form of an ID.
func ShortID(d digest.Digest) string {
	_, hex, ok := strings.Cut(d.String(), ":")
	if !ok || len(hex) < 12 {
		return d.String()
	}
	return hex[:12]
}

// image reads an image with its config.
func image(tx *metadata.Tx, id digest.Digest) (Image, []byte, metadata.Image, error) {
	row, err := tx.Image(id)
	if err != nil {
		return Image{}, nil, row, err
	}
	raw, err := tx.Config(id)
	if err != nil {
		return Image{}, nil, row, err
	}
	var spec ocispec.Image
	if err := json.Unmarshal(raw, &spec); err != nil {
		return Image{}, nil, row, fmt.Errorf("config of image %s: %w: %w", id, ErrCorrupt, err)
	}
	img := Image{
		ID: id, Refs: familiars(tx.RefsOf(id)), Parent: row.Parent, Platform: row.Platform,
		DiffIDs: spec.RootFS.DiffIDs, ChainID: row.TopChain, Config: spec,
	}
	if spec.Created != nil {
		img.Created = *spec.Created
	}
	return img, raw, row, nil
}

// ResolveImage finds an image by reference, ID or unique ID prefix.
func (s *Store) ResolveImage(ctx context.Context, nameOrID string) (img Image, err error) {
	err = s.view(ctx, func(tx *metadata.Tx) error {
		r, err := resolve(tx, nameOrID)
		if err == nil {
			img, _, _, err = image(tx, r.id)
		}
		return err
	})
	return img, err
}

// Tag gives an image one more name. A name that another image has moves over.
func (s *Store) Tag(ctx context.Context, source, target string) error {
	named, err := parseTag(target)
	if err != nil {
		return err
	}
	return s.update(ctx, func(tx *metadata.Tx) error {
		r, err := resolve(tx, source)
		if err != nil {
			return err
		}
		_, err = tx.SetRef(named.String(), metadata.Ref{ImageID: r.id, Updated: time.Now().UTC()})
		return err
	})
}

// sums are sizes over chains, computed once per listing from the index of layers.
type sums struct {
	briefs map[digest.Digest]metadata.Brief
	users  map[digest.Digest]int // images that have the layer
	memo   map[digest.Digest]sum
}

// sum is about a layer and all below it.
type sum struct {
	size   int64
	shared int64 // of which in several images
	whole  bool  // all layers have rows
}

func newSums(tx *metadata.Tx, images []metadata.Image) *sums {
	z := &sums{briefs: tx.Briefs(), users: map[digest.Digest]int{}, memo: map[digest.Digest]sum{}}
	for _, i := range images {
		// More than two do not matter, so no layer is visited more than twice.
		for c := i.TopChain; c != "" && z.users[c] < 2; {
			z.users[c]++
			c = z.briefs[c].Parent
		}
	}
	return z
}

// of returns the sum of a chain.
func (z *sums) of(top digest.Digest) sum {
	var todo []digest.Digest
	s := sum{whole: true}
	for c := top; c != ""; {
		if have, ok := z.memo[c]; ok {
			s = have
			break
		}
		b, ok := z.briefs[c]
		if !ok || len(todo) > len(z.briefs) {
			s.whole = false
			break
		}
		todo = append(todo, c)
		c = b.Parent
	}
	for i := len(todo) - 1; i >= 0; i-- {
		c := todo[i]
		s.size += z.briefs[c].Size
		if z.users[c] > 1 {
			s.shared += z.briefs[c].Size
		}
		z.memo[c] = s
	}
	return s
}

// Images lists images, newest first. name is "", a repository, a
// repository:tag or a pattern of them.
func (s *Store) Images(ctx context.Context, name string) ([]ImageSummary, error) {
	return s.ListImages(ctx, ImagesOptions{Name: name})
}

// ListImages lists the images that were asked for, newest first, with a line for each
// name.
func (s *Store) ListImages(ctx context.Context, o ImagesOptions) (out []ImageSummary, err error) {
	filter, err := newImageFilter(o)
	if err != nil {
		return nil, err
	}
	err = s.view(ctx, func(tx *metadata.Tx) error {
		out = nil
		rows, err := tx.Images()
		if err != nil {
			return err
		}
		if err := filter.times(tx); err != nil {
			return err
		}
		z := newSums(tx, rows)
		for _, r := range rows {
			refs := tx.RefsOf(r.ID)
			if ok, err := filter.image(tx, r, refs); err != nil {
				return err
			} else if !ok {
				continue
			}
			size := z.of(r.TopChain)
			sum := ImageSummary{
				ID: r.ID, Created: r.Made, Layers: r.Layers, Repository: "<none>", Tag: "<none>",
				Containers: len(tx.ContainersByImage(r.ID)),
				Size:       size.size, SharedSize: size.shared, UniqueSize: size.size - size.shared, Broken: !size.whole,
			}
			// An untagged parent of a tagged image is a step, not a result.
			if len(refs) == 0 && filter.nameless() && (filter.steps() || len(tx.ImageChildren(r.ID)) == 0) {
				out = append(out, sum)
			}
			tagged, digests := splitRefs(refs)
			for _, ref := range refs {
				one := sum
				one.Repository, one.Tag = splitRef(ref)
				if one.Tag == noTag && tagged[one.Repository] {
					continue // a digest of what has a line
				}
				if one.Digests = digests[one.Repository]; one.Tag == noTag {
					one.Digests = digestOf(ref)
				}
				if filter.matches(one) {
					out = append(out, one)
				}
			}
		}
		return nil
	})
	sort.SliceStable(out, func(i, j int) bool {
		a, b := out[i], out[j]
		if !a.Created.Equal(b.Created) {
			return a.Created.After(b.Created)
		}
		return a.Repository+":"+a.Tag < b.Repository+":"+b.Tag
	})
	return out, err
}

// splitRefs tells for each repository whether a reference has a tag, and which have
// digests.
func splitRefs(refs []string) (tagged map[string]bool, digests map[string][]digest.Digest) {
	tagged, digests = map[string]bool{}, map[string][]digest.Digest{}
	for _, r := range refs {
		repo, tag := splitRef(r)
		tagged[repo] = tagged[repo] || tag != noTag
		digests[repo] = append(digests[repo], digestOf(r)...)
	}
	return tagged, digests
}

// digestOf is the digest of a reference that has one.
func digestOf(ref string) []digest.Digest {
	named, err := reference.ParseNormalizedNamed(ref)
	if d, ok := named.(reference.Digested); err == nil && ok {
		return []digest.Digest{d.Digest()}
	}
	return nil
}

// noTag stands for a name without a tag.
const noTag = "<none>"

// splitRef gives the familiar repository and tag.
func splitRef(canonical string) (repo, tag string) {
	named, err := reference.ParseNormalizedNamed(canonical)
	if err != nil {
		return canonical, "<none>"
	}
	repo, tag = reference.FamiliarName(named), noTag
	if t, ok := named.(reference.Tagged); ok {
		tag = t.Tag()
	}
	return repo, tag
}

// History lists the steps that made an image, newest first.
func (s *Store) History(ctx context.Context, nameOrID string) (out []HistoryEntry, err error) {
	err = s.view(ctx, func(tx *metadata.Tx) error {
		r, err := resolve(tx, nameOrID)
		if err != nil {
			return err
		}
		img, _, _, err := image(tx, r.id)
		if err != nil {
			return err
		}
		out, err = history(tx, img)
		return err
	})
	return out, err
}

func history(tx *metadata.Tx, img Image) ([]HistoryEntry, error) {
	var out []HistoryEntry // oldest first
	var chain digest.Digest
	next := 0
	layer := func(e *HistoryEntry) error {
		e.DiffID = img.DiffIDs[next]
		chain = metadata.ChainID(chain, e.DiffID)
		e.ChainID = chain
		next++
		l, err := tx.Layer(chain)
		if err != nil {
			return err
		}
		c, err := tx.Cache(l.CacheID)
		e.Size = c.Apparent
		return err
	}
	for _, h := range img.Config.History {
		e := HistoryEntry{ID: "<missing>", CreatedBy: h.CreatedBy, Author: h.Author, Comment: h.Comment, Empty: h.EmptyLayer}
		if h.Created != nil {
			e.Created = *h.Created
		}
		if !h.EmptyLayer && next < len(img.DiffIDs) {
			if err := layer(&e); err != nil {
				return nil, err
			}
		}
		out = append(out, e)
	}
	// A config may tell less than it has layers.
	for next < len(img.DiffIDs) {
		e := HistoryEntry{ID: "<missing>"}
		if err := layer(&e); err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	for i, j := 0, len(out)-1; i < j; i, j = i+1, j-1 {
		out[i], out[j] = out[j], out[i]
	}
	if len(out) > 0 {
		out[0].ID, out[0].Tags = img.ID.String(), img.Refs
	}
	// The images this one was committed from stand for their last step.
	at := 0
	for id := img.Parent; id != ""; {
		p, _, row, err := image(tx, id)
		if err != nil {
			if errors.Is(err, metadata.ErrNotFound) {
				break
			}
			return nil, err
		}
		if at = len(out) - len(p.Config.History); at > 0 && at < len(out) {
			out[at].ID, out[at].Tags = id.String(), p.Refs
		}
		id = row.Parent
	}
	return out, nil
}

// Inspect returns everything known of an image.
func (s *Store) Inspect(ctx context.Context, nameOrID string) (*ImageDetail, error) {
	var d *ImageDetail
	err := s.view(ctx, func(tx *metadata.Tx) error {
		r, err := resolve(tx, nameOrID)
		if err != nil {
			return err
		}
		img, raw, row, err := image(tx, r.id)
		if err != nil {
			return err
		}
		d = &ImageDetail{Image: img, RawConfig: raw, Origin: row.Origin, Manifests: tx.Manifests(r.id)}
		if d.LayerDetails, err = s.layerInfos(tx, row.TopChain); err != nil {
			return err
		}
		for _, l := range d.LayerDetails {
			d.Size += l.Size
		}
		for _, id := range tx.ContainersByImage(r.id) {
			c, err := tx.Container(id)
			if err != nil {
				return err
			}
			d.Containers = append(d.Containers, c.Name)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return d, nil
}

// Layers lists the layers of an image, bottom first, or of the whole store for "".
func (s *Store) Layers(ctx context.Context, nameOrID string) (out []LayerInfo, err error) {
	err = s.view(ctx, func(tx *metadata.Tx) error {
		out = nil
		if nameOrID != "" {
			r, err := resolve(tx, nameOrID)
			if err != nil {
				return err
			}
			row, err := tx.Image(r.id)
			if err == nil {
				out, err = s.layerInfos(tx, row.TopChain)
			}
			return err
		}
		rows, err := tx.Layers()
		if err != nil {
			return err
		}
		for _, l := range rows {
			info, err := s.layerInfo(tx, l)
			if err != nil {
				return err
			}
			out = append(out, info)
		}
		return nil
	})
	return out, err
}

func (s *Store) layerInfos(tx *metadata.Tx, top digest.Digest) ([]LayerInfo, error) {
	rows, err := tx.Chain(top)
	if err != nil {
		return nil, err
	}
	out := make([]LayerInfo, len(rows))
	for i, l := range rows {
		if out[len(rows)-1-i], err = s.layerInfo(tx, l); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (s *Store) layerInfo(tx *metadata.Tx, l metadata.Layer) (LayerInfo, error) {
	c, err := tx.Cache(l.CacheID)
	if err != nil {
		return LayerInfo{}, err
	}
	d, err := s.layerDir(c)
	if err != nil {
		return LayerInfo{}, err
	}
	info := LayerInfo{
		DiffID: l.DiffID, ChainID: l.ChainID, Parent: l.Parent, CacheID: l.CacheID, Path: d.Path, Dialect: d.Dialect,
		Size: c.Apparent, Allocated: c.Allocated, Inodes: c.Inodes, TarSize: c.TarSize, Exact: c.SplitSize > 0, Created: l.Created,
	}
	if c.Adopted != nil {
		info.Adopted = c.Adopted.Source
	}
	return info, nil
}

// ImageStack returns the directories of a read-only mount of an image.
func (s *Store) ImageStack(ctx context.Context, nameOrID string) (st Stack, err error) {
	err = s.view(ctx, func(tx *metadata.Tx) error {
		r, err := resolve(tx, nameOrID)
		if err != nil {
			return err
		}
		row, err := tx.Image(r.id)
		if err != nil {
			return err
		}
		st = Stack{Dialect: s.powers.dialect, Override: upperOverride(s.powers.dialect), ChainID: row.TopChain}
		st.Lowers, err = s.stackTx(tx, row.TopChain)
		return err
	})
	if err == nil {
		err = checkAdopted(st.Lowers)
	}
	return st, err
}
