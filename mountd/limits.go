package mountd

import (
	"context"
	"os"
	"strconv"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/holder"
)

// MaxMountsEnv is how many mounts of a store commands without a daemon, and daemons without
// an option, allow.
const MaxMountsEnv = "PLYFS_MAX_MOUNTS"

// MaxMounts reads it; 0 is any number.
func MaxMounts() (int, error) {
	text := os.Getenv(MaxMountsEnv)
	if text == "" {
		return 0, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		return 0, markedf(ErrUsage, "%s=%q: expected a number, 0 for any", MaxMountsEnv, text)
	}
	return n, nil
}

// checkNumber refuses one more mount than there may be.
func (l *Local) checkNumber(have int) error {
	if l.opts.MaxMounts <= 0 || have < l.opts.MaxMounts {
		return nil
	}
	return markedf(layers.ErrInUse, "the store %q has %d mounts, and %d are allowed: unmount one first, or allow more (daemon --max-mounts, %s)",
		l.store.Root(), have, l.opts.MaxMounts, MaxMountsEnv)
}

// checkRows is checkNumber of the rows of living processes, for the holder of the lock.
func (l *Local) checkRows(ctx context.Context) error {
	if l.opts.MaxMounts <= 0 {
		return nil
	}
	rows, err := l.store.LiveMounts(ctx)
	if err != nil {
		return err
	}
	n := 0
	for _, r := range rows {
		st, serr := holder.ReadState(r.RunDir)
		if (holder.Process{Pid: r.Pid, StartTime: r.StartTime}).Alive() || serr == nil && st.Server.Alive() {
			n++
		}
	}
	return l.checkNumber(n)
}
