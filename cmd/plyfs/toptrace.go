package main

import (
	"context"
	"sync"

	"github.com/plyfs/plyfs/mountd"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs/trace"
)

// topTrace sums up what is done with a mount, from one picture to the next.
type topTrace struct {
	target  string
	mu      sync.Mutex
	sums    traceSums
	dropped uint64 // since the last picture
	told    uint64 // since the beginning, as the server says it
}

// watch traces a mount until ctx ends.
func (v *topView) watch(ctx context.Context, m mountd.LiveServer) {
	t := &topTrace{target: m.Mountpoint(), sums: newTraceSums()}
	v.traces = append(v.traces, t)
	go func() { // ends with ctx, or with the mount; without it the picture has no details
		_ = holder.Trace(ctx, m.RunDir, trace.Filter{}, func(a holder.Answer) error {
			t.mu.Lock()
			defer t.mu.Unlock()
			if a.Event != nil {
				t.sums.add(a.Event)
			}
			if a.Dropped > t.told {
				t.dropped += a.Dropped - t.told
				t.told = a.Dropped
			}
			return nil
		})
	}()
}

// mostShown is how many operations, programs and paths a picture has.
const mostShown = 8

// take returns the sums since the last picture.
func (t *topTrace) take() topSums {
	t.mu.Lock()
	sums, dropped := t.sums, t.dropped
	t.sums, t.dropped = newTraceSums(), 0
	t.mu.Unlock()
	first := func(i int) []*traceSum {
		list := sums.sorted(i)
		return list[:min(len(list), mostShown)]
	}
	return topSums{Target: t.target, Operations: first(0), Programs: first(1), Paths: first(2), Dropped: dropped}
}
