package layers

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/plyfs/plyfs/metadata"
)

// BuildStep is what a builder knows before it runs a step.
//
// The rule is that of Docker's first builder: a step has been done before if an
// image was made of the same parent by a step with the same configuration, in
// which Cmd is the command of the step (for a copy a text with the digest of what
// is copied, see [CopyDigest]). Nothing else is looked at: what a command gets
// from the network is not.
type BuildStep struct {
	Parent   string          `json:"parent,omitempty"`   // image; empty: nothing (FROM scratch)
	Config   json.RawMessage `json:"config"`             // of the container that the step runs in
	Platform string          `json:"platform,omitempty"` // "" = this machine
	// From names images that may have come from elsewhere and hold the step. They are
	// searched by their histories if the store does not know the step itself.
	From []string `json:"from,omitempty"`
}

// stepConfig is what of a configuration makes steps different. Names and
// addresses of the container do not. The order within lists counts.
type stepConfig struct {
	Env          []string            `json:",omitempty"`
	Cmd          []string            `json:",omitempty"`
	Entrypoint   []string            `json:",omitempty"`
	Shell        []string            `json:",omitempty"`
	OnBuild      []string            `json:",omitempty"`
	ExposedPorts map[string]struct{} `json:",omitempty"`
	Volumes      map[string]struct{} `json:",omitempty"`
	Labels       map[string]string   `json:",omitempty"`
	User         string              `json:",omitempty"`
	WorkingDir   string              `json:",omitempty"`
	StopSignal   string              `json:",omitempty"`
	StopTimeout  *int                `json:",omitempty"`
	Healthcheck  json.RawMessage     `json:",omitempty"`
	Tty          bool                `json:",omitempty"`
	OpenStdin    bool                `json:",omitempty"`
	StdinOnce    bool                `json:",omitempty"`
	AttachStdin  bool                `json:",omitempty"`
	AttachStdout bool                `json:",omitempty"`
	AttachStderr bool                `json:",omitempty"`
}

// parse reads the configuration, and hashes what counts of the step.
func (b BuildStep) parse(l Limits) (c stepConfig, hash string, err error) {
	if int64(len(b.Config)) > l.Config {
		return c, "", fmt.Errorf("%w: config of %d bytes, the limit is %d", ErrInvalid, len(b.Config), l.Config)
	}
	if err := decodeJSON(b.Config, l.JSONDepth, &c); err != nil {
		return c, "", fmt.Errorf("%w: config of the step: %s", ErrInvalid, err.Error()) // what is corrupt is an argument
	}
	if len(c.Healthcheck) > 0 { // in one spelling
		var v any
		if err := json.Unmarshal(c.Healthcheck, &v); err != nil {
			return c, "", fmt.Errorf("%w: config of the step: %s", ErrInvalid, err.Error()) // what is corrupt is an argument
		}
		if c.Healthcheck, err = json.Marshal(v); err != nil {
			return c, "", err
		}
	}
	platform, err := parsePlatform(cmp.Or(b.Platform, thisPlatform()))
	if err != nil {
		return c, "", err
	}
	raw, err := json.Marshal(struct {
		Platform string
		Config   stepConfig
	}{platform, c})
	sum := sha256.Sum256(raw)
	return c, hex.EncodeToString(sum[:]), err
}

// FindBuild returns the image that a step would make, if the store has it;
// otherwise the error is [ErrNotFound].
func (s *Store) FindBuild(ctx context.Context, step BuildStep) (img Image, err error) {
	c, hash, err := step.parse(s.limits)
	if err != nil {
		return img, err
	}
	var parent Image
	var found *candidate
	err = s.view(ctx, func(tx *metadata.Tx) error {
		found = nil
		if parent, err = buildParent(tx, step.Parent); err != nil {
			return err
		}
		if id, ok := tx.Build(parent.ID, hash); ok {
			img, _, _, err = image(tx, id)
			return err
		}
		for _, name := range step.From {
			r, err := resolve(tx, name)
			if err != nil {
				return err
			}
			if found, err = findStep(tx, r.id, parent, c); found != nil || err != nil {
				return err
			}
		}
		return fmt.Errorf("build step: %w", ErrNotFound)
	})
	if err != nil || found == nil {
		return img, err
	}
	if img, err = s.takeStep(ctx, parent, step.Config, *found); err != nil {
		return img, err
	}
	return img, s.RecordBuild(ctx, step, img.ID.String())
}

