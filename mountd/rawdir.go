package mountd

import (
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

// LiveMount is a mount whose server can be asked about it.
type LiveMount struct {
	RunDir string
	State  holder.State
	// Point is where it is mounted, as far as the path that led to it says.
	Point *mountinfo.Info
	// Inside is the path in the mount, "/" its root.
	Inside string
}

// FindLive finds the mount that a path lies in, whichever store of this user it is of, or of
// none. The last component of the path is not followed.
func FindLive(path string) (LiveMount, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return LiveMount{}, err
	}
	abs = canonicalTarget(abs)
	m, inside, err := liesIn(abs)
	if err != nil {
		return LiveMount{}, err
	}
	if !holder.IsOurs(m) {
		return LiveMount{}, markedf(layers.ErrNotFound, "%q lies in a file system of type %s on %q, which is no mount of plyfs", path, m.FSType, m.Mountpoint)
	}
	dirs, _ := filepath.Glob(filepath.Join(rawBase(), "*")) // the pattern is right
	more, _ := filepath.Glob(filepath.Join(RunBase(), "*", "mounts", "*"))
	dirs = append(dirs, more...)
	if root, err := DefaultRoot(); err == nil { // the default of `plyfs snapshotter`
		unions, _ := filepath.Glob(filepath.Join(root, "snapshotter", "snapshots", "*", "run"))
		dirs = append(dirs, unions...)
	}
	for _, dir := range dirs {
		st, err := holder.ReadState(dir)
		if err == nil && st.Major == m.Major && st.Minor == m.Minor && !st.Ended && (st.Holder.Alive() || st.Server.Alive()) {
			return LiveMount{dir, st, m, inside}, nil
		}
	}
	return LiveMount{}, markedf(layers.ErrNotFound, "no server that we can ask has mounted %q: it is of another user, of plyfs with another %s, or no mount of plyfs", m.Mountpoint, RunDirEnv)
}

// liesIn returns the mount that an absolute path lies in, and the path in the file system.
func liesIn(path string) (*mountinfo.Info, string, error) {
	table, err := holder.MountTable(0)
	if err != nil {
		return nil, "", err
	}
	// Nothing that may hang is asked: the mount with the longest fitting name that is not covered.
	for at := path; ; at = filepath.Dir(at) {
		if m := holder.TopMount(table, at); m != nil {
			rest, err := filepath.Rel(at, path)
			if err != nil {
				return nil, "", err
			}
			return m, filepath.Join(m.Root, rest), nil
		}
		if at == "/" {
			return nil, "", fmt.Errorf("%q lies in no mount that we see: %w", path, unix.ENOENT)
		}
	}
}
