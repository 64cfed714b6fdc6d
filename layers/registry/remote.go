package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"
)

// Remote is one repository, behind the endpoints of an [Access]. Its methods may be
// called from several goroutines.
type Remote struct {
	o         Options
	endpoints []*endpoint

	mu   sync.Mutex
	best int // the endpoint that answered last: guarded by mu
}

// endpoint is one host that has the repository.
type endpoint struct {
	Endpoint
	o      Options
	tr     *transport
	client *auth.Client

	mu     sync.Mutex
	scheme string // guarded by mu; "": not known yet
}

// Open prepares the use of a repository. Nothing is sent yet.
func Open(a Access, o Options) (*Remote, error) {
	if err := a.check(); err != nil {
		return nil, err
	}
	o = o.withDefaults()
	r := &Remote{o: o}
	for _, e := range a.Endpoints {
		ep, err := newEndpoint(e, a.Proxy, o)
		if err != nil {
			r.Close()
			return nil, err
		}
		r.endpoints = append(r.endpoints, ep)
	}
	return r, nil
}

func newEndpoint(e Endpoint, p Proxy, o Options) (*endpoint, error) {
	tr, err := newTransport(e, p, o)
	if err != nil {
		return nil, err
	}
	ep := &endpoint{Endpoint: e, o: o, tr: tr}
	switch e.Security {
	case SecurityTLS:
		ep.scheme = "https"
	case SecurityPlain:
		ep.scheme = "http"
	}
	ep.client = &auth.Client{
		Client:   &http.Client{Transport: retries(tr, o), CheckRedirect: checkRedirect},
		Header:   http.Header{"User-Agent": {o.UserAgent}},
		Cache:    auth.NewCache(),
		ClientID: "plyfs",
		Credential: func(_ context.Context, host string) (auth.Credential, error) {
			if !strings.EqualFold(host, e.Host) {
				return auth.EmptyCredential, nil
			}
			c := e.Credential
			return auth.Credential{Username: c.Username, Password: c.Password, RefreshToken: c.IdentityToken, AccessToken: c.RegistryToken}, nil
		},
	}
	return ep, nil
}

// Close drops idle connections.
func (r *Remote) Close() {
	for _, e := range r.endpoints {
		e.tr.close()
	}
}

// order lists the endpoints, the one that answered last first.
func (r *Remote) order() []*endpoint {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append(r.endpoints[r.best:len(r.endpoints):len(r.endpoints)], r.endpoints[:r.best]...)
}

func (r *Remote) answered(e *endpoint) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, x := range r.endpoints {
		if x == e {
			r.best = i
		}
	}
}

