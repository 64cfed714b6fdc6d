package holder

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/counters"
)

// StatsFile is the socket in a run directory where a mount server says what it has done.
// Who connects gets one JSON document, [Stats], and need not say anything.
const StatsFile = "stats"

// Stats is what a mount server says about itself.
type Stats struct {
	ID     string  `json:"id"`
	Target string  `json:"target"`
	Server Process `json:"server"`
	// Since is when this server began to count, Restarts how many there have been before.
	Since    time.Time         `json:"since"`
	Restarts int               `json:"restarts"`
	IO       string            `json:"io"`
	Counters counters.Snapshot `json:"counters"`
}

const (
	// statsClients is how many are answered at once; more wait in the kernel.
	statsClients = 8
	// statsPatience is how long one may take to read its answer. All of it fits into the
	// socket, so that in fact none is waited for.
	statsPatience = 5 * time.Second
	// statsStart is how long the mount waits for the socket. It takes no time, unless the
	// run directory lies on something that hangs, perhaps on this mount itself.
	statsStart = time.Second
	// maxStats bounds what is read of an answer.
	maxStats = 4 << 20
)

// answer makes both sockets and answers there until the returned function is called. A
// mount without them is worth more than none: what goes wrong is logged.
func (s *server) answer(doc func() Stats, c *control) (stop func()) {
	if s.spec.RunDir == "" {
		return func() {}
	}
	type listeners struct{ stats, control net.Listener }
	made := make(chan listeners, 1)
	go func() {
		var l listeners
		var err error
		if l.stats, err = listen(s.spec.RunDir, StatsFile); err != nil {
			s.log.Warn("nobody can ask this mount for its counters", zap.Error(err))
		} else {
			go serveStats(l.stats, statsPatience, doc)
		}
		if l.control, err = listen(s.spec.RunDir, ControlFile); err != nil {
			s.log.Warn("nobody can watch this mount", zap.Error(err))
		} else {
			go c.serve(l.control)
		}
		made <- l
	}()
	select {
	case l := <-made:
		return func() { // the files are removed with the run directory
			if l.stats != nil {
				_ = l.stats.Close()
			}
			if l.control != nil {
				_ = l.control.Close()
				c.end()
			}
		}
	case <-time.After(statsStart):
		s.log.Warn("the run directory of the mount does not answer", zap.String("name", s.spec.RunDir))
	}
	return func() {}
}

// listen puts a socket in the place of that of an earlier server.
func listen(runDir, name string) (net.Listener, error) {
	dir, err := unix.Open(runDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("run directory %q: %w", runDir, err)
	}
	defer unix.Close(dir)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket %q: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close() // the listener has a copy
	fresh := name + ".new"
	if err := unix.Unlinkat(dir, fresh, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("socket %q: %w", name, err)
	}
	// Nobody can connect before listen, and nobody finds it before the rename.
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: socketAddress(dir, fresh)}); err != nil {
		return nil, fmt.Errorf("bind the socket %q: %w", name, err)
	}
	if err := unix.Fchmodat(dir, fresh, 0o600, 0); err != nil {
		return nil, fmt.Errorf("socket %q: %w", name, err)
	}
	if err := unix.Listen(fd, 4*statsClients); err != nil {
		return nil, fmt.Errorf("listen on the socket %q: %w", name, err)
	}
	if err := unix.Renameat(dir, fresh, dir, name); err != nil {
		return nil, fmt.Errorf("socket %q: %w", name, err)
	}
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("socket %q: %w", name, err)
	}
	return ln, nil
}

// socketAddress names a socket in a directory that is open: the path of the directory may
// be longer than an address (sun_path).
func socketAddress(dir int, name string) string { return fmt.Sprintf("/proc/self/fd/%d/%s", dir, name) }

// acceptEach calls do for each client until ln is closed.
func acceptEach(ln net.Listener, do func(net.Conn)) {
	for {
		c, err := ln.Accept()
		switch {
		case err == nil:
			do(c)
		case errors.Is(err, net.ErrClosed):
			return
		default: // no descriptors are left, for one
			<-time.After(100 * time.Millisecond)
		}
	}
}

// serveStats answers until ln is closed, each client for no longer than patience.
func serveStats(ln net.Listener, patience time.Duration, doc func() Stats) {
	slots := make(chan struct{}, statsClients)
	acceptEach(ln, func(c net.Conn) {
		slots <- struct{}{}
		go func() {
			defer func() { <-slots }()
			defer c.Close()
			b, err := json.Marshal(doc())
			if err != nil {
				return // nothing in it can fail
			}
			_ = c.SetDeadline(time.Now().Add(patience))
			_, _ = c.Write(append(b, '\n')) // a client that is gone does not want it
		}()
	})
}

// ReadStats asks the server of the mount with this run directory. While another server
// takes over, it waits for that, until ctx ends.
func ReadStats(ctx context.Context, runDir string) (Stats, error) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		st, err := askStats(ctx, runDir)
		if err == nil || !betweenServers(err) || ctx.Err() != nil {
			return st, err
		}
		select {
		case <-ctx.Done():
			return st, err
		case <-tick.C:
		}
	}
}

// betweenServers reports whether a server has died before, or while, it was asked, or
// whether too many ask at once.
func betweenServers(err error) bool {
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

func askStats(ctx context.Context, runDir string) (st Stats, err error) {
	c, err := dial(ctx, runDir, StatsFile)
	if err != nil {
		return st, err
	}
	defer c.Close()
	if until, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(until)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	if err := json.NewDecoder(io.LimitReader(c, maxStats)).Decode(&st); err != nil {
		return st, fmt.Errorf("answer of the mount server: %w", err)
	}
	return st, nil
}

// dial connects to a socket in a run directory.
func dial(ctx context.Context, runDir, name string) (net.Conn, error) {
	dir, err := unix.Open(runDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("run directory %q: %w", runDir, err)
	}
	defer unix.Close(dir)
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socketAddress(dir, name))
	if err != nil {
		return nil, fmt.Errorf("ask the mount server: %w", err)
	}
	return c, nil
}
