package mountd

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs/transport"
)

const (
	// syncTimeout is how long an unmount waits for the server to sync the
	// upper and end. A slow disk with much dirty data needs minutes.
	syncTimeout = 10 * time.Minute
	// lazyWait is how long an unmount waits before it looks for what keeps the
	// mount alive.
	lazyWait = 2 * time.Second
)

// Unmount implements Service.
func (l *Local) Unmount(ctx context.Context, r UnmountRequest) (UnmountResult, error) {
	alive, err := l.liveMounts(ctx)
	if err != nil {
		return UnmountResult{}, err
	}
	a, err := l.findMount(ctx, r, alive)
	if a != nil && err == nil {
		return l.unmount(ctx, *a, r.Lazy)
	}
	if err != nil && !errors.Is(err, layers.ErrNotFound) {
		return UnmountResult{}, err
	}
	res, found, werr := l.unwant(ctx, r)
	if werr != nil {
		return UnmountResult{}, werr
	}
	if err == nil { // another's may be there
		var raw UnmountResult
		if raw, err = UnmountRaw(ctx, r); !found || err == nil {
			return raw, err
		}
	}
	if found && (errors.Is(err, layers.ErrNotFound) || errors.Is(err, ErrUsage)) {
		return res, nil
	}
	return UnmountResult{}, err
}

// unmount unmounts a mount, which is not wanted any more.
func (l *Local) unmount(ctx context.Context, a assessment, lazy bool) (UnmountResult, error) {
	unlock, err := l.lockTarget(ctx, a.known())
	if err != nil {
		return UnmountResult{}, err
	}
	defer unlock()
	return l.unmountLocked(ctx, a, lazy, unlock)
}

// unmountLocked goes through steps 6 to 8 of the life of a mount (doc.go). It calls unlock
// before it waits for the end of the processes.
func (l *Local) unmountLocked(ctx context.Context, a assessment, lazy bool, unlock func()) (UnmountResult, error) {
	res := UnmountResult{Target: Path(a.target())}
	if a.row.ContainerID != "" {
		if c, err := l.store.Container(ctx, a.row.ContainerID); err == nil {
			res.Container = c.Name
		}
	}
	if a.mount == nil && a.state == StateMounted && l.inShell(a) {
		return res, l.inShellError(a)
	}
	if a.mount == nil && a.state == StateMounted {
		return res, markedf(ErrMount, "%q is mounted in another mount namespace: unmount it there (nsenter -m -t %d plyfs umount %s)",
			a.row.Target, a.row.Pid, a.row.Target)
	}
	if a.mount != nil { // else a lazy unmount has done this part
		if err := unmountAt(a.mount, lazy); err != nil {
			return res, err
		}
	}
	// Before its processes have ended: it must not be restored then.
	if _, err := l.store.WantedAt(ctx, a.known()); !errors.Is(err, layers.ErrNotFound) {
		if err := l.store.Unwant(ctx, a.known()); err != nil {
			return res, fmt.Errorf("%q is unmounted, but still wanted: %w", a.known(), err)
		}
	}
	rest, err := l.left(ctx, a)
	unlock()
	if err != nil {
		return res, fmt.Errorf("%q is unmounted: %w", a.target(), err)
	}
	if len(rest) > 0 {
		l.unmountedPoint(a)
		res.StillInUse, res.By = true, bindOn(rest[0])
		return res, nil
	}
	ps := []holder.Process{{Pid: a.row.Pid, StartTime: a.row.StartTime}, a.holder.Server}
	by, err := waitEnd(ctx, ps, a.mount, lazy)
	if err != nil {
		return res, err
	}
	if by != "" {
		res.StillInUse, res.By = true, by
		return res, nil
	}
	bad := holder.ReadExit(a.row.RunDir)
	rec, rerr := readRecord(a.row.RunDir)
	if err := l.forget(ctx, a); err != nil {
		return res, err
	}
	if bad != nil {
		return res, markedf(ErrMount, "%q is unmounted, but not cleanly: %w", a.row.Target, bad)
	}
	if rerr == nil && rec.AutoRemove && rec.ContainerID != "" {
		if err := l.removeContainer(ctx, rec.ContainerID); err != nil {
			return res, fmt.Errorf("%q is unmounted, but its container was not removed: %w", a.row.Target, err)
		}
		res.Removed = true
	}
	return res, nil
}

// findMount returns the mount that a request means, or nil if its target is a
// mount without a row: a raw one.
func (l *Local) findMount(ctx context.Context, r UnmountRequest, alive []assessment) (*assessment, error) {
	target := canonicalTarget(string(r.Target))
	for i := range alive {
		a := &alive[i]
		for _, p := range a.points() {
			if target != "" && p.mount != nil && p.mount.Mountpoint == target {
				return &p, nil
			}
		}
		if target != "" && a.row.Target == target {
			return a, nil
		}
	}
	name := string(r.Name)
	if name != "" && !strings.Contains(name, "/") {
		c, err := l.store.Container(ctx, name)
		switch {
		case err == nil:
			var found *assessment
			for i := range alive {
				if alive[i].row.ContainerID != c.ID {
					continue
				}
				if found != nil || len(alive[i].mounts) > 1 {
					return nil, markedf(ErrUsage, "container %q is mounted more than once: name the mount point", c.Name)
				}
				found = &alive[i]
			}
			if found == nil {
				return nil, markedf(layers.ErrNotFound, "container %q is not mounted", c.Name)
			}
			return found, nil
		case !errors.Is(err, layers.ErrNotFound):
			return nil, err
		}
	}
	return nil, nil
}

