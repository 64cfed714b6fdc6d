package mountd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/events"
	"github.com/plyfs/plyfs/mountd/holder"
)

// A wanted mount is one that was made with MountRequest.Restart, and not unmounted by
// plyfs since. Its row in the database says how to make it again; whether it is mounted is
// looked up as for every mount. Who makes or unmounts the mount of a target holds the lock
// of that target, so that nobody restores what another unmounts.

// restoreTimeout is how long one mount may keep the others waiting.
const restoreTimeout = time.Minute

// Restored is what has become of one wanted mount.
type Restored struct {
	Target    Path          `json:"target"`
	Container string        `json:"container,omitempty"` // its name; its ID if it is gone
	ImageID   digest.Digest `json:"imageID,omitempty"`
	ReadOnly  bool          `json:"readOnly,omitempty"`
	State     string        `json:"state"` // mounted or wanted
	// Restored: it was not mounted, and now is.
	Restored bool `json:"restored,omitempty"`
	// Reason says why it is not mounted, and Problem is set if it should be.
	Reason  string     `json:"reason,omitempty"`
	Problem *ErrorBody `json:"problem,omitempty"`
}

// Err is the problem as an error.
func (r Restored) Err() error {
	if r.Problem == nil {
		return nil
	}
	return decodeError(*r.Problem)
}

// Restore implements Service. A mount that cannot be made is told of in the answer, and
// does not keep others from being made.
func (l *Local) Restore(ctx context.Context, _ Empty) ([]Restored, error) {
	return l.restoreEach(ctx, func() {})
}

// restoreEach is Restore, and calls next before each mount.
func (l *Local) restoreEach(ctx context.Context, next func()) ([]Restored, error) {
	out := []Restored{}
	wanted, err := l.store.Wanted(ctx)
	if err != nil {
		return nil, err
	}
	// A container that is mounted read-only first could not be mounted writable.
	slices.SortStableFunc(wanted, func(a, b layers.Wanted) int {
		switch {
		case a.ReadOnly == b.ReadOnly:
			return 0
		case b.ReadOnly:
			return -1
		}
		return 1
	})
	for _, w := range wanted {
		next()
		r, err := l.restore(ctx, w.Target)
		if cerr := ctx.Err(); cerr != nil {
			return out, cerr
		}
		if errors.Is(err, layers.ErrNotFound) && r == nil {
			continue // it is not wanted any more
		}
		if r == nil {
			r = l.restored(ctx, w)
		}
		if err != nil {
			l.restoreFailed(ctx, w, r, err)
		}
		out = append(out, *r)
	}
	return out, nil
}

