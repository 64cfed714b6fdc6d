package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/plyfs/plyfs/layers"
)

func TestCodes(t *testing.T) {
	for _, c := range []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK},
		{markedf(layers.ErrNotFound, "gone"), codes.NotFound},
		{fmt.Errorf("commit: %w", markedf(layers.ErrInUse, "busy")), codes.FailedPrecondition},
		{errors.Join(errors.New("mount"), context.Canceled), codes.Canceled},
		{errors.New("disk"), codes.Unknown},
	} {
		got := grpcError(c.err)
		if status.Code(got) != c.want || c.err != nil && status.Convert(got).Message() != c.err.Error() {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
}
