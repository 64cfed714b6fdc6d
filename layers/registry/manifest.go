package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Media types that the image specification does not have.
const (
	MediaDockerIndex  = "application/vnd.docker.distribution.manifest.list.v2+json"
	MediaDockerImage  = "application/vnd.docker.distribution.manifest.v2+json"
	MediaDockerConfig = "application/vnd.docker.container.image.v1+json"
	MediaDockerLayer  = "application/vnd.docker.image.rootfs.diff.tar.gzip"
)

var manifestAccept = strings.Join([]string{ocispec.MediaTypeImageIndex, MediaDockerIndex, ocispec.MediaTypeImageManifest, MediaDockerImage}, ", ")

const digestHeader = "Docker-Content-Digest"

// Resolve asks what a tag or digest stands for without fetching it. The digest is
// empty if the registry does not say; then [Remote.Manifest] does.
func (r *Remote) Resolve(ctx context.Context, version string) (d digest.Digest, err error) {
	err = r.each(ctx, func(e *endpoint) error {
		d = ""
		resp, err := e.call(ctx, http.MethodHead, "/manifests/"+version, http.Header{"Accept": {manifestAccept}}, nil, []string{auth.ActionPull}, http.StatusOK)
		if errors.Is(err, ErrNotFound) {
			return fmt.Errorf("no such repository or tag, or none that is shown to us: %w", err)
		}
		if err != nil {
			return err
		}
		_ = resp.Body.Close() // a HEAD has no body
		d, err = promised(resp, version)
		return err
	})
	return d, err
}

// promised is the digest that an answer says to have, which must be the one that
// was asked for.
func promised(resp *http.Response, version string) (digest.Digest, error) {
	h := resp.Header.Get(digestHeader)
	if h == "" {
		return "", nil
	}
	d, err := digest.Parse(h)
	if err != nil {
		return "", fmt.Errorf("%w: %s: the registry says that the digest is %q", ErrCorrupt, where(resp.Request.URL), printable(h))
	}
	if want := digest.Digest(version); want.Validate() == nil && want != d {
		return "", fmt.Errorf("%w: %s: wrong digest: expected %s, the registry says it has %s", ErrCorrupt, where(resp.Request.URL), want, d)
	}
	return d, nil
}

// Manifest fetches a manifest or index by tag or digest, whole and checked against
// its digest. The media type is what the registry says, and may be empty.
func (r *Remote) Manifest(ctx context.Context, version string) (d ocispec.Descriptor, raw []byte, err error) {
	err = r.each(ctx, func(e *endpoint) (err error) {
		d, raw, err = e.manifest(ctx, version)
		return err
	})
	return d, raw, err
}

func (e *endpoint) manifest(ctx context.Context, version string) (ocispec.Descriptor, []byte, error) {
	var d ocispec.Descriptor
	for n := 0; ; {
		desc, raw, err := e.manifestOnce(ctx, version)
		if err == nil || !temporary(err) || ctx.Err() != nil {
			return desc, raw, err
		}
		var s *statusError
		if n++; n >= 3 || errors.As(err, &s) { // an answer has been retried already
			return d, nil, err
		}
		if err := e.o.wait(ctx, n); err != nil {
			return d, nil, err
		}
	}
}

func (e *endpoint) manifestOnce(ctx context.Context, version string) (ocispec.Descriptor, []byte, error) {
	var d ocispec.Descriptor
	rctx, cancel := context.WithCancelCause(ctx)
	defer cancel(context.Canceled)
	resp, err := e.call(rctx, http.MethodGet, "/manifests/"+version, http.Header{"Accept": {manifestAccept}}, nil, []string{auth.ActionPull}, http.StatusOK)
	if err != nil {
		return d, nil, err
	}
	body := e.o.pace(rctx, cancel, resp.Body)
	defer body.Close()
	limit := e.o.ManifestBytes
	name := where(resp.Request.URL)
	if resp.ContentLength > limit {
		return d, nil, fmt.Errorf("%w: %s: a manifest of %d bytes, the limit is %d", ErrUnsupported, name, resp.ContentLength, limit)
	}
	raw, err := io.ReadAll(io.LimitReader(body, limit+1))
	if err != nil {
		if ctx.Err() != nil {
			return d, nil, ctx.Err()
		}
		return d, nil, fmt.Errorf("%s: %w: after %d bytes: %w", name, ErrUnavailable, len(raw), err)
	}
	if int64(len(raw)) > limit {
		return d, nil, fmt.Errorf("%w: %s: a manifest of more than %d bytes", ErrUnsupported, name, limit)
	}
	said, err := promised(resp, version)
	if err != nil {
		return d, nil, err
	}
	d.Digest, d.Size = digest.FromBytes(raw), int64(len(raw))
	want := digest.Digest(version)
	if want.Validate() != nil {
		want = said
	}
	if want != "" {
		if got := want.Algorithm().FromBytes(raw); got != want {
			return d, nil, fmt.Errorf("%w: %s: wrong digest: expected %s, got %s", ErrCorrupt, name, want, got)
		}
	}
	if ct := resp.Header.Get("Content-Type"); ct != "" {
		if d.MediaType, _, err = mime.ParseMediaType(ct); err != nil {
			d.MediaType = ""
		}
	}
	return d, raw, nil
}
