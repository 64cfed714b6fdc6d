package mountd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
)

// DaemonOptions configure [RunDaemon].
type DaemonOptions struct {
	Socket string // "": SocketPath of the root
	Logger *zap.Logger
	// Version is what Info answers.
	Version string
	// MetricsAddress, if set, is a loopback address where metrics are served over HTTP, to
	// whoever can connect.
	MetricsAddress string
	// MaxMounts is as in LocalOptions.
	MaxMounts int
	// Ready is called once the socket accepts connections.
	Ready func(socket string)
}

const (
	// stopGrace is how long running calls may go on after the daemon was told
	// to stop. Then they are cancelled, which leaves the store clean.
	stopGrace = 20 * time.Second
	idleClose = 2 * time.Minute
)

// RunDaemon serves the store in root until ctx ends. Mounts outlive it.
func RunDaemon(ctx context.Context, root string, o DaemonOptions) error {
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.MetricsAddress != "" { // before anything is made
		if _, err := loopback(o.MetricsAddress); err != nil {
			return err
		}
	}
	purge := make(chan struct{}, 1)
	l, err := OpenLocal(ctx, root, LocalOptions{
		// A daemon must come up also on a damaged store: it is asked to repair it.
		Logger: o.Logger, Version: o.Version, Damaged: true, AnyFileSystem: AnyFileSystem(),
		MaxMounts: o.MaxMounts,
		onTrash:   func() { request(purge) },
	})
	if err != nil {
		return err
	}
	defer l.Close()
	purged := make(chan struct{})
	purgeCtx, stopPurge := context.WithCancel(ctx)
	defer func() { stopPurge(); <-purged }()
	go func() {
		defer close(purged)
		l.purgeLoop(purgeCtx, purge)
	}()
	if err := makeRunDir(l.runDir); err != nil {
		return err
	}
	given, err := activated()
	if err != nil {
		return err
	}
	socket := o.Socket
	if socket == "" {
		socket = filepath.Join(l.runDir, socketName)
	}
	if socket, err = filepath.Abs(socket); err != nil {
		return fmt.Errorf("socket %q: %w", o.Socket, err)
	}
	unlock, err := lockFile(filepath.Join(l.runDir, "daemon.lock"), false)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return markedf(layers.ErrInUse, "a daemon for the store %q is running already", l.store.Root())
	} else if err != nil {
		return err
	}
	defer unlock()
	if err := l.reconcile(ctx); errors.Is(err, layers.ErrCorrupt) {
		o.Logger.Error("the store is damaged", zap.Error(err))
	} else if err != nil {
		return fmt.Errorf("look at the mounts of the store: %w", err)
	}
	l.restoreAtStart(ctx)
	request(purge) // what an earlier one has left
	ln, release := given, func() {}
	if given != nil {
		socket = given.Addr().String()
	} else if ln, release, err = Listen(socket); err != nil {
		return err
	}
	defer release()
	metrics := newMetrics(l, o.Logger)
	if o.MetricsAddress != "" {
		_, stop, err := serveMetrics(ctx, o.MetricsAddress, metrics, o.Logger)
		if err != nil {
			_ = ln.Close() // nobody was answered
			return err
		}
		defer stop()
	}
	return serve(ctx, ln, newHandler(l, metrics, o.Logger), func() {
		NotifySystemd("READY=1")
		o.Logger.Info("daemon is ready", zap.String("name", socket))
		if o.Ready != nil {
			o.Ready(socket)
		}
	})
}

// request asks whoever listens, unless it has been asked already.
func request(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// purgeLoop empties the trash whenever it is asked to.
func (l *Local) purgeLoop(ctx context.Context, asked <-chan struct{}) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-asked:
			if err := l.store.Purge(ctx); err != nil && ctx.Err() == nil {
				l.log.Warn("empty the trash", zap.Error(err))
			}
		}
	}
}

// activated returns the socket that systemd listens on for us (sd_listen_fds(3)); nil if
// there is none.
func activated() (net.Listener, error) {
	list, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("sockets of systemd: %w", err)
	}
	if len(list) == 0 {
		return nil, nil
	}
	ln, ok := list[0].(*net.UnixListener)
	if len(list) > 1 || !ok {
		return nil, markedf(ErrUsage, "systemd passes %d sockets: expected one unix socket (ListenStream=)", len(list))
	}
	ln.SetUnlinkOnClose(false) // it is systemd's
	return ln, nil
}

// Listen makes the socket, mode 0600. One that nobody listens on any more is
// replaced; the lock beside it keeps two daemons from doing so at once.
func Listen(socket string) (net.Listener, func(), error) {
	unlock, err := lockFile(socket+".lock", false)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, nil, markedf(layers.ErrInUse, "socket %q is in use by another process", socket)
	} else if err != nil {
		return nil, nil, err
	}
	fail := func(err error) (net.Listener, func(), error) {
		unlock()
		return nil, nil, err
	}
	if st, err := os.Lstat(socket); err == nil {
		if st.Mode()&fs.ModeSocket == 0 {
			return fail(markedf(layers.ErrExists, "%q exists and is not a socket: remove it or choose another name", socket))
		}
		if c, err := net.DialTimeout("unix", socket, dialTimeout); err == nil {
			_ = c.Close() // it answers, that is all we wanted to know
			return fail(markedf(layers.ErrInUse, "socket %q is in use by another program", socket))
		}
		if err := os.Remove(socket); err != nil {
			return fail(fmt.Errorf("stale socket: %w", err))
		}
	}
	old := unix.Umask(0o177) // no moment in which others may connect
	ln, err := net.Listen("unix", socket)
	unix.Umask(old)
	if err != nil {
		return fail(fmt.Errorf("socket %q: %w", socket, err))
	}
	return ln, unlock, nil
}

// serve answers on ln until ctx ends, then stops in order: no new connections,
// running calls get stopGrace, what is left is cancelled.
func serve(ctx context.Context, ln net.Listener, h http.Handler, ready func()) error {
	base, cancel := context.WithCancel(context.WithValue(context.WithoutCancel(ctx), stoppingKey{}, ctx))
	defer cancel()
	srv := &http.Server{
		Handler:           h,
		BaseContext:       func(net.Listener) context.Context { return base },
		ConnContext:       connContext,
		ReadHeaderTimeout: time.Minute,
		IdleTimeout:       idleClose,
	}
	errs := make(chan error, 1)
	go func() { errs <- srv.Serve(ln) }()
	ready()
	select {
	case err := <-errs:
		return fmt.Errorf("daemon: %w", err)
	case <-ctx.Done():
	}
	NotifySystemd("STOPPING=1")
	grace, stop := context.WithTimeout(context.Background(), stopGrace)
	defer stop()
	if err := srv.Shutdown(grace); err != nil {
		cancel()
		last, stopLast := context.WithTimeout(context.Background(), stopGrace)
		defer stopLast()
		_ = srv.Shutdown(last) // cancelled calls clean up; then there is no more to wait for
		_ = srv.Close()
	}
	<-errs // http.ErrServerClosed
	return nil
}

// NotifySystemd is sd_notify(3).
func NotifySystemd(state string) {
	addr := os.Getenv("NOTIFY_SOCKET")
	if addr == "" {
		return
	}
	if rest, ok := strings.CutPrefix(addr, "@"); ok {
		addr = "\x00" + rest
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: addr, Net: "unixgram"})
	if err != nil {
		return // whoever set the variable is gone
	}
	defer c.Close()
	_, _ = c.Write([]byte(state))
}
