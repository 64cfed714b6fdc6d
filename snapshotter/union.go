package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs"
)

// union says what is to be mounted where. Without an upper it is read-only.
type union struct {
	id          string
	target, run string
	lowers      []string // topmost first
	upper, work string
	owners      unionfs.Owners
}

// unions mounts and unmounts.
type unions interface {
	// mount returns when the union is mounted, be it since long.
	mount(ctx context.Context, u union) error
	// unmount returns when the union is not mounted any more, nothing can write to its
	// upper, and that is on the disk. With force it matters only that it is out of the tree.
	unmount(ctx context.Context, u union, force bool) error
}

// processes has each union served by processes of its own (package holder).
type processes struct{ log *zap.Logger }

func (p processes) mount(ctx context.Context, u union) error {
	table, err := holder.MountTable(0)
	if err != nil {
		return err
	}
	switch m := holder.TopMount(table, u.target); {
	case m == nil:
		if by, yes := servedBy(ctx, u); yes {
			return markedf(layers.ErrInUse, "the union on %q was unmounted, but is still in use and served by process %d: end its users first", u.target, by.Pid)
		}
	case !holder.IsOurs(m):
		return markedf(layers.ErrInUse, "a mount of type %s is on %q: unmount it", m.FSType, u.target)
	default:
		var st unix.Statfs_t
		err := unix.Statfs(u.target, &st)
		if err == nil && u.upper != "" && st.Flags&unix.ST_RDONLY != 0 {
			p.log.Info("a commit has ended halfway: the union is made writable again", zap.String("name", u.target))
			return mountd.RawMount(ctx, &mountd.RawOptions{Remount: true}, u.target)
		}
		if err == nil {
			return nil
		}
		p.log.Warn("the processes of a union have died: it is mounted again", zap.String("name", u.target), zap.Error(err))
		if _, err := holder.Detach(table, m.Major, m.Minor); err != nil {
			return fmt.Errorf("detach a dead mount: %w", err)
		}
	}
	if err := u.mkdirs(); err != nil {
		return fmt.Errorf("directories of the union on %q: %w", u.target, err)
	}
	spec, err := u.spec()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(u.run, holder.LogFile), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("log of the union: %w", err)
	}
	defer log.Close()
	pending, err := holder.Start(ctx, spec, holder.StartOptions{Log: log})
	if err != nil {
		return fmt.Errorf("mount a union on %q: %w", u.target, err)
	}
	if _, err := pending.Go(ctx); err != nil {
		return fmt.Errorf("mount a union on %q: %w", u.target, err)
	}
	return nil
}

// mkdirs makes what a mount needs. What an earlier one has said of itself is not true any more.
func (u union) mkdirs() error {
	if err := os.RemoveAll(u.run); err != nil {
		return err
	}
	for _, d := range []string{u.target, u.run, u.work} {
		if d == "" {
			continue
		}
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	return nil
}

func (u union) spec() (holder.Spec, error) {
	o := mountd.RawOptions{
		Lowers: u.lowers, Upper: u.upper, Work: u.work, Owners: u.owners,
		FSName: "plyfs", Subtype: "plyfs", AllowOther: os.Geteuid() == 0,
		// Layers with parents are written by unions of ours, and by nobody else.
		Redirect: "on", Metacopy: true,
	}
	s, err := o.Spec(u.target)
	if err != nil {
		return s, fmt.Errorf("mount a union: %w", err)
	}
	s.ID, s.RunDir = u.id, u.run
	return s, nil
}

// patience is how long the processes of a union that was just unmounted may take to end.
const patience = 2 * time.Second

// servedBy returns a process that still serves a union which is not in the mount table. One
// that is left alone in a namespace, for example that of a rootlesskit which has ended, is
// ended first.
func servedBy(ctx context.Context, u union) (holder.Process, bool) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if st, err := holder.ReadState(u.run); err == nil && st.Target == u.target {
		holder.EndLeft(st)
	}
	for _, p := range holder.ProcessesOf(u.target) {
		if err := p.WaitGone(ctx); err != nil {
			return p, true
		}
	}
	return holder.Process{}, false
}

// freeze makes a union read-only everywhere, also where it is bound to and in other mount
// namespaces. That is refused while a file in it is open for writing.
func (p processes) freeze(ctx context.Context, u union) error {
	table, err := holder.MountTable(0)
	if err != nil || holder.TopMount(table, u.target) == nil {
		return err
	}
	err = mountd.RawMount(ctx, &mountd.RawOptions{Remount: true, ReadOnly: true}, u.target)
	if errors.Is(err, unix.EBUSY) {
		return markedf(layers.ErrInUse, "a file of the union on %q is open for writing: end its users first", u.target)
	}
	return err
}

func (p processes) unmount(ctx context.Context, u union, force bool) error {
	if !force {
		if err := p.freeze(ctx, u); err != nil {
			return err
		}
	}
	r := mountd.UnmountRequest{Name: mountd.Path(u.target), Target: mountd.Path(u.target)}
	res, err := mountd.UnmountRaw(ctx, r)
	if errors.Is(err, layers.ErrInUse) {
		p.log.Warn("the union of a snapshot is taken from its users", zap.Error(err))
		r.Lazy = true
		res, err = mountd.UnmountRaw(ctx, r)
	}
	switch {
	case errors.Is(err, layers.ErrNotFound):
		if by, yes := servedBy(ctx, u); yes && !force {
			return markedf(layers.ErrInUse, "the union on %q was unmounted, but is still in use and served by process %d: end its users first", u.target, by.Pid)
		}
	case err != nil:
		return err
	case res.StillInUse:
		p.log.Warn("a union lives on until its last user ends", zap.String("name", u.target), zap.String("by", res.By))
		if !force { // read-only: its server has nothing left to write, but waits with its sync
			if err := syncTree(u.upper); err != nil {
				return err
			}
		}
	}
	if err := holder.ReadExit(u.run); err != nil && !force {
		return fmt.Errorf("the union on %q did not end well: %w", u.target, err)
	}
	return nil
}

// The labels by which containerd asks for other owners than the layers have, each a list of
// CONTAINER:HOST:LENGTH, joined by commas.
const (
	labelUIDs = "containerd.io/snapshot/uidmapping"
	labelGIDs = "containerd.io/snapshot/gidmapping"
)

// ownersOf reads the id map of a snapshot.
func ownersOf(labels map[string]string) (o unionfs.Owners, mapped bool, err error) {
	for _, l := range []struct {
		name string
		to   *unionfs.IDMap
	}{{labelUIDs, &o.UIDs}, {labelGIDs, &o.GIDs}} {
		v, ok := labels[l.name]
		if !ok || v == "" {
			continue
		}
		m, err := mountd.ParseIDs(strings.ReplaceAll(v, ",", ":"))
		if err != nil {
			return o, false, markedf(layers.ErrInvalid, "label %s=%s: %v", l.name, v, err)
		}
		*l.to, mapped = m, true
	}
	return o, mapped, nil
}