// restoreAtStart is Restore for a daemon, which starts whatever comes of it: the log tells.
func (l *Local) restoreAtStart(ctx context.Context) {
	all, err := l.restoreEach(ctx, func() { // systemd is not to take it for one that hangs
		NotifySystemd(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", (restoreTimeout + stopGrace).Microseconds()))
	})
	if err != nil {
		l.log.Error("wanted mounts are not made again", zap.String("op", "restore"), zap.Error(err))
	}
	for _, r := range all {
		if r.Restored {
			l.log.Info("a wanted mount was made again", zap.String("op", "restore"), zap.String("target", string(r.Target)))
		}
	}
}

// restore makes the mount that is wanted on target, unless it is there. The error is
// ErrNotFound without a result if nothing is wanted there.
func (l *Local) restore(ctx context.Context, target string) (*Restored, error) {
	ctx, cancel := context.WithTimeout(ctx, restoreTimeout)
	defer cancel()
	unlock, err := l.lockTarget(ctx, target)
	if err != nil {
		return nil, notNotFound(err)
	}
	defer unlock()
	// First what has ended: that may have been unmounted.
	alive, err := l.settledMounts(ctx, func(row layers.Live) bool { return row.Target == target })
	if err != nil {
		return nil, notNotFound(err)
	}
	w, err := l.store.WantedAt(ctx, target)
	if err != nil {
		return nil, err
	}
	r := l.restored(ctx, w)
	if isMountedAsWanted(alive, w) {
		r.State = StateMounted
		if w.Problem == "" && w.Unmounted == "" {
			return r, nil
		}
		return r, l.store.ChangeWanted(ctx, target, func(w *layers.Wanted) { w.Problem, w.Unmounted = "", "" })
	}
	if w.Unmounted == holder.BootID() {
		r.Reason = wantedReason(w)
		return r, nil
	}
	if err := detachLeft(target); err != nil {
		return r, marked(ErrMount, err)
	}
	if now, err := resolveMountPoint(target); err != nil || now != target {
		if err == nil {
			err = fmt.Errorf("mount point %q leads to %q now", target, now)
		}
		return r, marked(ErrMount, err)
	}
	var req MountRequest
	if err := json.Unmarshal(w.Request, &req); err != nil {
		return r, markedf(layers.ErrCorrupt, "what is wanted on %q cannot be read: %w", target, err)
	}
	req.Restart = true
	if _, err := l.mount(ctx, req); err != nil {
		return r, err
	}
	r.State, r.Restored = StateMounted, true
	return r, nil
}

// detachLeft takes a dead mount of plyfs out of the tree that has no row: it is left if the
// kernel did not say yet that it was dead when its row was removed.
func detachLeft(target string) error {
	table, err := holder.MountTable(0)
	if err != nil {
		return err
	}
	m := holder.TopMount(table, target)
	if m == nil || m.FSType != "fuse.plyfs" || holder.Reused(table, m.Major, m.Minor) {
		return nil // the mount point is in use, or free
	}
	_, err = holder.Detach(table, m.Major, m.Minor) // what is covered is not on this mount point
	return err
}

// notNotFound keeps an error from meaning that nothing is wanted.
func notNotFound(err error) error {
	if errors.Is(err, layers.ErrNotFound) {
		return errors.New(err.Error())
	}
	return err
}

// restored describes a wanted mount that is not mounted.
func (l *Local) restored(ctx context.Context, w layers.Wanted) *Restored {
	r := &Restored{Target: Path(w.Target), Container: w.ContainerID, ImageID: w.ImageID, ReadOnly: w.ReadOnly, State: StateWanted}
	if w.ContainerID != "" {
		if c, err := l.store.Container(ctx, w.ContainerID); err == nil { // else the ID has to do
			r.Container, r.ImageID = c.Name, c.ImageID
		}
	}
	return r
}

// restoreFailed tells of a wanted mount that could not be made.
func (l *Local) restoreFailed(ctx context.Context, w layers.Wanted, r *Restored, err error) {
	body, _ := encodeError(err)
	r.State, r.Restored, r.Reason, r.Problem = StateWanted, false, body.Message, &body
	l.log.Error("a wanted mount could not be made again", zap.String("op", "restore"), zap.String("target", w.Target), zap.Error(err))
	if cerr := l.store.ChangeWanted(ctx, w.Target, func(w *layers.Wanted) { w.Problem = body.Message }); cerr != nil {
		l.log.Warn("the reason is not recorded", zap.String("op", "restore"), zap.String("target", w.Target), zap.Error(cerr))
	}
	e := l.mountEvent(layers.Live{Target: w.Target, ContainerID: w.ContainerID, ImageID: w.ImageID, ReadOnly: w.ReadOnly})
	e.Error = body.Message
	l.emit(events.Event{Type: events.TypeMount, Action: events.Fail, Mount: &e})
}

// isMountedAsWanted reports whether a wanted mount is there.
func isMountedAsWanted(alive []assessment, w layers.Wanted) bool {
	return slices.ContainsFunc(alive, func(a assessment) bool {
		same := w.ContainerID != "" && a.row.ContainerID == w.ContainerID ||
			w.ContainerID == "" && a.row.ContainerID == "" && a.row.ImageID == w.ImageID
		return same && (a.state == StateMounted || a.state == StateStarting) &&
			slices.ContainsFunc(a.points(), func(p assessment) bool { return p.known() == w.Target && p.readOnly() == w.ReadOnly })
	})
}

// want marks a mount that was just made as wanted. The request is kept as it can be made
// again: with the container that was made, and with the image that a name meant.
func (l *Local) want(ctx context.Context, r MountRequest, row layers.Live) error {
	r.Target, r.Name = Path(row.Target), ""
	w := layers.Wanted{Target: row.Target, ContainerID: row.ContainerID, ReadOnly: row.ReadOnly}
	if r.Source = row.ContainerID; row.ContainerID == "" {
		w.ImageID, r.Source = row.ImageID, row.ImageID.String()
	}
	var err error
	if w.Request, err = json.Marshal(r); err != nil {
		return err
	}
	return l.store.Want(ctx, w)
}

// unwant forgets a wanted mount that is not mounted, if the request means one.
func (l *Local) unwant(ctx context.Context, r UnmountRequest) (res UnmountResult, found bool, err error) {
	all, err := l.store.Wanted(ctx)
	if err != nil || len(all) == 0 {
		return res, false, err
	}
	target, id := canonicalTarget(string(r.Target)), ""
	if name := string(r.Name); name != "" && !strings.Contains(name, "/") {
		if c, err := l.store.Container(ctx, name); err == nil { // else it is a directory
			id = c.ID
		}
	}
	for _, same := range []func(layers.Wanted) bool{
		func(w layers.Wanted) bool { return w.Target == target || w.Target == string(r.Target) },
		func(w layers.Wanted) bool { return id != "" && w.ContainerID == id },
	} {
		for _, w := range all {
			if !same(w) {
				continue
			}
			unlock, err := l.lockTarget(ctx, w.Target)
			if err != nil {
				return res, false, err
			}
			err = l.store.Unwant(ctx, w.Target)
			unlock()
			res = UnmountResult{Target: Path(w.Target)}
			if w.ContainerID != "" {
				res.Container = l.restored(ctx, w).Container
			}
			return res, err == nil, err
		}
	}
	return res, false, nil
}

// unmounted notes that others than plyfs have unmounted a mount: it is not made again
// before the next boot, which is when they are not there to have meant it.
func (l *Local) unmounted(ctx context.Context, row layers.Live) {
	_, err := l.store.WantedAt(ctx, row.Target)
	if err == nil {
		err = l.store.ChangeWanted(ctx, row.Target, func(w *layers.Wanted) { w.Unmounted = row.BootID })
	}
	if err != nil && !errors.Is(err, layers.ErrNotFound) {
		l.log.Warn("a wanted mount was unmounted by others, which is not recorded", zap.String("target", row.Target), zap.Error(err))
	}
}

// wantedReason says why a wanted mount is not there.
func wantedReason(w layers.Wanted) string {
	switch {
	case w.Unmounted == holder.BootID():
		return "unmounted by another program: it comes back with the next boot"
	case w.Problem != "":
		return w.Problem
	}
	return "it has ended: plyfs restore makes it again"
}

// pendingWanted returns the wanted mounts that are not there.
func (l *Local) pendingWanted(ctx context.Context, alive []assessment) ([]layers.Wanted, error) {
	all, err := l.store.Wanted(ctx)
	return slices.DeleteFunc(all, func(w layers.Wanted) bool { return isMountedAsWanted(alive, w) }), err
}

func wantedStatus(s Status, w layers.Wanted) Status {
	if s.State != StateBroken {
		s.State = StateWanted
	}
	s.Target, s.ReadOnly, s.Since, s.Reason = Path(w.Target), w.ReadOnly, w.Since, wantedReason(w)
	return s
}

// lockTarget keeps two from making, restoring or unmounting the mount of one target.
func (l *Local) lockTarget(ctx context.Context, target string) (unlock func(), err error) {
	if err := makeRunDir(l.runDir); err != nil {
		return nil, err
	}
	unlock, err = lockName(ctx, filepath.Join(l.runDir, "target.lock"), target)
	if err != nil {
		return nil, fmt.Errorf("mount point %q: %w", target, err)
	}
	return unlock, nil
}
