package mountd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/moby/sys/mountinfo"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/events"
	"github.com/plyfs/plyfs/mountd/holder"
)

// mountRecord is RunDir/mount.json: what the live row has no place for.
type mountRecord struct {
	Starter     holder.Process `json:"starter"`
	ContainerID string         `json:"containerID,omitempty"`
	AutoRemove  bool           `json:"autoRemove,omitempty"`
	// Row is the live row, as far as it is known before the mount: a database that
	// has been made anew gets it back from here.
	Row *layers.Live `json:"row,omitempty"`
	// Events: the holder writes events, that of its end too.
	Events bool `json:"events,omitempty"`
}

const recordFile = "mount.json"

func writeRecord(runDir string, r mountRecord) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(runDir, recordFile), b, 0o600)
}

func readRecord(runDir string) (r mountRecord, err error) {
	b, err := os.ReadFile(filepath.Join(runDir, recordFile))
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	return r, err
}

// facts are what reconcile finds out about a live row before it decides.
type facts struct {
	thisBoot    bool // the row is of this boot
	holderAlive bool
	serverAlive bool
	wasLive     bool // the holder has reported the mount live
	inTable     bool // in the mount table of the holder, the server or us
}

// verdict is the whole rule; it depends on nothing but the facts.
func verdict(f facts) string {
	alive := f.holderAlive || f.serverAlive
	switch {
	case !f.thisBoot:
		return stateElsewhere
	case alive && f.inTable:
		return StateMounted
	case alive && !f.wasLive:
		return StateStarting
	case alive:
		return StateDetached // out of the tree, but its upper is still written to
	case f.inTable:
		return StateDead
	default:
		return stateGone
	}
}

// assessment is a row with what is behind it.
type assessment struct {
	row    layers.Live
	state  string
	holder holder.State
	mount  *mountinfo.Info   // in our own table, if we see it
	mounts []*mountinfo.Info // the same on all its mount points
}

// target is where the mount is now: a directory above it may have been renamed.
func (a *assessment) target() string {
	if a.mount != nil {
		return a.mount.Mountpoint
	}
	return a.row.Target
}

// assess compares a row with processes and mount tables. Nothing inside a
// mount is touched, so a hanging server does not hang us.
//
// A device number is used again as soon as its file system is gone, which may be before its
// processes are: a mount point that another row claims is that row's.
func assess(row layers.Live, own []*mountinfo.Info, c claims) assessment {
	a := assessment{row: row}
	f := facts{thisBoot: row.BootID == holder.BootID()}
	if !f.thisBoot {
		a.state = verdict(f)
		return a
	}
	hp := holder.Process{Pid: row.Pid, StartTime: row.StartTime}
	st, err := holder.ReadState(row.RunDir)
	f.wasLive = err == nil && row.RunDir != ""
	if f.wasLive {
		a.holder = st
	} else {
		a.holder = holder.State{Target: row.Target, Holder: hp}
	}
	f.holderAlive = hp.Alive()
	f.serverAlive = a.holder.Server.Alive()
	find := func(table []*mountinfo.Info) *mountinfo.Info {
		if f.wasLive && st.Minor != 0 {
			return holder.FindMount(c.mounts(table, st.Major, st.Minor, row), row.Target)
		}
		if m := holder.TopMount(table, row.Target); m != nil && holder.IsOurs(m) {
			return m
		}
		return nil
	}
	a.mount = find(own)
	if a.mount != nil {
		a.mounts = points(c.mounts(own, a.mount.Major, a.mount.Minor, row))
	}
	f.inTable = a.mount != nil
	for _, p := range []holder.Process{hp, a.holder.Server} {
		if f.inTable || !p.Alive() {
			continue
		}
		// It may live in a mount namespace that we do not see.
		if table, err := holder.MountTable(p.Pid); err == nil {
			f.inTable = find(table) != nil
		}
	}
	a.state = verdict(f)
	return a
}

// claims are the run directories of rows by their mount points.
type claims map[string]string

func claimsOf(rows []layers.Live) claims {
	c := make(claims, len(rows))
	for _, r := range rows {
		if r.BootID == holder.BootID() {
			c[r.Target] = r.RunDir
		}
	}
	return c
}

// mounts returns those of a device number that are not on the mount point of another row,
// oldest first.
func (c claims) mounts(table []*mountinfo.Info, major, minor int, row layers.Live) []*mountinfo.Info {
	return slices.DeleteFunc(holder.DeviceMounts(table, major, minor), func(m *mountinfo.Info) bool {
		dir, claimed := c[m.Mountpoint]
		return claimed && dir != row.RunDir && m.Mountpoint != row.Target
	})
}

// reconcile removes what belongs to dead mounts: the dead entry of the mount
// table first, then the row, then the run directory, so that a stop between
// any two steps is found again.
func (l *Local) reconcile(ctx context.Context) error {
	_, err := l.liveMounts(ctx)
	return err
}

