package mountd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/holder"
)

// A raw mount has a run directory as well, in RunBase/raw, where its server can be asked
// about it (holder.StatsFile, holder.ControlFile). It is the mount's own: its holder
// removes it, and where both processes were killed, the next raw mount does.

func rawBase() string { return filepath.Join(RunBase(), "raw") }

// giveRunDir makes the run directory of a raw mount. A mount without one is worth more
// than none: it only cannot be watched.
func giveRunDir(s *holder.Spec) error {
	base := rawBase()
	for _, d := range []string{filepath.Dir(base), base} {
		if err := os.Mkdir(d, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("run directory %q: %w", d, reason(err))
		}
		if err := ownedByUs(d); err != nil {
			return err
		}
	}
	sweepRaw(base)
	// The name tells whose it is until there is a state.
	self := holder.Self()
	dir, err := os.MkdirTemp(base, fmt.Sprintf("%d-%d-", self.Pid, self.StartTime))
	if err != nil {
		return fmt.Errorf("run directory of the mount: %w", reason(err))
	}
	s.RunDir, s.OwnRunDir = dir, true
	return nil
}

// dropRunDir removes the run directory of a raw mount that was not made.
func dropRunDir(s *holder.Spec) {
	if s.OwnRunDir {
		_ = os.RemoveAll(s.RunDir) // the next mount tries again
	}
}

// rawYoung is how long a directory is left alone that says nothing yet.
const rawYoung = time.Minute

// sweepRaw removes what mounts have left whose processes were killed.
func sweepRaw(base string) {
	entries, err := os.ReadDir(base)
	if err != nil {
		return
	}
	for _, e := range entries {
		dir := filepath.Join(base, e.Name())
		st, err := holder.ReadState(dir)
		switch {
		case err == nil && (st.Holder.Alive() || st.Server.Alive()):
			continue
		case err != nil:
			// Its starter may live, or its holder may be about to write the state.
			var p holder.Process
			if n, _ := fmt.Sscanf(e.Name(), "%d-%d-", &p.Pid, &p.StartTime); n == 2 && p.Alive() {
				continue
			}
			if info, err := e.Info(); err != nil || time.Since(info.ModTime()) < rawYoung {
				continue
			}
		}
		_ = os.RemoveAll(dir) // another one may be faster, or the next mount tries again
	}
}

// LiveServer is a mount whose server can be asked about it.
type LiveServer struct {
	LivePlace
	RunDir string
	State  holder.State
}

// FindServer finds the mount that a path lies in (see [FindLive]), and where its server can be
// asked: whichever store it is of, or of none. Root is led to the servers of users as well.
func FindServer(path string) (LiveServer, error) {
	at, err := findLive(path, "name a mount or a container, see `plyfs stats`")
	if err != nil {
		return LiveServer{}, err
	}
	return at.server()
}

// FindServerOf finds the server of a mount of a store, also in a mount namespace that we do
// not see.
func FindServerOf(m Status) (LiveServer, error) {
	if !m.Elsewhere {
		return FindServer(string(m.Target))
	}
	for _, dir := range runDirs() {
		st, err := holder.ReadState(dir)
		if err != nil || st.Ended || m.Pid == 0 || st.Holder.Pid != m.Pid || !st.Holder.Alive() {
			continue
		}
		if ownedByUs(dir) == nil {
			return LiveServer{LivePlace{mount: &mountinfo.Info{Mountpoint: string(m.Target)}}, dir, st}, nil
		}
	}
	return LiveServer{}, markedf(layers.ErrNotFound, "the mount on %q is in another mount namespace, and has no server that can be asked: it is of another user, or of plyfs with another %s",
		string(m.Target), RunDirEnv)
}

// Mountpoint is where the mount is.
func (at LivePlace) Mountpoint() string { return at.mount.Mountpoint }

func (at LivePlace) server() (LiveServer, error) {
	m := at.mount
	if !holder.IsOurs(m) {
		return LiveServer{}, markedf(ErrUsage, "%q is a mount of type %s, not of plyfs", m.Mountpoint, m.FSType)
	}
	user := holder.MountUser(m)
	for _, dir := range runDirs() {
		st, err := holder.ReadState(dir)
		if err != nil || st.Major != m.Major || st.Minor != m.Minor || st.Ended || !st.Holder.Alive() && !st.Server.Alive() {
			continue
		}
		// Nobody is to pass for the server of another user's mount.
		var info unix.Stat_t
		if unix.Lstat(dir, &info) == nil && user >= 0 && int(info.Uid) == user {
			return LiveServer{at, dir, st}, nil
		}
	}
	return LiveServer{}, markedf(layers.ErrNotFound, "the mount on %q has no server that can be asked: it is of another user, of plyfs with another %s, or not of plyfs",
		m.Mountpoint, RunDirEnv)
}

// runDirs are the run directories of all mounts that may be asked about.
func runDirs() (dirs []string) {
	bases := []string{RunBase()}
	if os.Geteuid() == 0 {
		for _, pattern := range []string{"/run/user/*/plyfs", "/tmp/plyfs-*"} {
			more, _ := filepath.Glob(pattern) // the pattern is right
			bases = append(bases, more...)
		}
	}
	patterns := []string{}
	for _, b := range bases {
		patterns = append(patterns, filepath.Join(b, "raw", "*"), filepath.Join(b, "*", "mounts", "*"))
	}
	if root, err := DefaultRoot(); err == nil { // the default of `plyfs snapshotter`
		patterns = append(patterns, filepath.Join(root, "snapshotter", "snapshots", "*", "run"))
	}
	for _, p := range patterns {
		more, _ := filepath.Glob(p) // a base with odd characters has no mounts that are found
		dirs = append(dirs, more...)
	}
	return dirs
}

// RawStats collects what the servers of mounts have counted that belong to no store: `plyfs
// overlay`, mount helpers, engines. A server that does not answer is no error.
func RawStats(ctx context.Context) []MountStats {
	var all []MountStats
	dirs, _ := filepath.Glob(filepath.Join(rawBase(), "*")) // a base with odd characters has no mounts that are found
	for _, dir := range dirs {
		if st, err := holder.ReadState(dir); err == nil && !st.Ended && (st.Holder.Alive() || st.Server.Alive()) {
			all = append(all, rawStats(ctx, dir, st))
		}
	}
	return all
}

// RawStatsOf is RawStats of the mount that a path lies in.
func RawStatsOf(ctx context.Context, path string) (MountStats, error) {
	s, err := FindServer(path)
	if err != nil {
		return MountStats{}, err
	}
	return rawStats(ctx, s.RunDir, s.State), nil
}

func rawStats(ctx context.Context, dir string, st holder.State) MountStats {
	m := MountStats{ID: filepath.Base(dir), Target: Path(st.Target), State: StateMounted, Restarts: st.Restarts}
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	got, err := holder.ReadStats(ctx, dir)
	if err != nil {
		m.Problem = err.Error()
		return m
	}
	m.IO, m.Since, m.Restarts, m.Counters = got.IO, got.Since, got.Restarts, &got.Counters
	if m.Restarts == 0 {
		m.Mounted = m.Since
	}
	return m
}
