package mountd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/layers/registry"
	"github.com/plyfs/plyfs/mountd/events"
)

// LocalOptions configure [OpenLocal].
type LocalOptions struct {
	Logger *zap.Logger // nil: no log
	// OnLockWait is told once, with a sentence, when the store is busy.
	OnLockWait func(msg string)
	Version    string
	// Bound makes mounts end with this process.
	Bound bool
	// Damaged opens the store also if its database is damaged or missing.
	Damaged bool
	// AnyFileSystem opens the store also where its file system is not safe.
	AnyFileSystem bool
	// Background has what is removed deleted by a process of its own, the running
	// binary with [VerbPurge], so that nobody waits for it.
	Background bool
	// MaxMounts is how many mounts of the store there may be; 0: any number.
	MaxMounts int
	// onTrash is that of a daemon, which does it by itself.
	onTrash func()
}

// Local is the service in this process.
type Local struct {
	store  *layers.Store
	log    *zap.Logger
	opts   LocalOptions
	runDir string // made when the first mount or the daemon needs it
	events *events.Log
}

var _ Service = (*Local)(nil)

// OpenLocal opens the store in root, which is made if there is none.
func OpenLocal(ctx context.Context, root string, o LocalOptions) (*Local, error) {
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	root, err := CanonicalRoot(root)
	if err != nil {
		return nil, err
	}
	onTrash := o.onTrash
	if onTrash == nil && o.Background {
		onTrash = func() { startPurge(root, o.Logger) }
	}
	s, err := layers.Open(ctx, root, layers.Options{
		Logger: o.Logger, OnLockWait: o.OnLockWait, Damaged: o.Damaged, AnyFileSystem: o.AnyFileSystem, OnTrash: onTrash,
	})
	if err != nil {
		return nil, err
	}
	return &Local{store: s, log: o.Logger, opts: o, runDir: RunDir(root), events: events.In(root)}, nil
}

// Close releases the store. Mounts stay.
func (l *Local) Close() error { return l.store.Close() }

// Info implements Service.
func (l *Local) Info(context.Context, Empty) (Info, error) {
	ns, err := mountNamespace()
	if err != nil {
		return Info{}, err
	}
	return Info{
		Version: l.opts.Version, API: apiVersion, Root: l.store.Root(),
		Pid: os.Getpid(), UID: os.Geteuid(), MountNamespace: ns,
	}, nil
}

func mountNamespace() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/mnt", &st); err != nil {
		return 0, fmt.Errorf("mount namespace: %w", err)
	}
	return st.Ino, nil
}

// Images implements Service.
func (l *Local) Images(ctx context.Context, r ImagesRequest) ([]layers.ImageSummary, error) {
	return l.store.ListImages(ctx, layers.ImagesOptions{Name: r.Filter, Filters: r.Filters, All: r.All})
}

// History implements Service.
func (l *Local) History(ctx context.Context, r NameRequest) ([]layers.HistoryEntry, error) {
	return l.store.History(ctx, r.Name)
}

// Layers implements Service.
func (l *Local) Layers(ctx context.Context, r NameRequest) ([]layers.LayerInfo, error) {
	return l.store.Layers(ctx, r.Name)
}

// Inspect implements Service. A container of that name comes before an image.
func (l *Local) Inspect(ctx context.Context, r NameRequest) (Inspection, error) {
	c, cerr := l.store.Container(ctx, r.Name)
	if cerr == nil {
		all, err := l.List(ctx, Empty{})
		if err != nil {
			return Inspection{}, err
		}
		for i := range all {
			if all[i].Container != nil && all[i].Container.ID == c.ID {
				return Inspection{Container: &all[i]}, nil
			}
		}
	}
	img, err := l.store.Inspect(ctx, r.Name)
	if err != nil {
		return Inspection{}, notFoundEither(r.Name, cerr, err)
	}
	return Inspection{Image: img}, nil
}

// notFoundEither makes one sentence of two failed searches.
func notFoundEither(name string, container, image error) error {
	if errors.Is(container, layers.ErrNotFound) && errors.Is(image, layers.ErrNotFound) {
		return markedf(layers.ErrNotFound, "no container or image %q: see `plyfs images` and `plyfs ps`", name)
	}
	if errors.Is(image, layers.ErrNotFound) && container != nil {
		return container
	}
	return image
}

// Analyze implements Service.
func (l *Local) Analyze(ctx context.Context, r AnalyzeRequest) (*layers.Analysis, error) {
	return l.store.Analyze(ctx, r.Name, r.AnalyzeOptions)
}

// Tag implements Service.
func (l *Local) Tag(ctx context.Context, r TagRequest) (Empty, error) {
	if err := l.store.Tag(ctx, r.Source, r.Target); err != nil {
		return Empty{}, err
	}
	id := ""
	if img, err := l.store.ResolveImage(ctx, r.Target); err == nil { // the event names it all the same
		id = img.ID.String()
	}
	l.emitImage(events.Tag, id, r.Target)
	return Empty{}, nil
}

