package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

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

// PushBlob uploads a blob. get gives its content from an offset on, once for each
// attempt: an upload that broke goes on where the registry has lost it.
func (r *Remote) PushBlob(ctx context.Context, d ocispec.Descriptor, get func(offset int64) (io.ReadCloser, error)) error {
	e := r.target()
	u := uploader{e: e, d: d, get: get}
	for n := 1; ; n++ {
		before := u.offset
		err := u.attempt(ctx)
		if u.offset > before+progressReset {
			n = 1
		}
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

// uploader is the upload of one blob.
type uploader struct {
	e        *endpoint
	d        ocispec.Descriptor
	get      func(offset int64) (io.ReadCloser, error)
	location *url.URL // of the upload; nil: there is none
	offset   int64    // what the registry has of it
}

func (u *uploader) attempt(ctx context.Context) error {
	resumed := u.location != nil
	if resumed {
		if err := u.status(ctx); err != nil {
			return err
		}
	}
	if u.location == nil {
		if err := u.begin(ctx); err != nil {
			return err
		}
		resumed = false
	}
	err := u.put(ctx)
	if err != nil && resumed && !temporary(err) {
		u.location = nil                                                          // it may not know how to go on
		return fmt.Errorf("%w: the upload cannot go on: %v", ErrUnavailable, err) //nolint:errorlint // another attempt is made
	}
	return err
}

// begin opens an upload.
func (u *uploader) begin(ctx context.Context) error {
	resp, err := u.e.call(ctx, http.MethodPost, "/blobs/uploads/", nil, nil, pushActions, http.StatusAccepted)
	if err != nil {
		return err
	}
	_ = resp.Body.Close() // nothing of interest
	u.offset = 0
	u.location, err = uploadLocation(resp)
	return err
}

// status asks what has arrived; if the registry does not know, the upload is over. It
// returns an error if nobody answers.
func (u *uploader) status(ctx context.Context) error {
	resp, err := u.e.send(ctx, http.MethodGet, u.location.String(), nil, nil, -1, pushActions, http.StatusNoContent, http.StatusAccepted)
	if err != nil && temporary(err) {
		return err
	}
	if err != nil {
		u.location = nil
		return nil
	}
	_ = resp.Body.Close() // nothing of interest
	if resp.Header.Get("Location") != "" {
		if u.location, err = uploadLocation(resp); err != nil {
			u.location = nil
			return nil
		}
	}
	_, last, ok := strings.Cut(strings.TrimPrefix(resp.Header.Get("Range"), "bytes="), "-")
	end, err := strconv.ParseInt(last, 10, 64)
	switch {
	case !ok || err != nil || end < 0 || end >= u.d.Size:
		u.location = nil
	case end == 0:
		u.offset = 0 // one byte, or none
	default:
		u.offset = end + 1
	}
	return nil
}

// uploadLocation is where an upload goes on: on the same host, since credentials go
// with it.
func uploadLocation(resp *http.Response) (*url.URL, error) {
	to, err := resp.Location()
	if err != nil {
		return nil, fmt.Errorf("%w: %s: the registry does not say where to upload to", ErrCorrupt, where(resp.Request.URL))
	}
	from := resp.Request.URL
	sameHost := strings.EqualFold(to.Hostname(), from.Hostname()) && (to.Port() == from.Port() || from.Port() == "443" && to.Port() == "" || from.Port() == "" && to.Port() == "443")
	if !sameHost || to.Scheme != from.Scheme || to.User != nil {
		return nil, fmt.Errorf("%w: an upload to %s://%s, from %s", errRedirect, printable(to.Scheme), printable(to.Host), where(from))
	}
	to.Host = from.Host
	return to, nil
}

// put sends the rest, and ends the upload.
func (u *uploader) put(ctx context.Context) error {
	content, err := u.get(u.offset)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err) // ours: another attempt would be the same
	}
	defer content.Close()
	rctx, cancel := context.WithCancelCause(ctx)
	defer cancel(context.Canceled)
	// It must keep a pace too, until all is sent; the answer has a limit of its own.
	body := u.e.o.pace(rctx, cancel, content)
	defer body.Close()
	h := http.Header{"Content-Type": {"application/octet-stream"}}
	if u.offset > 0 {
		h.Set("Content-Range", fmt.Sprintf("%d-%d", u.offset, u.d.Size-1))
	}
	to := *u.location
	q := to.Query()
	q.Set("digest", u.d.Digest.String())
	to.RawQuery = q.Encode()
	resp, err := u.e.send(rctx, http.MethodPut, to.String(), h, &upload{body}, u.d.Size-u.offset, pushActions, http.StatusCreated, http.StatusNoContent)
	switch {
	case err != nil && ctx.Err() == nil && errors.Is(context.Cause(rctx), errStalled):
		return fmt.Errorf("%w: upload to %s: %w", ErrUnavailable, u.e.Host, errStalled)
	case err != nil:
		return err
	}
	_ = resp.Body.Close() // nothing of interest
	_, err = promised(resp, u.d.Digest.String())
	return err
}

// upload is the body of a request, whose pace does not matter any more at its end.
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
