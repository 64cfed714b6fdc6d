package snapshotter

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/plyfs/plyfs/layers"
)

// grpcCodes is the one table between errors and the codes of gRPC, which containerd turns into
// its own errors. The first match wins.
var grpcCodes = []struct {
	err  error
	code codes.Code
}{
	{layers.ErrNotFound, codes.NotFound},
	{layers.ErrExists, codes.AlreadyExists},
	{layers.ErrInvalid, codes.InvalidArgument},
	{layers.ErrInUse, codes.FailedPrecondition},
	{layers.ErrCorrupt, codes.DataLoss},
	{layers.ErrUnsupported, codes.Unimplemented},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
}

// grpcError gives an error its code; the message stays.
func grpcError(err error) error {
	if err == nil {
		return nil
	}
	for _, c := range grpcCodes {
		if errors.Is(err, c.err) {
			return status.Error(c.code, err.Error())
		}
	}
	return status.Error(codes.Unknown, err.Error())
}

// markedf is an error of a given kind that prints its own sentence only.
func markedf(kind error, format string, args ...any) error {
	return &markedError{kind: kind, err: fmt.Errorf(format, args...)}
}

type markedError struct{ kind, err error }

func (e *markedError) Error() string   { return e.err.Error() }
func (e *markedError) Unwrap() []error { return []error{e.kind, e.err} }