// RemoveImage implements Service.
func (l *Local) RemoveImage(ctx context.Context, r RemoveImageRequest) ([]layers.RemoveAction, error) {
	// A dead mount must not keep an image.
	if _, err := l.settledMounts(ctx, func(row layers.Live) bool { return row.ContainerID == "" }); err != nil {
		return nil, err
	}
	actions, err := l.store.RemoveImage(ctx, r.Name, layers.RemoveOptions{Force: r.Force, NoPrune: r.NoPrune})
	for _, a := range actions {
		if a.Kind == "Untagged" {
			l.emitImage(events.Untag, "", a.Ref)
		} else {
			l.emitImage(events.Delete, a.Ref)
		}
	}
	return actions, err
}

// Load implements Service.
func (l *Local) Load(ctx context.Context, r LoadRequest, src layers.Source, p layers.ProgressFunc) ([]layers.LoadedImage, error) {
	if src.Size == 0 {
		src.Size = r.Size
	}
	loaded, err := l.store.Load(ctx, src, layers.LoadOptions{Progress: p, Platform: r.Platform, Ref: r.Ref})
	for _, i := range loaded {
		l.emitImage(events.Load, i.ID.String(), i.Refs...)
	}
	return loaded, err
}

// Pull implements Service.
func (l *Local) Pull(ctx context.Context, r PullRequest, p layers.ProgressFunc) (layers.PullResult, error) {
	res, err := l.store.Pull(ctx, r.Name, r.Access, layers.PullOptions{
		Progress: p, Platform: r.Platform, KeepBlobs: r.KeepBlobs, Registry: registry.Options{UserAgent: l.userAgent()},
	})
	if err == nil {
		l.emitImage(events.Pull, res.ID.String(), res.Ref)
	}
	return res, err
}

// Push implements Service.
func (l *Local) Push(ctx context.Context, r PushRequest, p layers.ProgressFunc) (layers.PushResult, error) {
	res, err := l.store.Push(ctx, r.Name, r.Access, layers.PushOptions{
		Progress: p, Image: r.Image, Format: r.Format, Registry: registry.Options{UserAgent: l.userAgent()},
	})
	if err == nil {
		l.emitImage(events.Push, res.ID.String(), res.Ref)
	}
	return res, err
}

// userAgent is what registries are told.
func (l *Local) userAgent() string {
	version, _, _ := strings.Cut(l.opts.Version, " ")
	return strings.TrimSuffix("plyfs/"+version, "/")
}

// Import implements Service.
func (l *Local) Import(ctx context.Context, r ImportRequest, src layers.Source, p layers.ProgressFunc) (layers.Image, error) {
	img, err := l.store.Import(ctx, src.Reader, r.Ref, layers.ImportOptions{
		Message: r.Message, Changes: r.Changes, Platform: r.Platform, Progress: p,
	})
	if err == nil {
		l.emitImage(events.Import, img.ID.String(), r.Ref)
	}
	return img, err
}

// Save implements Service.
func (l *Local) Save(ctx context.Context, r SaveRequest, w io.Writer, p layers.ProgressFunc) error {
	if err := l.store.Save(ctx, w, r.Refs, layers.SaveOptions{Format: r.Format, Progress: p}); err != nil {
		return err
	}
	l.emitImage(events.Save, "", r.Refs...)
	return nil
}

// Export implements Service.
func (l *Local) Export(ctx context.Context, r NameRequest, w io.Writer) error {
	if err := l.syncContainer(ctx, r.Name); err != nil {
		return err
	}
	return l.store.Export(ctx, r.Name, w)
}

// Create implements Service.
func (l *Local) Create(ctx context.Context, r CreateRequest) (layers.Container, error) {
	c, err := l.store.CreateContainer(ctx, r.Image, r.Name)
	if err != nil {
		return layers.Container{}, err
	}
	l.emitContainer(events.Create, c)
	return *c, nil
}

// Remove implements Service.
func (l *Local) Remove(ctx context.Context, r RemoveRequest) (Empty, error) {
	c, err := l.store.Container(ctx, r.Name)
	if err != nil {
		return Empty{}, err
	}
	alive, err := l.settledMounts(ctx, func(row layers.Live) bool { return row.ContainerID == c.ID })
	if err != nil {
		return Empty{}, err
	}
	for _, a := range alive {
		if a.row.ContainerID != c.ID {
			continue
		}
		if !r.Force {
			return Empty{}, markedf(layers.ErrInUse, "container %q is mounted on %q: unmount it first (`plyfs umount %s`), or use rm --force",
				c.Name, a.target(), c.Name)
		}
		if _, err := l.unmount(ctx, a, false); err != nil {
			return Empty{}, err
		}
	}
	err = l.removeContainer(ctx, c.ID)
	if r.Force && errors.Is(err, layers.ErrNotFound) {
		err = nil // it was one-shot, and the unmount has removed it
	}
	return Empty{}, err
}

