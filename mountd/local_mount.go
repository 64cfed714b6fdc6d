package mountd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/events"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs"
	"github.com/plyfs/plyfs/whiteout/override"
)

// subject is what a mount request names, resolved.
type subject struct {
	container *layers.Container // nil: an image, read-only
	image     layers.Image
	made      bool // the container was made for this mount
	readOnly  bool // nothing is to be written, although there is an upper
	stack     layers.Stack
}

// Mount implements Service.
func (l *Local) Mount(ctx context.Context, r MountRequest) (MountResult, error) {
	if r.Restart {
		if r.AutoRemove {
			return MountResult{}, markedf(ErrUsage, "--restart does not go with --rm: a container that is deleted when it is unmounted cannot be mounted again")
		}
		target, err := resolveMountPoint(string(r.Target))
		if err != nil {
			return MountResult{}, marked(ErrMount, err)
		}
		unlock, err := l.lockTarget(ctx, target)
		if err != nil {
			return MountResult{}, err
		}
		defer unlock()
	}
	return l.mount(ctx, r)
}

// mount is Mount for whoever has the lock of the target, if the mount is to be wanted.
func (l *Local) mount(ctx context.Context, r MountRequest) (res MountResult, err error) {
	target, err := resolveMountPoint(string(r.Target))
	if err != nil {
		return res, marked(ErrMount, err)
	}
	if root := l.store.Root(); target == root || isBelow(target, root) || isBelow(root, target) {
		return res, markedf(ErrMount, "mount point %q and the store %q overlap: mount outside of the store", target, root)
	}
	c, cerr := l.store.Container(ctx, r.Source)
	if cerr == nil { // who comes second shall see the row of the first
		if err := makeRunDir(l.runDir); err != nil {
			return res, err
		}
		unlock, err := lockName(ctx, filepath.Join(l.runDir, "start.lock"), c.ID)
		if err != nil {
			return res, err
		}
		defer unlock()
	}
	alive, err := l.settledMounts(ctx, func(row layers.Live) bool {
		return row.Target == target || cerr == nil && row.ContainerID == c.ID
	})
	if err != nil {
		return res, err
	}
	if err := l.freeRow(ctx, target, alive); err != nil {
		return res, err
	}
	if err := l.checkFree(target, alive); err != nil {
		return res, err
	}
	if cerr == nil && r.Name == "" && !r.AutoRemove {
		if a := l.shareable(c, r.ReadOnly, alive); a != nil {
			res, err := l.share(ctx, r, c, target, *a)
			if !errors.Is(err, unix.EPERM) {
				return res, err
			} // without privileges there are only mounts with a server of their own
		}
	}
	if err := l.checkNumber(len(alive)); err != nil {
		return res, err
	}
	if err := r.Limits.Validate(); err != nil {
		return res, marked(ErrUsage, err)
	}
	if r.Complete && r.IO != unionfs.IOAuto {
		return res, markedf(ErrUsage, "--io and --trace do not go together: every read and write is to be asked for")
	}
	sub, err := l.subjectOf(ctx, r, alive)
	if err != nil {
		return res, err
	}
	defer func() {
		if err != nil && sub.made { // leave the store as it was
			if rerr := l.removeContainer(context.WithoutCancel(ctx), sub.container.ID); rerr != nil {
				l.log.Warn("container of a failed mount not removed", zap.String("name", sub.container.Name), zap.Error(rerr))
			}
		}
	}()
	if err := checkOverlap(target, stackDirs(sub.stack)); err != nil {
		return res, marked(ErrMount, err)
	}
	spec, err := l.specOf(r, target, sub)
	if err != nil {
		return res, err
	}
	l.addChain(ctx, &spec, sub.stack)
	row := layers.Live{
		Target: target, ReadOnly: spec.ReadOnly, BootID: holder.BootID(), Created: time.Now().UTC(),
	}
	imageID := sub.image.ID
	if sub.container != nil { // a row names one of the two: what it keeps from being removed
		row.ContainerID, imageID = sub.container.ID, sub.container.ImageID
	} else {
		row.ImageID, row.ChainID = sub.image.ID, sub.image.ChainID
	}
	pid, err := l.start(ctx, spec, row, sub.made && r.AutoRemove)
	if err != nil {
		return res, err
	}
	if r.Restart {
		if err := l.want(ctx, r, row); err != nil {
			return res, errors.Join(fmt.Errorf("mark the mount on %q as wanted: %w", target, err), l.undoMount(context.WithoutCancel(ctx), target))
		}
	}
	return MountResult{Target: Path(target), Container: sub.container, ImageID: imageID, ReadOnly: spec.ReadOnly, Pid: pid}, nil
}

