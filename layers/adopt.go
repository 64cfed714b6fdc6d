package layers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers/foreign"
	"github.com/plyfs/plyfs/metadata"
)

// Modes of adoption.
const (
	AdoptReference = "reference" // content stays in the other store
	AdoptCopy      = "copy"      // content is unpacked into this one, and verified
)

// AdoptOptions configure [Store.Adopt].
type AdoptOptions struct {
	Mode     string // "" is reference, and an error that names the other mode where that is not safe
	Verify   bool   // read the content of referenced layers and compare it with its digests
	DryRun   bool   // look only
	Progress ProgressFunc
}

// AdoptReport says what was taken over from another engine's store, or would be.
type AdoptReport struct {
	Path   string `json:"path"`
	Source string `json:"source"` // kind of store
	Mode   string `json:"mode"`
	DryRun bool   `json:"dryRun,omitempty"`

	Images     []AdoptedImage     `json:"images"`
	Containers []AdoptedContainer `json:"containers"`
	Referenced int                `json:"referenced"` // layers whose content stays where it is
	Copied     int                `json:"copied"`     // layers
	Present    int                `json:"present"`    // layers that the store had
	Skipped    []AdoptSkipped     `json:"skipped"`
	Warnings   []string           `json:"warnings,omitempty"`
}

// AdoptedImage is one image.
type AdoptedImage struct {
	// ID is empty in a dry run if only reading its layers can tell.
	ID      digest.Digest `json:"id,omitempty"`
	Source  string        `json:"source"` // its name in the other store
	Refs    []string      `json:"refs"`
	Layers  int           `json:"layers"`
	Present bool          `json:"present,omitempty"` // the store had it
}

// AdoptedContainer is one container. What it had written is a layer now, below a fresh
// writable one.
type AdoptedContainer struct {
	ID      string        `json:"id"`
	Name    string        `json:"name"`
	ImageID digest.Digest `json:"imageID,omitempty"`
	Present bool          `json:"present,omitempty"`
}

// AdoptSkipped is something that was left out.
type AdoptSkipped struct {
	Kind   string `json:"kind"` // image, container, reference, store
	Object string `json:"object"`
	Reason string `json:"reason"`
}

// Adopt takes over the images and containers of another engine's store, in which
// nothing is changed. What is damaged there is left out and reported; an error means
// that nothing could be taken over.
func (s *Store) Adopt(ctx context.Context, path string, o AdoptOptions) (*AdoptReport, error) {
	if o.Mode != "" && o.Mode != AdoptReference && o.Mode != AdoptCopy {
		return nil, fmt.Errorf("%w: mode %q: expected reference or copy", ErrInvalid, o.Mode)
	}
	src, err := foreign.Open(ctx, path, foreign.Limits{Config: s.limits.Config, JSONDepth: s.limits.JSONDepth, Layers: s.limits.Layers})
	if errors.Is(err, os.ErrNotExist) {
		err = sentinel{err, ErrNotFound}
	}
	if err != nil {
		return nil, mapForeign(err)
	}
	defer src.Close()
	if err := s.apart(src.Path); err != nil {
		return nil, err
	}
	a := &adopter{
		s: s, src: src, copy: o.Mode == AdoptCopy, verify: o.Verify, progress: &progress{fn: o.Progress},
		told: map[*foreign.Layer]digest.Digest{}, met: map[digest.Digest]bool{}, kept: map[digest.Digest]bool{}, broken: map[*foreign.Layer]error{},
		rep: &AdoptReport{
			Path: src.Path, Source: sourceName(src), Mode: AdoptReference, DryRun: o.DryRun,
			Images: []AdoptedImage{}, Containers: []AdoptedContainer{}, Skipped: []AdoptSkipped{},
		},
	}
	if a.copy {
		a.rep.Mode = AdoptCopy
	} else if err := a.mayRefer(); err != nil {
		return nil, fmt.Errorf("%q: %w", src.Path, err)
	}
	for _, p := range src.Problems {
		a.rep.Skipped = append(a.rep.Skipped, AdoptSkipped{p.Kind, p.Object, p.Reason})
	}
	for _, u := range src.Users {
		a.rep.Warnings = append(a.rep.Warnings, u+" has this store open: what it removes from it while and after it is adopted is gone here, too")
	}
	if o.DryRun {
		return a.rep, a.preview(ctx)
	}
	if err := s.sweep(ctx); err != nil {
		return nil, err
	}
	if a.lease, err = s.newLease(ctx); err != nil {
		return nil, err
	}
	defer s.dropLease(a.lease)
	if err := a.all(ctx); err != nil || !a.copy {
		return a.rep, err
	}
	return a.rep, a.settle(ctx)
}

