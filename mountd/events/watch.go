package events

import (
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// watch hears of changes in a directory, by inotify(7) where it can.
type watch struct {
	dir   string
	file  *os.File // nil: there is no inotify for us, so time has to do
	added bool     // the directory is there
	heard chan struct{}
}

func newWatch(dir string) *watch {
	w := &watch{dir: dir, heard: make(chan struct{}, 1)}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return w // too many of them: see user.max_inotify_instances
	}
	w.file = os.NewFile(uintptr(fd), "inotify")
	w.add()
	go func() { // ends when the file is closed
		buf := make([]byte, 4096) // what has changed does not matter
		for {
			if _, err := w.file.Read(buf); err != nil {
				return
			}
			select {
			case w.heard <- struct{}{}:
			default:
			}
		}
	}()
	return w
}

func (w *watch) add() {
	if w.file == nil || w.added {
		return
	}
	raw, err := w.file.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { // fails only where it is closed
		_, err := unix.InotifyAddWatch(int(fd), w.dir, unix.IN_MODIFY|unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_ONLYDIR)
		w.added = err == nil
	})
}

// wait returns when something has changed, after limit, or with ctx.
func (w *watch) wait(ctx context.Context, limit time.Duration) {
	if !w.added {
		if w.add(); w.added {
			return // what has happened before was not heard
		}
		limit = min(limit, absentTime)
	}
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-w.heard:
	case <-t.C:
	}
}

func (w *watch) close() {
	if w.file != nil {
		_ = w.file.Close() // nothing was written to it
	}
}