// Diff implements Service.
func (l *Local) Diff(ctx context.Context, r DiffRequest) ([]Change, error) {
	var list []layers.Difference
	var err error
	if r.B != "" {
		list, err = l.store.DiffImages(ctx, r.A, r.B, layers.DiffOptions{Times: r.Times})
	} else if err = l.syncContainer(ctx, r.A); err == nil {
		list, err = l.store.DiffContainer(ctx, r.A, r.Detail)
	}
	if err != nil {
		return nil, err
	}
	changes := make([]Change, len(list))
	for i, d := range list {
		changes[i] = Change{Kind: d.Kind, Path: d.Path, ChangeDetail: ChangeDetail{
			Type: d.Type, Size: d.Size, OldSize: d.OldSize, LinkTo: d.LinkTo, OldLinkTo: d.OldLinkTo, Why: d.Why, Details: d.Details,
		}}
	}
	return changes, nil
}

// Commit implements Service.
func (l *Local) Commit(ctx context.Context, r CommitRequest, p layers.ProgressFunc) (layers.Image, error) {
	if err := l.syncContainer(ctx, r.Container); err != nil {
		return layers.Image{}, err
	}
	img, err := l.store.Commit(ctx, r.Container, r.Ref, layers.CommitOptions{
		Author: r.Author, Message: r.Message, Changes: r.Changes, Progress: p,
	})
	if err == nil {
		l.emitImage(events.Commit, img.ID.String(), r.Ref)
	}
	return img, err
}

// Prune implements Service.
func (l *Local) Prune(ctx context.Context, r PruneRequest) (layers.GCReport, error) {
	if err := l.reconcile(ctx); err != nil {
		return layers.GCReport{}, err
	}
	rep, err := l.store.Prune(ctx, layers.PruneOptions{All: r.All, DryRun: r.DryRun})
	if err == nil {
		l.emitRemoved(events.Prune, rep)
	}
	return rep, err
}

// GC implements Service.
func (l *Local) GC(ctx context.Context, r GCRequest) (layers.GCReport, error) {
	if err := l.reconcile(ctx); err != nil {
		return layers.GCReport{}, err
	}
	rep, err := l.store.GC(ctx, r.DryRun)
	if err == nil {
		l.emitRemoved(events.GC, rep)
	}
	return rep, err
}

// FindBuild implements Service.
func (l *Local) FindBuild(ctx context.Context, r layers.BuildStep) (layers.Image, error) {
	return l.store.FindBuild(ctx, r)
}

// RecordBuild implements Service.
func (l *Local) RecordBuild(ctx context.Context, r RecordBuildRequest) (Empty, error) {
	return Empty{}, l.store.RecordBuild(ctx, r.Step, r.Image)
}

// DiskUsage implements Service.
func (l *Local) DiskUsage(ctx context.Context, _ Empty) (layers.DiskUsage, error) {
	return l.store.DiskUsage(ctx)
}

// syncContainer makes what was written through a mount of the container
// readable in its upper directory. Names that are no container, or not
// mounted, need nothing.
func (l *Local) syncContainer(ctx context.Context, name string) error {
	alive, err := l.liveMounts(ctx)
	if err != nil {
		return err
	}
	c, err := l.store.Container(ctx, name)
	if errors.Is(err, layers.ErrNotFound) {
		return nil // an image, or an error the caller reports
	}
	if err != nil {
		return err
	}
	for _, a := range alive {
		if a.row.ContainerID != c.ID || a.row.ReadOnly {
			continue
		}
		// Pages that a process has mapped and written reach the server first,
		// then the server's files the disk. The root of the mount's process
		// leads into the mount namespace where the mount is.
		if a.state == StateMounted {
			err := syncfs(fmt.Sprintf("/proc/%d/root%s", a.row.Pid, a.target()))
			if errors.Is(err, unix.EACCES) { // of another user namespace, below ours: only its processes may look
				unix.Sync()
			} else if err != nil {
				return fmt.Errorf("sync container %q: %w", c.Name, err)
			}
		}
		if err := syncfs(c.Upper); err != nil {
			return fmt.Errorf("sync container %q: %w", c.Name, err)
		}
	}
	return nil
}

func syncfs(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %q: %w", dir, err)
	}
	defer unix.Close(fd)
	if err := unix.Syncfs(fd); err != nil {
		return fmt.Errorf("syncfs %q: %w", dir, err)
	}
	return nil
}
