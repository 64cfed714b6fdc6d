package registry

import (
	"errors"
	"fmt"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Reference is what a user calls an image in a registry.
type Reference struct {
	named reference.Named // without tag and digest
	// Tag is empty if there is a Digest: that alone says which image is meant.
	Tag    string
	Digest digest.Digest
	// Implied says that the tag is the default, latest.
	Implied bool
}

// Parse reads a name as docker does: docker.io is the default registry, library
// its default namespace, latest the default tag. A digest beside a tag decides.
func Parse(name string) (Reference, error) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		if errors.Is(err, reference.ErrNameContainsUppercase) {
			err = errors.New("repository names are lower case")
		}
		return Reference{}, fmt.Errorf("%w: %q is not an image name: %w", ErrInvalid, name, err)
	}
	r := Reference{named: reference.TrimNamed(named)}
	if d, ok := named.(reference.Digested); ok {
		r.Digest = d.Digest()
		if r.Digest.Algorithm() != digest.SHA256 {
			return r, fmt.Errorf("%w: %q: only sha256 digests are supported", ErrUnsupported, name)
		}
		return r, nil
	}
	if t, ok := named.(reference.Tagged); ok {
		r.Tag = t.Tag()
	} else {
		r.Tag, r.Implied = "latest", true
	}
	return r, nil
}

// Host is the registry, as it stands in the name.
func (r Reference) Host() string { return reference.Domain(r.named) }

// Path is the repository without the registry.
func (r Reference) Path() string { return reference.Path(r.named) }

// Name is the registry and the repository.
func (r Reference) Name() string { return r.named.Name() }

// Version is the tag, or the digest.
func (r Reference) Version() string {
	if r.Digest != "" {
		return r.Digest.String()
	}
	return r.Tag
}

// String is the canonical form.
func (r Reference) String() string {
	if r.Digest != "" {
		return r.Name() + "@" + r.Digest.String()
	}
	return r.Name() + ":" + r.Tag
}

// WithDigest is the canonical form of an image of the same repository.
func (r Reference) WithDigest(d digest.Digest) string { return r.Name() + "@" + d.String() }

// Familiar is the form that users write.
func (r Reference) Familiar() string {
	if r.Digest != "" {
		return reference.FamiliarName(r.named) + "@" + r.Digest.String()
	}
	return reference.FamiliarName(r.named) + ":" + r.Tag
}