// liveMounts reconciles and returns the rows that have something behind them.
func (l *Local) liveMounts(ctx context.Context) ([]assessment, error) {
	return l.reconciled(ctx, func(layers.Finding) {})
}

// reconciled is liveMounts, and tells which mounts had no row.
func (l *Local) reconciled(ctx context.Context, lost func(layers.Finding)) ([]assessment, error) {
	rows, err := l.store.LiveMounts(ctx)
	if err != nil {
		return nil, err
	}
	table, err := holder.MountTable(0)
	if err != nil {
		return nil, err
	}
	c := claimsOf(rows)
	var alive []assessment
	known := map[string]bool{}
	for _, row := range rows {
		a := assess(row, table, c)
		if a.state == StateDead && (holder.Reused(table, a.mount.Major, a.mount.Minor) || l.detachDead(a, table)) {
			a.state, a.mount, a.mounts = stateGone, nil, nil
		}
		switch a.state {
		case stateGone, stateElsewhere:
			if err := l.forget(ctx, a); err != nil {
				return nil, err
			}
		default:
			// The server stands in for a holder that was killed, until there is another.
			p := holder.Process{Pid: row.Pid, StartTime: row.StartTime}
			if a.holder.Server.Alive() && !p.Alive() || p == a.holder.Server && p != a.holder.Holder && a.holder.Holder.Alive() {
				if err := l.adopt(ctx, &a); err != nil {
					return nil, err
				}
			}
			alive = append(alive, a)
			known[row.RunDir] = true
		}
	}
	for _, dir := range l.sweepRunDirs(known) {
		f, row, ok := l.attach(ctx, dir)
		if f != nil {
			lost(*f)
		}
		if ok {
			alive = append(alive, assess(row, table, c))
		}
	}
	return alive, nil
}

// attach gives a mount that is alive, but has no row, one. So it is after the database
// has been made anew.
func (l *Local) attach(ctx context.Context, dir string) (f *layers.Finding, row layers.Live, ok bool) {
	st, err := holder.ReadState(dir)
	rec, rerr := readRecord(dir)
	if err != nil || rerr != nil {
		return nil, row, false
	}
	if rec.Row != nil {
		row = *rec.Row
	} else { // an older version has written it
		row = layers.Live{ContainerID: rec.ContainerID}
	}
	p := st.Holder
	if !p.Alive() {
		p = st.Server
	}
	row.Target, row.Pid, row.StartTime, row.RunDir, row.BootID = st.Target, p.Pid, p.StartTime, dir, holder.BootID()
	if row.ContainerID != "" {
		row.ImageID, row.ChainID = "", ""
	}
	f = &layers.Finding{Invariant: "K15", Severity: layers.SeverityError, Object: st.Target, Problem: fmt.Sprintf("a mount of process %d has no row", p.Pid)}
	err = l.withLiveLock(func() error {
		rows, err := l.store.LiveMounts(ctx)
		if err != nil {
			return err
		}
		for _, r := range rows {
			if r.RunDir == dir { // it has come meanwhile
				f = nil
				return nil
			}
		}
		return l.store.AddLive(ctx, row)
	})
	switch {
	case f == nil:
		return nil, row, false
	case err != nil:
		f.Problem += ": " + err.Error()
		f.Repair = "none: unmount it with umount(8)"
		return f, row, false
	}
	f.Fixed, f.Repair = true, "make the row anew"
	return f, row, true
}

// settleTimeout is how long a command waits for a mount that was just taken out
// of the tree, by umount(8) for one, to be synced and end.
const settleTimeout = 5 * time.Second

// settledMounts is liveMounts, but gives mounts that concern the caller and are
// about to end the time to do so.
func (l *Local) settledMounts(ctx context.Context, concerns func(layers.Live) bool) ([]assessment, error) {
	alive, err := l.liveMounts(ctx)
	if err != nil {
		return nil, err
	}
	var ending []holder.Process
	for _, a := range alive {
		if a.state == StateDetached && concerns(a.row) {
			ending = append(ending, holder.Process{Pid: a.row.Pid, StartTime: a.row.StartTime}, a.holder.Server)
		}
	}
	if len(ending) == 0 {
		return alive, nil
	}
	if _, err := waitGone(ctx, ending, settleTimeout); err != nil {
		return nil, err
	}
	return l.liveMounts(ctx)
}

