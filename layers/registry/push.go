package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// target is the endpoint that is pushed to.
func (r *Remote) target() *endpoint { return r.endpoints[len(r.endpoints)-1] }

var pushActions = []string{auth.ActionPull, auth.ActionPush}

// HasBlob asks whether the repository has a blob of this digest and size.
func (r *Remote) HasBlob(ctx context.Context, d ocispec.Descriptor) (bool, error) {
	resp, err := r.target().call(ctx, http.MethodHead, "/blobs/"+d.Digest.String(), nil, nil, pushActions, http.StatusOK, http.StatusNotFound)
	if err != nil {
		return false, err
	}
	_ = resp.Body.Close() // a HEAD has no body
	return resp.StatusCode == http.StatusOK && (resp.ContentLength < 0 || resp.ContentLength == d.Size), nil
}

// errNoMount ends an attempt to mount that the registry turned into an upload.
var errNoMount = errors.New("not mounted")

// MountBlob asks the registry to take a blob from another repository of it. A
// registry that cannot, or may not, says so by false.
func (r *Remote) MountBlob(ctx context.Context, d ocispec.Descriptor, from string) (bool, error) {
	repo, err := r.target().repository(ctx)
	if err != nil {
		return false, err
	}
	err = repo.Mount(ctx, d, from, func() (io.ReadCloser, error) { return nil, errNoMount })
	if err != nil && ctx.Err() != nil {
		return false, ctx.Err()
	}
	return err == nil, nil
}

// PushBlob uploads a blob. get gives its content, from the beginning, once for each
// attempt.
func (r *Remote) PushBlob(ctx context.Context, d ocispec.Descriptor, get func() (io.ReadCloser, error)) error {
	e := r.target()
	for n := 1; ; n++ {
		err := e.pushBlob(ctx, d, get)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case !temporary(err) || n >= e.o.Attempts:
			return err
		}
		if err := e.o.wait(ctx, n); err != nil {
			return err
		}
	}
}

func (e *endpoint) pushBlob(ctx context.Context, d ocispec.Descriptor, get func() (io.ReadCloser, error)) error {
	repo, err := e.repository(ctx)
	if err != nil {
		return err
	}
	content, err := get()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err) // ours: another attempt would be the same
	}
	defer content.Close()
	rctx, cancel := context.WithCancelCause(ctx)
	defer cancel(context.Canceled)
	// It must keep a pace too, until all is sent; the answer has a limit of its own.
	body := e.o.pace(rctx, cancel, content)
	defer body.Close()
	err = repo.Blobs().Push(rctx, d, &upload{body})
	if errors.Is(context.Cause(rctx), errStalled) && ctx.Err() == nil {
		return fmt.Errorf("%w: upload to %s: %w", ErrUnavailable, e.Host, errStalled)
	}
	return mend(err)
}

// upload hides what it reads from oras-go, which would hold the content in memory to
// send it twice.
type upload struct{ body *steady }

func (u *upload) Read(p []byte) (int, error) {
	n, err := u.body.Read(p)
	if err == io.EOF {
		u.body.timer.Stop()
	}
	return n, err
}

// PushManifest uploads a manifest under a tag, or under its digest.
func (r *Remote) PushManifest(ctx context.Context, d ocispec.Descriptor, raw []byte, version string) error {
	resp, err := r.target().call(ctx, http.MethodPut, "/manifests/"+version, http.Header{"Content-Type": {d.MediaType}}, bytes.NewReader(raw), pushActions,
		http.StatusCreated, http.StatusOK, http.StatusAccepted)
	if err != nil {
		return err
	}
	_ = resp.Body.Close() // nothing of interest
	_, err = promised(resp, d.Digest.String())
	return err
}
