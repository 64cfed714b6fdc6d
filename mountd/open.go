package mountd

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"github.com/plyfs/plyfs/layers"
)

// storeDatabase is the file that every store has, see package layers.
const storeDatabase = "plyfs.db"

// NoSocket as a socket path means: never ask a daemon.
const NoSocket = "none"

// OpenOptions configure [OpenService].
type OpenOptions struct {
	// Root is the store; RootGiven says that the user named it. With a Socket
	// and no RootGiven, the daemon's store is the one that is meant.
	Root      string
	RootGiven bool
	// Socket is a daemon the user insists on, [NoSocket], or "": the daemon of
	// the store if one answers, else this process.
	Socket string
	// MustExist: without a store in Root the error matches
	// [layers.ErrNotFound]; otherwise one is made.
	MustExist bool
	Local     LocalOptions
}

// OpenService returns the service a command works with.
func OpenService(ctx context.Context, o OpenOptions) (Service, error) {
	root, err := CanonicalRoot(o.Root)
	if err != nil {
		return nil, err
	}
	c, info, err := dial(ctx, root, o)
	if err != nil {
		return nil, err
	}
	if c == nil {
		return openLocal(ctx, root, o)
	}
	// Its mounts would appear where we cannot see them. The store can be used
	// beside a daemon, so do the work here.
	if ns, err := mountNamespace(); err == nil && ns != info.MountNamespace && o.Socket == "" {
		_ = c.Close() // not used
		return openLocal(ctx, root, o)
	}
	return c, nil
}

func openLocal(ctx context.Context, root string, o OpenOptions) (Service, error) {
	if o.MustExist {
		if _, err := os.Stat(filepath.Join(root, storeDatabase)); err != nil {
			return nil, markedf(layers.ErrNotFound, "no store in %q: %w", root, reason(err))
		}
	}
	return OpenLocal(ctx, root, o.Local)
}

// FindDaemon returns what the daemon of a store says of itself, or nil.
func FindDaemon(ctx context.Context, o OpenOptions) *Info {
	root, err := CanonicalRoot(o.Root)
	if err != nil {
		return nil
	}
	c, info, err := dial(ctx, root, o)
	if err != nil || c == nil {
		return nil
	}
	_ = c.Close() // only asked
	return &info
}

// dial returns a client of the right daemon, or nil if none is asked for or
// none answers.
func dial(ctx context.Context, root string, o OpenOptions) (*Client, Info, error) {
	socket := o.Socket
	switch socket {
	case NoSocket:
		return nil, Info{}, nil
	case "":
		if ownedByUs(RunDir(root)) != nil {
			return nil, Info{}, nil // absent, or not to be trusted: makeRunDir will say which
		}
		socket = SocketPath(root)
	}
	c := NewClient(socket)
	info, err := c.Info(ctx, Empty{})
	switch {
	case err != nil && o.Socket == "" && nobodyListens(err):
		_ = c.Close() // never connected
		return nil, Info{}, nil
	case err == nil && info.API != apiVersion:
		err = markedf(ErrUnavailable, "daemon on %q speaks API %s, this command %s: restart the daemon, or use --socket none",
			socket, info.API, apiVersion)
	case err == nil && info.Root != root && (o.Socket == "" || o.RootGiven):
		err = markedf(ErrUsage, "daemon on %q serves the store %q, not %q: give its root, its socket, or --socket none",
			socket, info.Root, root)
	}
	if err != nil {
		_ = c.Close() // of no use
		return nil, Info{}, err
	}
	return c, info, nil
}

// nobodyListens reports whether a connection could not even be made.
func nobodyListens(err error) bool {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return true
	}
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist)
}
