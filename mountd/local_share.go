package mountd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/events"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs"
)

// A container that is mounted already is mounted once more as a bind mount: all its mount
// points are served by one server, and see each other's changes at once. Which they are is
// not written down anywhere; the mount table says it. Its row is that of one of them.

// points returns the mount as it appears on each of its mount points that we see; once,
// without a mount point, if that is elsewhere.
func (a *assessment) points() []assessment {
	if len(a.mounts) < 2 {
		return []assessment{*a}
	}
	ps := make([]assessment, len(a.mounts))
	for i, m := range a.mounts {
		ps[i] = *a
		ps[i].mount = m
	}
	return ps
}

// known is the path by which a mount point is wanted and locked: that of the row, also if
// a directory above it has been renamed, unless the row is about another mount point.
func (a *assessment) known() string {
	for _, m := range a.mounts {
		if m.Mountpoint == a.row.Target {
			return a.target()
		}
	}
	return a.row.Target
}

// readOnly reports whether nothing can be written through this mount point.
func (a *assessment) readOnly() bool {
	return a.row.ReadOnly || a.mount != nil && slices.Contains(strings.Split(a.mount.Options, ","), "ro")
}

// points returns the mount points among the mounts of a file system: bind mounts of a directory in it are none.
func points(ms []*mountinfo.Info) []*mountinfo.Info {
	return slices.DeleteFunc(ms, func(m *mountinfo.Info) bool { return m.Root != "/" })
}

// shareable finds the mount of a container that another mount point can be given to.
func (l *Local) shareable(c *layers.Container, readOnly bool, alive []assessment) *assessment {
	if l.opts.Bound { // it is to end with somebody, which a mount of others does not
		return nil
	}
	for i := range alive {
		a := &alive[i]
		if a.row.ContainerID == c.ID && a.state == StateMounted && a.mount != nil && a.mount.Root == "/" &&
			!l.inShell(*a) && (readOnly || !a.row.ReadOnly) {
			return a
		}
	}
	return nil
}

// share gives the mount a of a container one more mount point.
func (l *Local) share(ctx context.Context, r MountRequest, c *layers.Container, target string, a assessment) (res MountResult, err error) {
	st, err := l.store.ContainerStack(ctx, c.ID)
	if err != nil {
		return res, err
	}
	if err := checkOverlap(target, stackDirs(st)); err != nil {
		return res, marked(ErrMount, err)
	}
	if err := l.checkSetuid(r, st); err != nil {
		return res, err
	}
	if r.IO != unionfs.IOAuto || r.Volatile || r.Debug || r.Complete || r.TellLayers || r.Limits != (holder.Limits{}) {
		return res, markedf(ErrUsage, "container %q is mounted on %q, and another mount point is served by the same server: --io, --volatile, --debug, --trace, --layer-xattrs and limits are those of the first mount, leave them out",
			c.Name, a.target())
	}
	if err := bindMount(a.mount, target, r); err != nil {
		return res, marked(ErrMount, fmt.Errorf("container %q is mounted on %q; mount it on %q too: %w", c.Name, a.target(), target, err))
	}
	a.mount = &mountinfo.Info{Mountpoint: target}
	row := a.row
	row.Target, row.ReadOnly = target, a.row.ReadOnly || r.ReadOnly
	if r.Restart {
		if err := l.want(ctx, r, row); err != nil {
			return res, errors.Join(fmt.Errorf("mark the mount on %q as wanted: %w", target, err), unix.Unmount(target, unix.UMOUNT_NOFOLLOW))
		}
	}
	e := l.mountEvent(row)
	l.emit(events.Event{Type: events.TypeMount, Action: events.Mount, Mount: &e})
	return MountResult{Target: Path(target), Container: c, ImageID: c.ImageID, ReadOnly: row.ReadOnly, Pid: row.Pid, SharedWith: Path(a.row.Target)}, nil
}