// buildParent finds the image a step begins with; without a name it is one
// without anything.
func buildParent(tx *metadata.Tx, name string) (Image, error) {
	if name == "" {
		return Image{}, nil
	}
	r, err := resolve(tx, name)
	if err != nil {
		return Image{}, err
	}
	img, _, _, err := image(tx, r.id)
	return img, err
}

// RecordBuild remembers that a step has made an image. Of several the last
// counts. It is forgotten with the image.
func (s *Store) RecordBuild(ctx context.Context, step BuildStep, made string) error {
	_, hash, err := step.parse(s.limits)
	if err != nil {
		return err
	}
	return s.update(ctx, func(tx *metadata.Tx) error {
		parent, err := buildParent(tx, step.Parent)
		if err != nil {
			return err
		}
		r, err := resolve(tx, made)
		if err != nil {
			return err
		}
		return tx.PutBuild(parent.ID, hash, r.id)
	})
}

// candidate is the beginning of an image: one more step than a parent.
type candidate struct {
	of     Image
	config []byte
	steps  int // entries of the history
	layers int
}

// findStep looks whether an image goes on from parent with a step.
func findStep(tx *metadata.Tx, id digest.Digest, parent Image, c stepConfig) (*candidate, error) {
	img, raw, _, err := image(tx, id)
	if err != nil {
		return nil, err
	}
	n, have := len(parent.Config.History), img.Config.History
	if len(have) <= n || !slices.EqualFunc(parent.Config.History, have[:n], sameStep) {
		return nil, nil
	}
	next := have[n]
	layers := len(parent.DiffIDs)
	if !next.EmptyLayer {
		layers++
	}
	if len(img.DiffIDs) < layers || !slices.Equal(parent.DiffIDs, img.DiffIDs[:len(parent.DiffIDs)]) || next.CreatedBy != strings.Join(c.Cmd, " ") {
		return nil, nil
	}
	return &candidate{img, raw, n + 1, layers}, nil
}

func sameStep(a, b ocispec.History) bool {
	sameTime := a.Created == b.Created || a.Created != nil && b.Created != nil && a.Created.Equal(*b.Created)
	return sameTime && a.CreatedBy == b.CreatedBy && a.Author == b.Author && a.Comment == b.Comment && a.EmptyLayer == b.EmptyLayer
}

// takeStep makes an image of the beginning of another.
func (s *Store) takeStep(ctx context.Context, parent Image, config json.RawMessage, c candidate) (Image, error) {
	var top map[string]json.RawMessage
	if err := json.Unmarshal(c.config, &top); err != nil {
		return Image{}, fmt.Errorf("config of image %s: %w: %w", c.of.ID, ErrCorrupt, err)
	}
	var history []json.RawMessage
	if err := json.Unmarshal(top["history"], &history); err != nil {
		return Image{}, fmt.Errorf("config of image %s: %w: %w", c.of.ID, ErrCorrupt, err)
	}
	var errs []error
	raw := func(v any) json.RawMessage {
		b, err := json.Marshal(v)
		errs = append(errs, err)
		return b
	}
	created := c.of.Config.History[c.steps-1].Created
	if created == nil {
		created = &time.Time{}
	}
	top["history"], top["created"], top["config"] = raw(history[:c.steps]), raw(created), config
	top["rootfs"] = raw(ocispec.RootFS{Type: "layers", DiffIDs: c.of.DiffIDs[:c.layers]})
	for _, k := range []string{"container", "container_config", "parent", "id", "author", "comment"} { // of what was last
		delete(top, k)
	}
	if author := c.of.Config.History[c.steps-1].Author; author != "" {
		top["author"] = raw(author)
	}
	made := raw(top)
	if err := errors.Join(errs...); err != nil {
		return Image{}, err
	}
	lease, err := s.newLease(ctx)
	if err != nil {
		return Image{}, err
	}
	defer s.dropLease(lease)
	return s.addMade(ctx, lease, made, nil, metadata.Image{Parent: parent.ID, Origin: "build"})
}
