package mountd

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/holder"
)

const (
	// statsTimeout is how long the server of a mount may take to answer, or another one to
	// take over from it.
	statsTimeout = 3 * time.Second
	// statsAtOnce is how many servers are asked at once.
	statsAtOnce = 16
)

// Stats implements Service. A server that does not answer is no error: the others have.
func (l *Local) Stats(ctx context.Context, r StatsRequest) ([]MountStats, error) {
	alive, err := l.liveMounts(ctx)
	if err != nil {
		return nil, err
	}
	if r != (StatsRequest{}) {
		a, err := l.findMount(ctx, UnmountRequest{Name: r.Name, Target: r.Target}, alive)
		if err != nil {
			return nil, err
		}
		if a == nil {
			return nil, noStats(r)
		}
		alive = []assessment{*a}
	}
	names := map[string]layers.Container{}
	containers, err := l.store.Containers(ctx)
	if err != nil {
		return nil, err
	}
	for _, c := range containers {
		names[c.ID] = c
	}
	all := make([]MountStats, len(alive))
	slots := make(chan struct{}, statsAtOnce)
	var asked sync.WaitGroup
	for i, a := range alive {
		all[i] = MountStats{
			ID: filepath.Base(a.row.RunDir), ImageID: a.row.ImageID, Target: Path(a.target()),
			State: a.state, ReadOnly: a.row.ReadOnly, Mounted: a.row.Created, Restarts: a.holder.Restarts,
		}
		if c, ok := names[a.row.ContainerID]; ok {
			all[i].Container, all[i].ImageID = c.Name, c.ImageID
		}
		asked.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			all[i].ask(ctx, a)
		})
	}
	asked.Wait()
	return all, ctx.Err()
}

// ask fills in what the server of the mount says.
func (m *MountStats) ask(ctx context.Context, a assessment) {
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	st, err := holder.ReadStats(ctx, a.row.RunDir)
	switch {
	case err == nil:
		m.IO, m.Since, m.Restarts, m.Counters = st.IO, st.Since, st.Restarts, &st.Counters
	case a.state == StateStarting:
		m.Problem = "it is being mounted"
	case errors.Is(err, unix.ENOENT):
		m.Problem = "it is served by a version that does not count: mount it again"
	default:
		m.Problem = err.Error()
	}
}

// noStats says why a name has no counters.
func noStats(r StatsRequest) error {
	target := canonicalTarget(string(r.Target))
	if table, err := holder.MountTable(0); err == nil && target != "" {
		if m := holder.TopMount(table, target); m != nil && holder.IsOurs(m) {
			return markedf(layers.ErrUnsupported, "%q has no counters that can be asked for: it is no mount of this store", target)
		}
	}
	return markedf(layers.ErrNotFound, "no mount %q: see `plyfs ps`", string(r.Name))
}