// apart refuses a store that is this one, lies in it, or has it inside.
func (s *Store) apart(path string) error {
	root, err := filepath.EvalSymlinks(s.root)
	if err != nil {
		return err
	}
	if root == path || strings.HasPrefix(root, path+"/layers/") || strings.HasPrefix(path, root+"/") {
		return fmt.Errorf("%w: %q is this store, or lies in it", ErrInvalid, path)
	}
	return nil
}

// mayRefer finds out whether content can be used where it lies at all.
func (a *adopter) mayRefer() error {
	if !a.s.powers.privileged {
		return fmt.Errorf("%w: this store has no privileges, and the owners of other stores' files would not show: adopt with --copy", ErrUnsupported)
	}
	if _, err := guarded(a.src.Path); err != nil {
		return needCopy(err)
	}
	if len(a.src.Images) == 0 {
		return nil
	}
	for _, i := range a.src.Images {
		for _, l := range i.Layers {
			if l.Tree != nil && !l.Tree.Whole {
				return nil
			}
			if l.Tree != nil {
				return wholeTrees(a.src)
			}
		}
	}
	if a.src.Kind == foreign.KindRegistry {
		return fmt.Errorf("%w: a registry keeps layers as archives: adopt with --copy", ErrUnsupported)
	}
	return nil
}

// name is an image for messages.
func imageName(i *foreign.Image) string {
	if len(i.Refs) > 0 {
		return i.Refs[0]
	}
	return ShortID(digest.Digest(i.Key))
}

// skip notes what is left out. Errors of this machine end the work.
func (a *adopter) skip(ctx context.Context, kind, object string, err error) error {
	if fatal(ctx, err) {
		return err
	}
	if errors.Is(err, unix.EACCES) && os.Geteuid() != 0 {
		err = fmt.Errorf("%w: it belongs to another id of the store's owner; adopt in the owner's user namespace (podman unshare), or as root", err)
	}
	a.rep.Skipped = append(a.rep.Skipped, AdoptSkipped{kind, object, err.Error()})
	return nil
}

func (a *adopter) all(ctx context.Context) error {
	ids := map[string]digest.Digest{} // by Key
	var first error
	for _, i := range a.src.Images {
		id, err := a.image(ctx, i, ids)
		if err != nil {
			if first == nil {
				first = err
			}
			if err := a.skip(ctx, "image", imageName(i), err); err != nil {
				return fmt.Errorf("image %s: %w", imageName(i), err)
			}
			continue
		}
		ids[i.Key] = id
	}
	if first != nil && len(ids) == 0 {
		return fmt.Errorf("%q: none of its %d images could be adopted; the first: %w", a.src.Path, len(a.src.Images), first)
	}
	for _, c := range a.src.Containers {
		if err := a.container(ctx, c, ids); err != nil {
			if err := a.skip(ctx, "container", c.Name, err); err != nil {
				return fmt.Errorf("container %s: %w", c.Name, err)
			}
		}
	}
	return nil
}

