package holder

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// A raw mount has no directory for what is to be known of it. Its server keeps the spec in
// a memory file, which those can read who may look at the server's descriptors: its user
// and root.

// specName is the name of that file, as procfs shows it.
const specName = "plyfs-spec"

// maxSpec bounds what is read of it.
const maxSpec = 16 << 20

// publish makes the spec readable for [PublishedSpec]. Without it the mount works as well.
func (s *Spec) publish() (*os.File, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate(specName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate(specName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("memory for the mount spec: %w", err)
	}
	f := os.NewFile(uintptr(fd), specName)
	if _, err = f.Write(b); err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		_ = f.Close() // nobody knows of it
		return nil, fmt.Errorf("memory for the mount spec: %w", err)
	}
	return f, nil
}

// ErrNoSpec says that no process of a mount could be asked what the mount is made of.
var ErrNoSpec = errors.New("no process of it tells")

// PublishedSpec returns the spec of a mount of the table, which may be a bind mount, from its
// server. Only processes of the user who has made the mount are believed.
func PublishedSpec(table []*mountinfo.Info, m *mountinfo.Info) (Spec, error) {
	why := error(ErrNoSpec)
	for _, at := range DeviceMounts(table, m.Major, m.Minor) {
		for _, p := range ProcessesOf(at.Mountpoint) {
			s, err := specOf(p.Pid, mountUser(m))
			switch {
			case err == nil && s.Target == at.Mountpoint && s.Validate() == nil:
				return s, nil
			case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM):
				why = fmt.Errorf("process %d serves it, and may not be asked: %w", p.Pid, err)
			}
		}
	}
	return Spec{}, why
}

// mountUser is the user id in the options of a FUSE mount; -1 if there is none.
func mountUser(m *mountinfo.Info) int {
	for o := range strings.SplitSeq(m.VFSOptions, ",") {
		if v, ok := strings.CutPrefix(o, "user_id="); ok {
			if id, err := strconv.Atoi(v); err == nil {
				return id
			}
		}
	}
	return -1
}

// specOf reads the spec that a process of the user uid publishes.
func specOf(pid, uid int) (s Spec, err error) {
	dir := "/proc/" + strconv.Itoa(pid)
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return s, err
	}
	if int(st.Uid) != uid {
		return s, fmt.Errorf("process %d belongs to user %d, the mount to %d: %w", pid, st.Uid, uid, ErrNoSpec)
	}
	fds, err := os.ReadDir(dir + "/fd")
	if err != nil {
		return s, reason(err)
	}
	for _, fd := range fds {
		link := dir + "/fd/" + fd.Name()
		if to, err := os.Readlink(link); err != nil || !strings.HasPrefix(to, "/memfd:"+specName+" ") {
			continue
		}
		f, err := os.Open(link)
		if err != nil {
			return s, reason(err)
		}
		defer f.Close()
		// Others of its threads share the offset of the original, not ours.
		b, err := io.ReadAll(io.LimitReader(f, maxSpec))
		if err == nil {
			err = json.Unmarshal(b, &s)
		}
		return s, err
	}
	return s, ErrNoSpec
}

// reason is the errno of an error that names a path of procfs.
func reason(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}
