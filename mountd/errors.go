package mountd

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/plyfs/plyfs/layers"
)

// Sentinels of this package, beside those of package layers.
var (
	// ErrMount: the mount point cannot be used, or mounting failed.
	ErrMount = errors.New("mount failed")
	// ErrUsage: the request itself makes no sense.
	ErrUsage = errors.New("usage")
	// ErrRefused: the daemon does not serve this user.
	ErrRefused = errors.New("refused")
	// ErrUnavailable: the daemon cannot be reached, or went away in the middle.
	ErrUnavailable = errors.New("daemon unavailable")
)

// codes is the one table between error values and the codes of the API. The
// first match wins. A client gets back an error that matches the same sentinel
// and prints the same sentence.
var codes = []struct {
	err    error
	code   string
	status int
}{
	{layers.ErrNotFound, "notFound", http.StatusNotFound},
	{layers.ErrExists, "exists", http.StatusConflict},
	{layers.ErrInUse, "inUse", http.StatusConflict},
	{layers.ErrCorrupt, "corrupt", http.StatusUnprocessableEntity},
	{layers.ErrLocked, "locked", http.StatusServiceUnavailable},
	{layers.ErrUnsupported, "unsupported", http.StatusNotImplemented},
	{layers.ErrInvalid, "invalid", http.StatusBadRequest},
	{ErrUsage, "usage", http.StatusBadRequest},
	{ErrMount, "mount", http.StatusInternalServerError},
	{ErrRefused, "refused", http.StatusForbidden},
	{ErrUnavailable, "unavailable", http.StatusServiceUnavailable},
	{context.DeadlineExceeded, "timeout", http.StatusGatewayTimeout},
	{context.Canceled, "cancelled", 499},
}

const codeInternal = "internal"

// ErrorBody is an error on the wire.
type ErrorBody struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// encodeError returns the body and HTTP status for err.
func encodeError(err error) (ErrorBody, int) {
	for _, c := range codes {
		if errors.Is(err, c.err) {
			return ErrorBody{Code: c.code, Message: err.Error()}, c.status
		}
	}
	return ErrorBody{Code: codeInternal, Message: err.Error()}, http.StatusInternalServerError
}

// decodeError is the inverse of encodeError.
func decodeError(b ErrorBody) error {
	for _, c := range codes {
		if c.code == b.Code {
			return &remoteError{msg: b.Message, is: c.err}
		}
	}
	return errors.New(b.Message)
}

// remoteError prints what the daemon said and matches its sentinel.
type remoteError struct {
	msg string
	is  error
}

func (e *remoteError) Error() string { return e.msg }
func (e *remoteError) Unwrap() error { return e.is }

// marked is an error of a given kind that prints its own sentence only.
func marked(kind, err error) error {
	if err == nil || errors.Is(err, kind) {
		return err
	}
	return &markedError{kind: kind, err: err}
}

func markedf(kind error, format string, args ...any) error {
	return &markedError{kind: kind, err: fmt.Errorf(format, args...)}
}

type markedError struct{ kind, err error }

func (e *markedError) Error() string   { return e.err.Error() }
func (e *markedError) Unwrap() []error { return []error{e.kind, e.err} }