// adopt makes another holder the process of a row whose holder was killed, or the mount
// server as long as there is none, so that the store sees the mount alive as well.
func (l *Local) adopt(ctx context.Context, a *assessment) error {
	return l.withLiveLock(func() error {
		now, err := l.sameRow(ctx, a.row)
		if err != nil || !now {
			return err
		}
		p := a.holder.Server
		if a.holder.Holder.Alive() {
			p = a.holder.Holder
		}
		a.row.Pid, a.row.StartTime = p.Pid, p.StartTime
		row := a.row
		if row.ContainerID != "" { // the store fills in the image by itself
			row.ImageID, row.ChainID = "", ""
		}
		l.log.Warn("the holder of a mount was killed; the mount goes on", zap.String("op", "reconcile"), zap.String("target", a.row.Target))
		return l.store.AddLive(ctx, row) // in place of the row of a dead process
	})
}

// sameRow reports whether the row is still there as it was read.
func (l *Local) sameRow(ctx context.Context, row layers.Live) (bool, error) {
	rows, err := l.store.LiveMounts(ctx)
	if err != nil {
		return false, err
	}
	for _, r := range rows {
		if r.Target == row.Target && r.Pid == row.Pid && r.StartTime == row.StartTime {
			return true, nil
		}
	}
	return false, nil
}

// detachDead takes a mount without processes out of the tree.
func (l *Local) detachDead(a assessment, table []*mountinfo.Info) bool {
	covered, err := holder.Detach(table, a.mount.Major, a.mount.Minor)
	if err != nil || len(covered) > 0 {
		l.log.Warn("a dead mount could not be detached", zap.String("op", "reconcile"), zap.String("target", a.mount.Mountpoint),
			zap.Strings("covered", covered), zap.Error(err))
		return false
	}
	l.log.Warn("detached a dead mount", zap.String("op", "reconcile"), zap.String("target", a.mount.Mountpoint))
	return true
}

// forget removes a row that is still the one that was looked at, and its run
// directory.
func (l *Local) forget(ctx context.Context, a assessment) error {
	killed, unmounted := false, false
	err := l.withLiveLock(func() error {
		now, err := l.sameRow(ctx, a.row)
		if err != nil || !now {
			return err // gone: somebody else was faster
		}
		rec, rerr := readRecord(a.row.RunDir)
		st, serr := holder.ReadState(a.row.RunDir)
		err = l.store.RemoveLive(ctx, a.row.Target)
		killed = err == nil && rerr == nil && serr == nil && rec.Events && !st.Ended
		unmounted = err == nil && serr == nil && st.Ended && holder.ReadExit(a.row.RunDir) == nil
		return err
	})
	if err != nil {
		return err
	}
	if unmounted {
		l.unmounted(ctx, a.row)
	}
	if killed { // nobody was left to say so
		e := l.mountEvent(a.row)
		e.Pid, e.Error = a.row.Pid, "its processes were killed"
		l.emit(events.Event{Type: events.TypeMount, Action: events.End, Mount: &e})
	}
	l.log.Info("forgot a mount", zap.String("op", "reconcile"), zap.String("target", a.row.Target))
	l.removeMountDir(a.row.RunDir)
	return nil
}

// sweepRunDirs removes run directories of mounts that were given up before
// they had a row, and returns those of mounts that are alive without one.
func (l *Local) sweepRunDirs(known map[string]bool) (lost []string) {
	dir := filepath.Join(l.runDir, "mounts")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, e := range entries {
		d := filepath.Join(dir, e.Name())
		if known[d] {
			continue
		}
		rec, err := readRecord(d)
		if err == nil && rec.Starter.Alive() {
			continue // between its directory and its row
		}
		if info, ierr := e.Info(); err != nil && ierr == nil && time.Since(info.ModTime()) < time.Minute {
			continue // not even its record is written
		}
		if st, err := holder.ReadState(d); err == nil && (st.Holder.Alive() || st.Server.Alive()) {
			lost = append(lost, d) // its row came after we read the rows, or was in a lost database
			continue
		}
		l.removeMountDir(d)
	}
	return lost
}

// removeMountDir removes the run directory of one mount: only below our own,
// whatever a row says.
func (l *Local) removeMountDir(dir string) {
	if dir == "" || filepath.Dir(dir) != filepath.Join(l.runDir, "mounts") {
		return
	}
	err := os.RemoveAll(dir)
	// A holder that has come a moment ago may be writing its state.
	for try := 0; errors.Is(err, unix.ENOTEMPTY) && try < 20; try++ {
		<-time.After(5 * time.Millisecond)
		err = os.RemoveAll(dir)
	}
	if err != nil {
		l.log.Warn("run directory not removed", zap.String("name", dir), zap.Error(err))
	}
}

// withLiveLock runs f, which looks at live rows and changes them, while no
// other process of this user does the same. f must be short.
func (l *Local) withLiveLock(f func() error) error {
	if err := makeRunDir(l.runDir); err != nil {
		return err
	}
	unlock, err := lockFile(filepath.Join(l.runDir, "live.lock"), true)
	if err != nil {
		return fmt.Errorf("live rows: %w", err)
	}
	defer unlock()
	return f()
}
