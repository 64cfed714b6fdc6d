package mountd

import (
	"context"

	"go.uber.org/zap"

	"github.com/plyfs/plyfs/mountd/holder"
)

// RawMount mounts directories, without a store, and returns once the mount is
// live. Its processes keep nothing of the caller.
func RawMount(ctx context.Context, o *RawOptions, target string) error {
	spec, err := o.Spec(target)
	if err != nil {
		return marked(ErrMount, err)
	}
	p, err := holder.Start(ctx, spec, holder.StartOptions{})
	if err != nil {
		return marked(ErrMount, err)
	}
	_, err = p.Go(ctx)
	return marked(ErrMount, err)
}

// RawServe is RawMount in the foreground: it returns when the mount has ended.
// Cancelling ctx, or a signal, unmounts.
func RawServe(ctx context.Context, o *RawOptions, target string, logger *zap.Logger) error {
	spec, err := o.Spec(target)
	if err != nil {
		return marked(ErrMount, err)
	}
	return marked(ErrMount, holder.Foreground(ctx, spec, logger, nil))
}