// canonicalTarget resolves symlinks in a path whose last component may be a
// dead mount, which must not be touched.
func canonicalTarget(target string) string {
	if target == "" {
		return ""
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(target))
	if err != nil {
		return filepath.Clean(target)
	}
	p := filepath.Join(dir, filepath.Base(target))
	var st unix.Stat_t
	if unix.Lstat(p, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
		if real, err := filepath.EvalSymlinks(p); err == nil {
			return real
		}
	}
	return p
}

// UnmountRaw unmounts what `plyfs overlay` has mounted, without a store.
func UnmountRaw(ctx context.Context, r UnmountRequest) (UnmountResult, error) {
	table, err := holder.MountTable(0)
	if err != nil {
		return UnmountResult{}, err
	}
	at := canonicalTarget(string(r.Target))
	m := holder.TopMount(table, at)
	switch {
	case m == nil:
		return UnmountResult{}, markedf(layers.ErrNotFound, "%q is neither a mount point nor a mounted container: see `plyfs ps`", string(r.Name))
	case !holder.IsOurs(m):
		return UnmountResult{}, markedf(ErrUsage, "%q is a mount of type %s, not of plyfs: use umount", at, m.FSType)
	}
	res := UnmountResult{Target: Path(at)}
	ps := holder.ProcessesOf(at)
	if err := unmountAt(m, r.Lazy); err != nil {
		return res, err
	}
	res.By, err = waitEnd(ctx, ps, m, r.Lazy)
	res.StillInUse = res.By != ""
	return res, err
}

// unmountAt detaches a mount, or says who keeps it busy.
func unmountAt(m *mountinfo.Info, lazy bool) error {
	table, err := holder.MountTable(0)
	if err != nil {
		return err
	}
	if top := holder.TopMount(table, m.Mountpoint); top != nil && top.ID != m.ID {
		return markedf(layers.ErrInUse, "%q is covered by a mount of type %s: unmount that one first (umount %s)", m.Mountpoint, top.FSType, m.Mountpoint)
	}
	err = transport.Unmount(m.Mountpoint, lazy)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EBUSY) || strings.Contains(err.Error(), "busy"): // fusermount3 has words only
		return markedf(layers.ErrInUse, "%q is busy: %s", m.Mountpoint, busyReason(m))
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT):
		return nil // somebody else was faster: what counts is that it is gone
	}
	return marked(ErrMount, err)
}

// busyReason names what keeps a mount from being unmounted, and the cure.
func busyReason(m *mountinfo.Info) string {
	const most = 8
	var why []string
	if table, err := holder.MountTable(0); err == nil {
		for _, p := range holder.MountsBelow(table, m) {
			why = append(why, fmt.Sprintf("%q is mounted inside it", p))
		}
	}
	for _, u := range holder.Users(m) {
		why = append(why, fmt.Sprintf("process %d (%s) has its %s there", u.Pid, u.Command, u.How))
	}
	if len(why) == 0 {
		return "no process that we can see uses it; try again as root, or detach it with `plyfs umount -l`"
	}
	if n := len(why); n > most {
		why = append(why[:most], fmt.Sprintf("and %d more", n-most))
	}
	return strings.Join(why, "; ") + "; end these first, or detach it with `plyfs umount -l`"
}

// waitEnd waits until the processes of a mount that was just unmounted have
// ended, which they do when the upper is synced. A mount that lives on, for its
// open files (lazy) or elsewhere in the tree or in another mount namespace, is
// no error: by says who keeps it.
func waitEnd(ctx context.Context, ps []holder.Process, m *mountinfo.Info, lazy bool) (by string, err error) {
	for waited := time.Duration(0); waited < syncTimeout; waited += lazyWait {
		gone, err := waitGone(ctx, ps, lazyWait)
		if gone || err != nil {
			return "", err
		}
		if by := keptBy(m); by != "" {
			return by, nil
		}
		if lazy {
			return "a process that we cannot see", nil
		}
	}
	return "", fmt.Errorf("unmounted, but its processes have not ended within %s, so its writable layer may not be synced: %w",
		syncTimeout, context.DeadlineExceeded)
}

func bindOn(m *mountinfo.Info) string { return fmt.Sprintf("its bind mount on %q", m.Mountpoint) }

// keptBy names what keeps an unmounted file system alive.
func keptBy(m *mountinfo.Info) string {
	if m == nil {
		return ""
	}
	if table, err := holder.MountTable(0); err == nil {
		if ms := holder.DeviceMounts(table, m.Major, m.Minor); len(ms) > 0 {
			return bindOn(ms[0])
		}
	}
	for _, u := range append(holder.UsersElsewhere(m.Major, m.Minor), holder.Users(m)...) {
		return fmt.Sprintf("process %d (%s): %s", u.Pid, u.Command, u.How)
	}
	return ""
}

// waitGone reports whether all processes have ended within limit.
func waitGone(ctx context.Context, ps []holder.Process, limit time.Duration) (bool, error) {
	wctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for _, p := range ps {
		err := p.WaitGone(wctx)
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return false, ctx.Err()
		case errors.Is(err, context.DeadlineExceeded):
			return false, nil
		default:
			return false, err
		}
	}
	return true, nil
}
