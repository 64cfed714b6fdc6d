package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/plyfs/plyfs/mountd"
)

// Options configure [Run].
type Options struct {
	Root    string
	Address string // path of the socket
	Logger  *zap.Logger
}

const (
	// stopGrace is how long running calls may go on after the process was told to stop.
	stopGrace = 20 * time.Second
	// maxMessage is containerd's own limit.
	maxMessage = 16 << 20
)

// DefaultRoot is where snapshots lie if nobody says where.
func DefaultRoot() (string, error) {
	store, err := mountd.DefaultRoot()
	if err != nil {
		return "", err
	}
	return filepath.Join(store, "snapshotter"), nil
}

// DefaultAddress is the socket if nobody names one.
func DefaultAddress() string { return filepath.Join(mountd.RunBase(), "snapshotter.sock") }

// Run serves the snapshots in a root until ctx ends. Unions stay mounted.
func Run(ctx context.Context, o Options) (err error) {
	s, err := Open(o.Root, o.Logger)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	socket := strings.TrimPrefix(o.Address, "unix://")
	if socket, err = filepath.Abs(socket); err != nil {
		return fmt.Errorf("socket %q: %w", o.Address, err)
	}
	if err := os.Mkdir(filepath.Dir(socket), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("directory of the socket: %w", err)
	}
	ln, release, err := mountd.Listen(socket)
	if err != nil {
		return err
	}
	defer release()
	g := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage))
	Register(g, s)
	ended := make(chan error, 1)
	go func() { ended <- g.Serve(ln) }()
	mountd.NotifySystemd("READY=1")
	o.Logger.Info("snapshotter is ready", zap.String("name", socket), zap.String("root", s.root))
	select {
	case err := <-ended:
		return fmt.Errorf("snapshotter: %w", err)
	case <-ctx.Done():
	}
	mountd.NotifySystemd("STOPPING=1")
	// Calls that take too long are cancelled, and then waited for: they clean up.
	late := time.AfterFunc(stopGrace, g.Stop)
	defer late.Stop()
	g.GracefulStop()
	<-ended // nil: it was asked to stop
	return nil
}