// image takes over one image.
func (a *adopter) image(ctx context.Context, i *foreign.Image, ids map[string]digest.Digest) (digest.Digest, error) {
	c := chainer{s: a.s, lease: a.lease}
	defer c.discard()
	diffIDs := make([]digest.Digest, 0, len(i.Layers))
	for n, l := range i.Layers {
		d, err := a.layer(ctx, &c, l)
		if err != nil {
			return "", fmt.Errorf("layer %d (%s): %w", n+1, l.Name, err)
		}
		diffIDs = append(diffIDs, d)
	}
	if err := c.publish(ctx); err != nil {
		return "", err
	}
	var chain digest.Digest
	for _, d := range diffIDs {
		chain = metadata.ChainID(chain, d)
		a.kept[chain] = true
	}
	config := i.Config
	if config == nil {
		var err error
		if config, err = foreign.ConfigFromSteps(i.Steps, diffIDs, a.s.limits.JSONDepth); err != nil {
			return "", mapForeign(err)
		}
	}
	spec, err := parseConfig(config, a.s.limits)
	if err != nil {
		return "", err
	}
	id := digest.FromBytes(config)
	if i.ID != "" && i.ID != id || chainOf(spec.RootFS.DiffIDs) != c.top {
		return "", fmt.Errorf("%w: its config does not describe its layers", ErrCorrupt)
	}
	refs := a.references(i)
	now := time.Now().UTC()
	row := metadata.Image{
		ID: id, TopChain: c.top, Created: now, Parent: ids[i.Parent], Origin: "adopt",
		Platform: platformName(spec.OS, spec.Architecture, spec.Variant),
	}
	created := false
	err = a.s.update(ctx, func(tx *metadata.Tx) (err error) {
		if created, err = tx.AddImage(row, config); err != nil {
			return err
		}
		for _, r := range refs {
			if _, err := tx.SetRef(r, metadata.Ref{ImageID: id, Updated: now}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	a.rep.Images = append(a.rep.Images, AdoptedImage{ID: id, Source: i.Key, Refs: familiars(refs), Layers: len(i.Layers), Present: !created})
	return id, nil
}

// references are those of an image in our form.
func (a *adopter) references(i *foreign.Image) (out []string) {
	for _, text := range i.Refs {
		named, err := reference.ParseNormalizedNamed(text)
		if err != nil {
			a.rep.Skipped = append(a.rep.Skipped, AdoptSkipped{"reference", text, err.Error()})
			continue
		}
		if d, ok := named.(reference.Digested); ok {
			// With a tag beside it, too: the digest is what counts.
			if named, err = reference.WithDigest(reference.TrimNamed(named), d.Digest()); err != nil {
				a.rep.Skipped = append(a.rep.Skipped, AdoptSkipped{"reference", text, err.Error()})
				continue
			}
		} else {
			named = reference.TagNameOnly(named)
		}
		if r := named.String(); !contains(out, r) {
			out = append(out, r)
		}
	}
	return out
}

// preview says what would be taken over.
func (a *adopter) preview(ctx context.Context) error {
	return a.s.view(ctx, func(tx *metadata.Tx) error {
		seen := map[string]bool{}
		for _, i := range a.src.Images {
			out := AdoptedImage{ID: i.ID, Source: i.Key, Refs: familiars(a.references(i)), Layers: len(i.Layers)}
			if i.ID != "" {
				_, err := tx.Image(i.ID)
				out.Present = err == nil
			}
			a.rep.Images = append(a.rep.Images, out)
			var chain digest.Digest
			for _, l := range i.Layers {
				name := l.Name
				if l.DiffID != "" {
					chain = metadata.ChainID(chain, l.DiffID)
					name = chain.String()
				}
				switch {
				case seen[name]:
				case l.DiffID != "" && tx.HasLayer(chain):
					a.rep.Present++
				case a.copy:
					a.rep.Copied++
				default:
					a.rep.Referenced++
				}
				seen[name] = true
			}
		}
		for _, c := range a.src.Containers {
			_, err := tx.Container(c.ID)
			a.rep.Containers = append(a.rep.Containers, AdoptedContainer{ID: c.ID, Name: c.Name, Present: err == nil})
		}
		return nil
	})
}
