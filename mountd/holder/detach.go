package holder

import (
	"errors"
	"time"

	"github.com/moby/sys/mountinfo"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/transport"
)

// detach takes the mount, if it is ours and still there, out of the tree.
func (h *holder) detach() {
	if h.dev == nil {
		return
	}
	table, err := MountTable(0)
	if err != nil {
		h.log.Warn("cannot look for the dead mount", zap.Error(err))
		return
	}
	if h.disconnected() && Reused(table, h.state.Major, h.state.Minor) {
		return // unmounted; while we are connected the number is ours
	}
	covered, err := Detach(table, h.state.Major, h.state.Minor)
	if err != nil || len(covered) > 0 {
		h.log.Warn("dead mount not detached", zap.String("target", h.spec.Target), zap.Strings("covered", covered), zap.Error(err))
	}
}

// unmountAll unmounts the mount from all its mount points that we see, the last one first.
func (h *holder) unmountAll(lazy bool) error {
	table, err := MountTable(0)
	ms := DeviceMounts(table, h.state.Major, h.state.Minor)
	if err != nil || len(ms) == 0 {
		return transport.Unmount(h.spec.Target, lazy)
	}
	for i := len(ms) - 1; i >= 0 && err == nil; i-- {
		err = transport.Unmount(ms[i].Mountpoint, lazy)
	}
	return err
}

// disconnected reports whether the kernel has ended the connection.
func (h *holder) disconnected() bool {
	p := []unix.PollFd{{Fd: int32(h.dev.Fd())}}
	_, err := unix.Poll(p, 0)
	return err == nil && p[0].Revents&unix.POLLERR != 0
}

// deadAnswer bounds how long a mount is given to say that it is dead: the
// kernel says so without asking anybody.
const deadAnswer = 2 * time.Second

// Reused reports whether the device number of a mount that has ended belongs to
// somebody else's by now: numbers are used again after an unmount. A mount that
// answers, or may yet, is not a dead one. Those below another mount cannot be
// asked; [Detach] leaves them alone.
func Reused(table []*mountinfo.Info, major, minor int) bool {
	for _, m := range DeviceMounts(table, major, minor) {
		if TopMount(table, m.Mountpoint) == m && !dead(m.Mountpoint) {
			return true
		}
	}
	return false
}

// dead reports whether the connection behind a mount point has ended.
func dead(mountpoint string) bool {
	answer := make(chan error, 1)
	go func() { // stays as long as a hanging server does
		var st unix.Statfs_t
		answer <- unix.Statfs(mountpoint, &st)
	}()
	select {
	case err := <-answer:
		// The latter if the connection ended while the question was on its way.
		return errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED)
	case <-time.After(deadAnswer):
		return false
	}
}