// undoMount unmounts what was just mounted.
func (l *Local) undoMount(ctx context.Context, target string) error {
	alive, err := l.liveMounts(ctx)
	if err != nil {
		return err
	}
	for _, a := range alive {
		if a.row.Target == target {
			_, err := l.unmountLocked(ctx, a, true, func() {})
			return err
		}
	}
	return nil
}

// checkFree refuses a target that is a mount point already.
func (l *Local) checkFree(target string, alive []assessment) error {
	for _, a := range alive {
		if a.row.Target == target && a.state == StateDetached {
			return markedf(layers.ErrInUse, "mount point %q is in use: %s was unmounted lazily there, and its last user%s has not ended",
				target, l.describe(a.row), holderHint(a))
		}
		if a.row.Target == target || a.target() == target || slices.ContainsFunc(a.mounts, func(m *mountinfo.Info) bool { return m.Mountpoint == target }) {
			return markedf(layers.ErrInUse, "mount point %q is in use: %s is mounted there; unmount it with `plyfs umount %s`",
				target, l.describe(a.row), target)
		}
	}
	table, err := holder.MountTable(0)
	if err != nil {
		return err
	}
	if m := holder.TopMount(table, target); m != nil {
		return markedf(layers.ErrInUse, "mount point %q is in use: a %s file system is mounted there; choose an unused directory", target, m.FSType)
	}
	return nil
}

// describe names what a row mounts, for messages.
func (l *Local) describe(row layers.Live) string {
	if row.ContainerID != "" {
		// Best effort: a message must not fail for want of a name.
		if c, err := l.store.Container(context.Background(), row.ContainerID); err == nil {
			return fmt.Sprintf("container %q", c.Name)
		}
		return "container " + row.ContainerID
	}
	return "image " + row.ImageID.String()
}

// subjectOf finds, or makes, what shall be mounted.
func (l *Local) subjectOf(ctx context.Context, r MountRequest, alive []assessment) (subject, error) {
	c, cerr := l.store.Container(ctx, r.Source)
	if cerr == nil {
		if r.Name != "" || r.AutoRemove {
			return subject{}, markedf(ErrUsage, "%q is a container: --name and --rm are for images", r.Source)
		}
		return l.containerSubject(ctx, c, r.ReadOnly, alive)
	}
	img, err := l.store.ResolveImage(ctx, r.Source)
	if err != nil {
		return subject{}, notFoundEither(r.Source, cerr, err)
	}
	if r.ReadOnly {
		if r.Name != "" || r.AutoRemove {
			return subject{}, markedf(ErrUsage, "a read-only mount of an image has no container: --name and --rm do not go with --ro")
		}
		st, err := l.store.ImageStack(ctx, img.ID.String())
		return subject{image: img, stack: st}, err
	}
	c, err = l.store.CreateContainer(ctx, r.Source, r.Name)
	if err != nil {
		return subject{}, err
	}
	l.emitContainer(events.Create, c)
	s := subject{container: c, image: img, made: true}
	if s.stack, err = l.store.ContainerStack(ctx, c.ID); err != nil {
		return subject{}, errors.Join(err, l.removeContainer(context.WithoutCancel(ctx), c.ID))
	}
	return s, nil
}

// containerSubject checks that a container may be mounted now. Read-only, the kernel lets nothing
// through that would write. The upper is opened as one all the same, so that what it knows of hard links
// counts; if another server has it, or it lies on a file system that is read-only itself, it becomes the
// topmost lower: then the other names of a file that was copied up show the original.
func (l *Local) containerSubject(ctx context.Context, c *layers.Container, readOnly bool, alive []assessment) (subject, error) {
	for _, a := range alive {
		if a.row.ContainerID != c.ID || readOnly && a.row.ReadOnly {
			continue
		}
		if a.state == StateDetached {
			return subject{}, markedf(layers.ErrInUse, "container %q was unmounted lazily from %q and is still in use there%s: wait for its last user to end",
				c.Name, a.row.Target, holderHint(a))
		}
		if l.inShell(a) {
			return subject{}, l.inShellError(a)
		}
		return subject{}, markedf(layers.ErrInUse, "container %q is mounted on %q: unmount it there first (`plyfs umount %s`); more mount points for one container need root",
			c.Name, a.target(), c.Name)
	}
	st, err := l.store.ContainerStack(ctx, c.ID)
	if err != nil {
		return subject{}, err
	}
	s := subject{container: c, stack: st, readOnly: readOnly}
	shared := slices.ContainsFunc(alive, func(a assessment) bool { return a.row.ContainerID == c.ID })
	if readOnly && (shared || unix.Access(st.Work, unix.W_OK) != nil) {
		st.Lowers = append([]layers.LayerDir{{Path: st.Upper, Dialect: st.Dialect, Override: st.Override}}, st.Lowers...)
		st.Upper, st.Work, st.ChainID = "", "", ""
		s.stack = st
	}
	return s, nil
}

