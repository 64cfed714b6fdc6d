package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"

	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"
)

// Sentinel errors. Every error of this package wraps one of them, or the error of
// the context.
var (
	// ErrInvalid: a name or a configuration file cannot be used.
	ErrInvalid = errors.New("invalid argument")
	// ErrNotFound: the registry does not have it, or does not say that it has.
	ErrNotFound = errors.New("not found")
	// ErrDenied: the registry wants other credentials.
	ErrDenied = errors.New("access denied")
	// ErrCorrupt: the registry's answer is not what was asked for.
	ErrCorrupt = errors.New("corrupt data")
	// ErrUnsupported: the registry's answer is well-formed, but too large or of an
	// unknown kind; or the configuration forbids the registry.
	ErrUnsupported = errors.New("not supported")
	// ErrUnavailable: no answer, or one of 5xx, after all retries.
	ErrUnavailable = errors.New("registry unavailable")
)

// errStalled ends a transfer that has become too slow.
var errStalled = errors.New("nothing came for too long")

// statusError is an answer that is not the expected one.
type statusError struct {
	method, where string // where: host and path, without a query that may hold secrets
	code          int
	errs          errcode.Errors
}

func (e *statusError) Error() string {
	text := http.StatusText(e.code)
	if len(e.errs) > 0 {
		text = printable(e.errs.Error())
	}
	return fmt.Sprintf("%s %s: %d: %s", e.method, e.where, e.code, text)
}

func (e *statusError) Unwrap() error {
	switch {
	case e.code == http.StatusNotFound:
		return ErrNotFound
	case e.code == http.StatusUnauthorized || e.code == http.StatusForbidden:
		return ErrDenied
	case e.code >= 500 || e.code == http.StatusTooManyRequests || e.code == http.StatusRequestTimeout:
		return ErrUnavailable
	}
	return ErrUnsupported
}

// printable keeps what a registry says on one line, without control characters.
func printable(s string) string {
	if len(s) > 400 {
		s = s[:400] + "…"
	}
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r >= 0x7f && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
}

// where names a URL for messages: a query may hold the signature of a storage
// server or the state of an upload.
func where(u *url.URL) string { return u.Host + u.Path }

// mend makes one of our errors of one of net/http or oras-go.
func mend(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || known(err) {
		return err
	}
	var resp *errcode.ErrorResponse
	if errors.As(err, &resp) {
		s := &statusError{method: resp.Method, where: where(resp.URL), code: resp.StatusCode, errs: resp.Errors}
		if errors.Is(s, ErrDenied) {
			return fmt.Errorf("%w (use docker login or podman login)", s)
		}
		return s
	}
	var ue *url.Error
	text := err
	if errors.As(err, &ue) {
		text = ue.Err
		if u, perr := url.Parse(ue.URL); perr == nil {
			text = fmt.Errorf("%s %s: %w", strings.ToUpper(ue.Op), where(u), ue.Err)
		}
	}
	if errors.Is(err, auth.ErrBasicCredentialNotFound) {
		return fmt.Errorf("%w: the registry wants a login, and there is none for it: use docker login or podman login", ErrDenied)
	}
	if errors.Is(err, http.ErrSchemeMismatch) {
		text = fmt.Errorf("%w; for a registry on this machine there is --plain-http, for another one insecure = true in registries.conf", text)
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, text)
}

func known(err error) bool {
	for _, s := range []error{ErrInvalid, ErrNotFound, ErrDenied, ErrCorrupt, ErrUnsupported, ErrUnavailable} {
		if errors.Is(err, s) {
			return true
		}
	}
	return false
}

// temporary reports whether another attempt may succeed.
func temporary(err error) bool {
	var cert *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	var dns *net.DNSError
	switch {
	case errors.Is(err, context.Canceled),
		errors.Is(err, ErrInvalid), errors.Is(err, ErrNotFound), errors.Is(err, ErrDenied), errors.Is(err, ErrCorrupt), errors.Is(err, ErrUnsupported),
		errors.Is(err, errRedirect), errors.Is(err, http.ErrSchemeMismatch), errors.As(err, &cert), errors.As(err, &record):
		return false
	case errors.As(err, &dns) && dns.IsNotFound:
		return false
	}
	return true
}