// each asks the endpoints in turn until one has an answer.
func (r *Remote) each(ctx context.Context, f func(*endpoint) error) error {
	var errs []error
	for _, e := range r.order() {
		err := f(e)
		if err == nil {
			r.answered(e)
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if e.Mirror {
			err = fmt.Errorf("mirror %s: %w", e.Host, err)
		}
		errs = append(errs, err)
	}
	if len(errs) == 1 {
		return errs[0]
	}
	return several(errs)
}

// several is the error of the registry itself, the last endpoint, with those of the
// mirrors in its text.
func several(errs []error) error {
	last := errs[len(errs)-1]
	var before []string
	for _, e := range errs[:len(errs)-1] {
		before = append(before, e.Error())
	}
	return fmt.Errorf("%w (before that, %s)", last, strings.Join(before, "; "))
}

// base is the URL of the endpoint's API. An insecure endpoint is asked which scheme
// it speaks, without credentials.
func (e *endpoint) base(ctx context.Context) (string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.scheme == "" {
		err := e.ping(ctx, "https")
		plain := errors.Is(err, http.ErrSchemeMismatch) || errors.Is(err, syscall.ECONNREFUSED)
		switch {
		case err == nil:
			e.scheme = "https"
		case plain && e.ping(ctx, "http") == nil:
			e.scheme = "http"
		default:
			return "", mend(err)
		}
	}
	return e.scheme + "://" + e.Host, nil
}

func (e *endpoint) ping(ctx context.Context, scheme string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://"+e.Host+"/v2/", nil)
	if err != nil {
		return err
	}
	c := http.Client{Transport: e.tr.own, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

func (e *endpoint) reference(ref string) registry.Reference {
	return registry.Reference{Registry: e.Host, Repository: e.Repository, Reference: ref}
}

// repository is the endpoint for oras-go.
func (e *endpoint) repository(ctx context.Context) (*remote.Repository, error) {
	if _, err := e.base(ctx); err != nil {
		return nil, err
	}
	ref := e.reference("")
	if err := ref.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return &remote.Repository{Reference: ref, Client: e.client, PlainHTTP: e.scheme == "http", SkipReferrersGC: true}, nil
}

// call sends one request for path below the repository. Any answer with one of the
// codes is returned, every other one is an error.
func (e *endpoint) call(ctx context.Context, method, path string, h http.Header, body io.Reader, actions []string, codes ...int) (*http.Response, error) {
	base, err := e.base(ctx)
	if err != nil {
		return nil, err
	}
	return e.send(ctx, method, base+"/v2/"+e.Repository+path, h, body, -1, actions, codes...)
}

// send is call for a URL. length is that of the body, -1 if net/http can see it.
func (e *endpoint) send(ctx context.Context, method, url string, h http.Header, body io.Reader, length int64, actions []string, codes ...int) (*http.Response, error) {
	ctx = auth.AppendRepositoryScope(ctx, e.reference(""), actions...)
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	for k, v := range h {
		req.Header[k] = v
	}
	if length >= 0 {
		req.ContentLength = length
	}
	resp, err := e.client.Do(req)
	if err != nil {
		return nil, mend(err)
	}
	if slices.Contains(codes, resp.StatusCode) {
		return resp, nil
	}
	defer resp.Body.Close()
	return nil, e.status(resp)
}

const errorBytes = 8 << 10

// status makes an error of an answer. What it says in detail is read as long as it
// is short and comes soon.
func (e *endpoint) status(resp *http.Response) error {
	s := &statusError{method: resp.Request.Method, where: where(resp.Request.URL), code: resp.StatusCode}
	stop := time.AfterFunc(10*time.Second, func() { _ = resp.Body.Close() })
	defer stop.Stop()
	var body struct {
		Errors errcode.Errors `json:"errors"`
	}
	if json.NewDecoder(io.LimitReader(resp.Body, errorBytes)).Decode(&body) == nil {
		s.errs = body.Errors
	}
	if s.code == http.StatusUnauthorized || s.code == http.StatusForbidden {
		have := "there are none for it"
		if e.Credential != (Credential{}) {
			have = "those that were found for it are not enough"
		}
		return fmt.Errorf("%w (the registry wants credentials, %s: use docker login or podman login)", s, have)
	}
	return s
}

func isEOF(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

// wait waits before attempt n, which is 1 for the second.
func (o Options) wait(ctx context.Context, n int) error {
	d := o.MaxBackoff
	if n < 16 {
		d = min(d, o.Backoff<<(n-1))
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// steady is a body that must keep a pace.
type steady struct {
	io.Reader
	body   io.ReadCloser
	cancel context.CancelCauseFunc
	ctx    context.Context // of the request, cancelled when the body has stalled
	timer  *time.Timer
	o      Options
	got    int64 // since the timer was set
}

// pace watches a body whose request has the context ctx, which cancel ends.
func (o Options) pace(ctx context.Context, cancel context.CancelCauseFunc, body io.ReadCloser) *steady {
	s := &steady{Reader: body, body: body, cancel: cancel, ctx: ctx, o: o}
	s.timer = time.AfterFunc(o.Stall, func() { cancel(errStalled) })
	return s
}

func (s *steady) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if s.got += int64(n); s.got >= s.o.StallBytes {
		s.got = 0
		s.timer.Reset(s.o.Stall)
	}
	if err != nil && err != io.EOF && errors.Is(context.Cause(s.ctx), errStalled) {
		err = fmt.Errorf("%w: less than %d bytes in %s", errStalled, s.o.StallBytes, s.o.Stall)
	}
	return n, err
}

func (s *steady) Close() error {
	s.timer.Stop()
	s.cancel(context.Canceled)
	return s.body.Close()
}