func holderHint(a assessment) string { return fmt.Sprintf(" (holder %d)", a.row.Pid) }

func (l *Local) specOf(r MountRequest, target string, sub subject) (s holder.Spec, err error) {
	s = holder.Spec{
		ID: sub.image.ID.String(), Target: target,
		ReadOnly: sub.stack.Upper == "" || sub.readOnly, AllowOther: r.AllowOther || os.Geteuid() == 0,
		NoSuid: !r.Suid, NoDev: !r.Dev, NoExec: r.NoExec, NoAtime: r.NoAtime || sub.readOnly,
		Volatile: r.Volatile, IO: r.IO, Debug: r.Debug, Complete: r.Complete, TellLayers: r.TellLayers, Bound: l.opts.Bound,
		Limits: r.Limits,
	}
	if sub.container != nil {
		s.ID = sub.container.MountID
	}
	s.Labels = layerNames(sub.stack.Lowers)
	for _, d := range sub.stack.Lowers {
		written := isUpper(d)
		s.Lowers = append(s.Lowers, unionfs.Layer{
			Path: d.Path, Dialect: d.Dialect, Override: d.Override,
			Direct: !written, // unpacking escapes the attributes that would say otherwise
		})
		if written {
			s.Redirect, s.Metacopy = unionfs.RedirectFollow, true
		}
	}
	if sub.stack.Upper != "" {
		s.Upper = unionfs.Layer{Path: sub.stack.Upper, Dialect: sub.stack.Dialect, Override: sub.stack.Override}
		s.Work, s.History = sub.stack.Work, sub.stack.History
		// Nobody but us and root writes these uppers.
		s.Redirect, s.Metacopy = unionfs.RedirectOn, true
	}
	if err := l.checkSetuid(r, sub.stack); err != nil {
		return s, err
	}
	if ofUser(sub.stack) {
		s.Owners, err = ownersHere()
	}
	return s, err
}

// checkSetuid refuses root to run what a user can make set-user-id.
func (l *Local) checkSetuid(r MountRequest, st layers.Stack) error {
	if mayUseTrusted() && (r.Suid || r.Dev) && (ofUser(st) || !onlyRootWrites(l.store.Root())) {
		return markedf(ErrRefused, "store %q is one of a user, who decides what is set-user-id in it: mount without --suid and --dev, or as that user", l.store.Root())
	}
	return nil
}

// isUpper reports whether a layer is the upper of a container that is mounted read-only:
// layers of images, and the init layer, lie in directories that the store knows.
func isUpper(d layers.LayerDir) bool { return d.CacheID == "" }

// ofUser reports whether the layers are those of a store without privileges.
func ofUser(st layers.Stack) bool {
	return st.Override != override.None ||
		slices.ContainsFunc(st.Lowers, func(d layers.LayerDir) bool { return d.Override != override.None || d.Virtual })
}

// addChain gives a mount the merged index of its lowers. Without one it does the
// same, but looks into every layer.
func (l *Local) addChain(ctx context.Context, s *holder.Spec, st layers.Stack) {
	var err error
	if s.Chain, s.ChainID, err = l.store.ChainIndex(ctx, st); err != nil {
		l.log.Warn("mount without an index of the image", zap.String("id", s.ID), zap.Error(err))
	}
}

func stackDirs(st layers.Stack) []string {
	var dirs []string
	for _, d := range st.Lowers {
		dirs = append(dirs, d.Path)
	}
	if st.Upper != "" {
		dirs = append(dirs, st.Upper, st.Work)
	}
	return dirs
}