// attrsOf are the properties of a mount point that a request decides about.
func attrsOf(r MountRequest) (set uint64) {
	for _, f := range []struct {
		on   bool
		attr uint64
	}{
		{!r.Suid, unix.MOUNT_ATTR_NOSUID},
		{!r.Dev, unix.MOUNT_ATTR_NODEV},
		{r.NoExec, unix.MOUNT_ATTR_NOEXEC},
		{r.ReadOnly, unix.MOUNT_ATTR_RDONLY},
	} {
		if f.on {
			set |= f.attr
		}
	}
	return set
}

// bindMount binds a mount to target, with the properties that r asks for.
func bindMount(from *mountinfo.Info, target string, r MountRequest) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, from.Mountpoint, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("clone the mount: %w", err)
	}
	defer unix.Close(tree)
	// It may have been unmounted meanwhile, and what is below it would be bound. An open
	// tree can be asked without asking the server.
	var st unix.Statx_t
	if err := unix.Statx(tree, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st); err != nil {
		return fmt.Errorf("clone the mount: %w", err)
	}
	if int(st.Dev_major) != from.Major || int(st.Dev_minor) != from.Minor {
		return fmt.Errorf("%q was unmounted meanwhile: try again", from.Mountpoint)
	}
	attr := unix.MountAttr{Attr_set: attrsOf(r)}
	have := strings.Split(from.Options, ",")
	for _, f := range []struct {
		name string
		attr uint64
	}{{"nosuid", unix.MOUNT_ATTR_NOSUID}, {"nodev", unix.MOUNT_ATTR_NODEV}, {"noexec", unix.MOUNT_ATTR_NOEXEC}, {"ro", unix.MOUNT_ATTR_RDONLY}} {
		if attr.Attr_set&f.attr == 0 && slices.Contains(have, f.name) {
			attr.Attr_clr |= f.attr
		}
	}
	if r.NoAtime {
		attr.Attr_clr |= unix.MOUNT_ATTR__ATIME
		attr.Attr_set |= unix.MOUNT_ATTR_NOATIME
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("set the properties of the mount point: %w", err)
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach the mount: %w", err)
	}
	return nil
}

// left returns the mount points that a mount still has after one was unmounted. If it was
// that of the row, the row becomes that of another one.
func (l *Local) left(ctx context.Context, a assessment) ([]*mountinfo.Info, error) {
	if a.mount == nil {
		return nil, nil
	}
	table, err := holder.MountTable(0)
	if err != nil {
		return nil, err
	}
	// By now the number may be that of another file system: only mounts that were there before count.
	ms := slices.DeleteFunc(points(holder.DeviceMounts(table, a.mount.Major, a.mount.Minor)), func(m *mountinfo.Info) bool {
		return !slices.ContainsFunc(a.mounts, func(old *mountinfo.Info) bool { return old.ID == m.ID && old.ID != a.mount.ID })
	})
	if len(ms) == 0 || slices.ContainsFunc(ms, func(m *mountinfo.Info) bool { return m.Mountpoint == a.row.Target }) {
		return ms, nil
	}
	return ms, l.moveRow(ctx, a, ms[0].Mountpoint)
}

// moveRow makes the row that of another mount point of the same mount.
func (l *Local) moveRow(ctx context.Context, a assessment, target string) error {
	return l.withLiveLock(func() error {
		now, err := l.sameRow(ctx, a.row)
		if err != nil || !now {
			return err
		}
		return l.store.MoveLive(ctx, a.row.Target, target)
	})
}

// freeRow moves a row that keeps a target which its mount has left.
func (l *Local) freeRow(ctx context.Context, target string, alive []assessment) error {
	for i := range alive {
		a := &alive[i]
		if a.row.Target != target || a.state != StateMounted || a.mount == nil || a.mount.Mountpoint == target {
			continue
		}
		if err := l.moveRow(ctx, *a, a.mount.Mountpoint); err != nil {
			return err
		}
		a.row.Target = a.mount.Mountpoint
	}
	return nil
}
