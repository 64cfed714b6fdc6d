package holder

import (
	"errors"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fault"
	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/mountd/confine"
)

// NoChroot is the environment variable that, if it is not empty, leaves servers the tree of files.
const NoChroot = "PLYFS_NO_CHROOT"

// confine takes from the server what it needs no more: everything is open. What cannot be had is
// said in the log, and the mount goes on without.
//
// A server without a spare holder has to unmount by itself where its holder is killed. So it
// keeps the tree of files, in which its mount point is, and the call for that, or, as a user's,
// everything: it executes fusermount3, which is setuid and needs the calls of a mount.
func (s *server) confine() {
	root := os.Geteuid() == 0 && hasCapability(unix.CAP_SYS_ADMIN)
	if s.spec.GoFuse || !s.keep && !root {
		return
	}
	if root && s.keep && os.Getenv(NoChroot) == "" {
		if err := confine.Root(); err != nil {
			s.log.Warn("the mount server sees all files", zap.Error(err))
		} else {
			fsat.ProcIsRoot()
		}
	}
	if root {
		if err := confine.DropChroot(); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			s.log.Warn("the mount server keeps CAP_SYS_CHROOT", zap.Error(err))
		}
	}
	if os.Getenv(confine.NoFilter) != "" {
		return
	}
	o := confine.Options{Unmount: !s.keep, Kill: os.Getenv(fault.Env) != ""}
	if err := confine.Filter(o); err != nil {
		s.log.Warn("the mount server may make any system call", zap.Error(err))
	}
}

func hasCapability(c uint) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	return unix.Capget(&header, &have[0]) == nil && have[c/32].Effective&(1<<(c%32)) != 0
}

// setSpare takes over the socket of a spare holder.
func (s *server) setSpare(f *os.File) {
	l, err := linkFromFile(f)
	if err != nil {
		s.log.Warn("this mount will not outlive its holder", zap.String("target", s.spec.Target), zap.Error(err))
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.spare != nil {
		s.spare.close()
	}
	s.spare = l
}

// spareEnd is how long a spare holder is given to end: nobody who waits for the end of this
// mount should find it.
const spareEnd = time.Second

// closeSpare ends the spare holder.
func (s *server) closeSpare() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.spare == nil {
		return
	}
	_ = s.spare.c.CloseWrite()
	_ = s.spare.c.SetReadDeadline(time.Now().Add(spareEnd))
	_, _ = s.spare.c.Read(make([]byte, 1)) // its end closes the other end
	s.spare.close()
	s.spare = nil
}