// start goes through steps 2 to 5 of the life of a mount (doc.go).
func (l *Local) start(ctx context.Context, spec holder.Spec, row layers.Live, autoRemove bool) (pid int, err error) {
	if err := makeRunDir(l.runDir); err != nil {
		return 0, err
	}
	dir, err := makeMountDir(l.runDir)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			l.removeMountDir(dir)
		}
	}()
	rec := mountRecord{Starter: holder.Self(), ContainerID: row.ContainerID, AutoRemove: autoRemove, Row: &row, Events: true}
	if err := writeRecord(dir, rec); err != nil {
		return 0, fmt.Errorf("run directory of the mount: %w", err)
	}
	logFile, err := os.OpenFile(filepath.Join(dir, holder.LogFile), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return 0, fmt.Errorf("log of the mount: %w", err)
	}
	defer logFile.Close()
	spec.RunDir, row.RunDir = dir, dir
	spec.Events = &holder.EventSource{Dir: l.events.Dir(), Mount: l.mountEvent(row)}

	p, err := holder.Start(ctx, spec, holder.StartOptions{Log: logFile})
	if err != nil {
		return 0, marked(ErrMount, fmt.Errorf("mount on %q: %w", spec.Target, err))
	}
	row.Pid, row.StartTime = p.Process.Pid, p.Process.StartTime
	err = l.withLiveLock(func() error {
		if err := l.checkRows(ctx); err != nil { // others may have mounted meanwhile
			return err
		}
		return l.store.AddLive(ctx, row)
	})
	if err != nil {
		p.Abort()
		return 0, err
	}
	if _, err := p.Go(ctx); err != nil {
		// Also when ctx has ended: the row must go.
		if ferr := l.forget(context.WithoutCancel(ctx), assessment{row: row}); ferr != nil {
			l.log.Warn("row of a failed mount stays until the next start", zap.Error(ferr))
		}
		return 0, marked(ErrMount, fmt.Errorf("mount on %q: %w", spec.Target, err))
	}
	return row.Pid, nil
}

// List implements Service: containers, then read-only mounts of images.
func (l *Local) List(ctx context.Context, _ Empty) ([]Status, error) {
	alive, err := l.liveMounts(ctx)
	if err != nil {
		return nil, err
	}
	containers, err := l.store.Containers(ctx)
	if err != nil {
		return nil, err
	}
	wanted, err := l.pendingWanted(ctx, alive)
	if err != nil {
		return nil, err
	}
	list := []Status{}
	for i := range containers {
		c := &containers[i]
		s := Status{Container: c, ImageID: c.ImageID, ImageName: c.ImageName, State: StateCreated, Since: c.Created}
		if c.State == layers.StateBroken {
			s.State = StateBroken
		}
		have := len(list)
		for _, a := range alive {
			if a.row.ContainerID != c.ID {
				continue
			}
			for _, p := range a.points() {
				list = append(list, mountedStatus(s, p))
			}
		}
		wanted = slices.DeleteFunc(wanted, func(w layers.Wanted) bool {
			if w.ContainerID == c.ID {
				list = append(list, wantedStatus(s, w))
			}
			return w.ContainerID == c.ID
		})
		if len(list) == have {
			list = append(list, s)
		}
	}
	for _, a := range alive {
		if a.row.ContainerID == "" {
			s := l.imageStatus(ctx, a.row.ImageID)
			for _, p := range a.points() {
				list = append(list, mountedStatus(s, p))
			}
		}
	}
	for _, w := range wanted { // of images, and of containers that are gone
		list = append(list, wantedStatus(l.imageStatus(ctx, w.ImageID), w))
	}
	return list, nil
}

func (l *Local) imageStatus(ctx context.Context, id digest.Digest) Status {
	s := Status{ImageID: id}
	if id == "" {
		return s
	}
	if img, err := l.store.ResolveImage(ctx, id.String()); err == nil && len(img.Refs) > 0 {
		s.ImageName = img.Refs[0]
	}
	return s
}

func mountedStatus(s Status, a assessment) Status {
	s.State, s.Target, s.ReadOnly, s.Since = a.state, Path(a.target()), a.readOnly(), a.row.Created
	s.Pid, s.ServerPid, s.Restarts, s.Refused = a.row.Pid, a.holder.Server.Pid, a.holder.Restarts, a.holder.Refused
	s.Elsewhere = a.state == StateMounted && a.mount == nil
	if rec, err := readRecord(a.row.RunDir); err == nil {
		s.AutoRemove = rec.AutoRemove
	}
	return s
}
