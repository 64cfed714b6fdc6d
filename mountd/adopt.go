package mountd

import (
	"context"

	"github.com/plyfs/plyfs/layers"
)

// AdoptRequest takes over another engine's store.
type AdoptRequest struct {
	Path   string // of its root
	Mode   string // see [layers.AdoptOptions]
	Verify bool
	DryRun bool
}

// Adopt takes over the images and containers of another engine's store. It is no
// part of [Service]: a daemon opens no path that a client names, and whoever adopts a
// store must be able to read it himself. A daemon of the same store sees the result.
func (l *Local) Adopt(ctx context.Context, r AdoptRequest, p layers.ProgressFunc) (*layers.AdoptReport, error) {
	rep, err := l.store.Adopt(ctx, r.Path, layers.AdoptOptions{Mode: r.Mode, Verify: r.Verify, DryRun: r.DryRun, Progress: p})
	if err == nil && !r.DryRun {
		l.emitAdopted(rep)
	}
	return rep, err
}
