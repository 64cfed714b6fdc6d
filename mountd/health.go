package mountd

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"syscall"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/events"
)

// Check implements Service.
func (l *Local) Check(ctx context.Context, r CheckRequest, p layers.ProgressFunc) (layers.Report, error) {
	// Rows of mounts come first, as the repairs go by them; but a database that is
	// damaged has none.
	lost, err := l.checkMounts(ctx)
	if err != nil && !errors.Is(err, layers.ErrCorrupt) {
		return layers.Report{}, err
	}
	rep, cerr := l.store.Check(ctx, layers.CheckOptions{Deep: r.Deep, Repair: r.Repair, Progress: p})
	if cerr != nil {
		return layers.Report{}, cerr
	}
	if err != nil && r.Repair {
		if lost, err = l.checkMounts(ctx); err != nil {
			return layers.Report{}, err
		}
	}
	rep.Findings = append(rep.Findings, lost...)
	l.emitChecked(r, rep)
	return *rep, nil
}

// checkMounts reconciles rows and mounts and tells what had to be put right the other
// way round.
func (l *Local) checkMounts(ctx context.Context) ([]layers.Finding, error) {
	var lost []layers.Finding
	_, err := l.reconciled(ctx, func(f layers.Finding) { lost = append(lost, f) })
	return lost, err
}

// Rebuild implements Service.
func (l *Local) Rebuild(ctx context.Context, _ Empty) (layers.RebuildReport, error) {
	rep, err := l.store.Rebuild(ctx)
	if err != nil {
		return rep, err
	}
	l.emitStore(events.Rebuild, events.StoreEvent{Images: rep.Images, Layers: rep.Layers})
	return rep, l.reconcile(ctx) // mounts have lost their rows
}

// Compact implements Service.
func (l *Local) Compact(ctx context.Context, _ Empty) (CompactResult, error) {
	before, after, err := l.store.Compact(ctx)
	if err == nil {
		l.emitStore(events.Compact, events.StoreEvent{Reclaimed: before - after})
	}
	return CompactResult{Before: before, After: after}, err
}

// CopyDatabase implements Service.
func (l *Local) CopyDatabase(ctx context.Context, _ Empty) (CopyResult, error) {
	path, err := l.store.CopyDatabase(ctx)
	return CopyResult{Path: Path(path)}, err
}

// VerbPurge is a hidden verb: the process that deletes what others have removed.
const VerbPurge = "purge-trash"

// startPurge starts a process that empties the trash of a store. Nobody waits for it;
// what it does not come to is done by the next one.
func startPurge(root string, log *zap.Logger) {
	c := exec.Command("/proc/self/exe", VerbPurge)
	c.Args[0] = "plyfs"
	c.Dir = root                                       // and not a name: the store may be moved or removed meanwhile
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C is for us
	if err := c.Start(); err != nil {
		log.Warn("nobody deletes the trash; plyfs gc does", zap.Error(err))
		return
	}
	go func() { _ = c.Wait() }() // it is nobody's child if we end first
}

// PurgeMain is the verb [VerbPurge], started in the directory of the store. It returns
// the exit status.
func PurgeMain(o LocalOptions) int {
	if _, err := os.Lstat(storeDatabase); err != nil {
		return 0 // the store has gone
	}
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 10) // others are waited for
	o.Background = false
	l, err := OpenLocal(context.Background(), ".", o)
	if err != nil {
		return 1
	}
	defer l.Close()
	if err := l.store.Purge(context.Background()); err != nil {
		return 1
	}
	return 0
}

// AnyFileSystemEnv, set to 1, lets a store lie on any file system.
const AnyFileSystemEnv = "PLYFS_ANY_FS"

// AnyFileSystem reads it.
func AnyFileSystem() bool { return os.Getenv(AnyFileSystemEnv) == "1" }
