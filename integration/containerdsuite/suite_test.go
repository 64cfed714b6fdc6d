package containerdsuite

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/containerd/v2/pkg/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
)

// binaryEnv names the plyfs to test.
const binaryEnv = "PLYFS_BINARY"

const (
	startLimit = 20 * time.Second
	stopLimit  = 60 * time.Second
)

func TestSnapshotter(t *testing.T) {
	testutil.RequiresRoot(t) // asks for -test.root
	bin := os.Getenv(binaryEnv)
	if bin == "" {
		t.Skipf("%s does not say which plyfs to test", binaryEnv)
	}
	testsuite.SnapshotterSuite(t, "plyfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		return start(ctx, bin, root)
	})
}

// start runs a snapshotter of its own below root. The function that it returns removes all
// snapshots, ends the process, and reports what is left.
func start(ctx context.Context, bin, root string) (_ snapshots.Snapshotter, stop func() error, err error) {
	socket := filepath.Join(root, "s.sock")
	cmd := exec.Command(bin, "snapshotter", "--root", filepath.Join(root, "d"), "--address", socket)
	var log strings.Builder
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err == nil {
		err = ready(ctx, conn)
	}
	if err != nil {
		err = errors.Join(err, cmd.Process.Kill())
		_ = cmd.Wait() // it was killed
		return nil, nil, fmt.Errorf("%w: %s", err, log.String())
	}
	s := proxy.NewSnapshotter(api.NewSnapshotsClient(conn), "plyfs")
	return s, func() error {
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopLimit)
		defer cancel()
		kill := time.AfterFunc(stopLimit, func() { _ = cmd.Process.Kill() }) // it may have ended
		defer kill.Stop()
		err := errors.Join(removeAll(limit, s), conn.Close(), cmd.Process.Signal(syscall.SIGTERM))
		if werr := cmd.Wait(); werr != nil {
			err = errors.Join(err, fmt.Errorf("snapshotter: %w: %s", werr, log.String()))
		}
		return errors.Join(err, left(root))
	}, nil
}

// ready waits until the socket accepts connections.
func ready(ctx context.Context, conn *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	for {
		conn.ResetConnectBackoff()
		conn.Connect()
		switch state := conn.GetState(); {
		case state == connectivity.Ready:
			return nil
		case !conn.WaitForStateChange(ctx, state):
			return fmt.Errorf("the snapshotter does not answer within %s", startLimit)
		}
	}
}

// removeAll removes all snapshots, children first.
func removeAll(ctx context.Context, s snapshots.Snapshotter) error {
	for {
		parents := map[string]bool{}
		var names []string
		err := s.Walk(ctx, func(_ context.Context, in snapshots.Info) error {
			names = append(names, in.Name)
			parents[in.Parent] = true
			return nil
		})
		if err != nil || len(names) == 0 {
			return err
		}
		for _, n := range names {
			if parents[n] {
				continue
			}
			if err := s.Remove(ctx, n); err != nil {
				return err
			}
		}
	}
}

// left reports mounts and directories of snapshots that should be gone.
func left(root string) (err error) {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], root+"/") {
			err = errors.Join(err, fmt.Errorf("still mounted: %s", f[4]))
		}
	}
	entries, rerr := os.ReadDir(filepath.Join(root, "d", "snapshots"))
	for _, e := range entries {
		err = errors.Join(err, fmt.Errorf("directory left: %s", e.Name()))
	}
	return errors.Join(err, rerr)
}
