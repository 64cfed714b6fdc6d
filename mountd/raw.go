package mountd

import (
	"context"

	"go.uber.org/zap"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs/transport"
)

// RawMount mounts directories, without a store, and returns once the mount is
// live. Its processes keep nothing of the caller.
func RawMount(ctx context.Context, o *RawOptions, target string) error {
	if o.Remount {
		return marked(ErrMount, o.remount(target))
	}
	spec, err := o.Spec(target)
	if err != nil {
		return marked(ErrMount, err)
	}
	_ = giveRunDir(&spec) // without: who wants to watch learns that nobody answers
	p, err := holder.Start(ctx, spec, holder.StartOptions{})
	if err == nil {
		_, err = p.Go(ctx)
	}
	if err != nil {
		dropRunDir(&spec)
	}
	return marked(ErrMount, err)
}

// remount changes the flags of a live mount.
func (o *RawOptions) remount(target string) error {
	dir, err := resolveDir(new(fsat.Resolver), "mount point", target)
	if err != nil {
		return err
	}
	return transport.Remount(transport.MountOptions{
		Target: dir, ReadOnly: o.ReadOnly, NoSuid: o.NoSuid, NoDev: o.NoDev, NoExec: o.NoExec,
		NoAtime: o.NoAtime, StrictAtime: o.StrictAtime, NoDirAtime: o.NoDirAtime,
	})
}

// RawServe is RawMount in the foreground: it returns when the mount has ended.
// Cancelling ctx, or a signal, unmounts.
func RawServe(ctx context.Context, o *RawOptions, target string, logger *zap.Logger) error {
	spec, err := o.Spec(target)
	if err != nil {
		return marked(ErrMount, err)
	}
	if err := giveRunDir(&spec); err != nil {
		logger.Warn("nobody will be able to watch this mount", zap.Error(err))
	}
	defer dropRunDir(&spec)
	return marked(ErrMount, holder.Foreground(ctx, spec, logger, nil))
}
