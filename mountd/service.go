package mountd

import (
	"context"
	"io"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/layers/registry"
	"github.com/plyfs/plyfs/mountd/events"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs"
	"github.com/plyfs/plyfs/unionfs/counters"
)

// Service is everything commands need. [Local] does it in this process,
// [Client] asks a daemon. Requests are plain values, so that both can take and
// send them as they are; errors match the sentinels of this package and of
// package layers.
type Service interface {
	// Info says who serves.
	Info(ctx context.Context, r Empty) (Info, error)

	Images(ctx context.Context, r ImagesRequest) ([]layers.ImageSummary, error)
	History(ctx context.Context, r NameRequest) ([]layers.HistoryEntry, error)
	// Inspect describes an image or a container.
	Inspect(ctx context.Context, r NameRequest) (Inspection, error)
	// Layers lists the layers of an image, or with an empty name all.
	Layers(ctx context.Context, r NameRequest) ([]layers.LayerInfo, error)
	// Analyze says what each layer of an image does, and which of its bytes nobody sees.
	Analyze(ctx context.Context, r AnalyzeRequest) (*layers.Analysis, error)
	Tag(ctx context.Context, r TagRequest) (Empty, error)
	RemoveImage(ctx context.Context, r RemoveImageRequest) ([]layers.RemoveAction, error)

	// Load reads an archive. The source is opened by the caller: a daemon gets
	// its bytes, never its name.
	Load(ctx context.Context, r LoadRequest, src layers.Source, p layers.ProgressFunc) ([]layers.LoadedImage, error)
	Import(ctx context.Context, r ImportRequest, src layers.Source, p layers.ProgressFunc) (layers.Image, error)
	// Pull and Push move an image from and to a registry. What was found out about
	// the way there by the caller comes with the request.
	Pull(ctx context.Context, r PullRequest, p layers.ProgressFunc) (layers.PullResult, error)
	Push(ctx context.Context, r PushRequest, p layers.ProgressFunc) (layers.PushResult, error)
	Save(ctx context.Context, r SaveRequest, w io.Writer, p layers.ProgressFunc) error
	Export(ctx context.Context, r NameRequest, w io.Writer) error

	Create(ctx context.Context, r CreateRequest) (layers.Container, error)
	Remove(ctx context.Context, r RemoveRequest) (Empty, error)
	// List returns containers and read-only mounts of images with their state.
	List(ctx context.Context, r Empty) ([]Status, error)
	// Stats collects what the servers of mounts have counted: of one mount, or of all.
	Stats(ctx context.Context, r StatsRequest) ([]MountStats, error)
	// Explain says which layer serves a path, and why.
	Explain(ctx context.Context, r ExplainRequest) (Explanation, error)
	Mount(ctx context.Context, r MountRequest) (MountResult, error)
	// Restore makes wanted mounts again that have ended, and says what has become of all.
	Restore(ctx context.Context, r Empty) ([]Restored, error)
	Unmount(ctx context.Context, r UnmountRequest) (UnmountResult, error)
	// Diff compares a container with its image, or two images.
	Diff(ctx context.Context, r DiffRequest) ([]Change, error)
	Commit(ctx context.Context, r CommitRequest, p layers.ProgressFunc) (layers.Image, error)
	// FindBuild returns the image a build step would make, if there is one, and
	// RecordBuild says that there is.
	FindBuild(ctx context.Context, r layers.BuildStep) (layers.Image, error)
	RecordBuild(ctx context.Context, r RecordBuildRequest) (Empty, error)

	Check(ctx context.Context, r CheckRequest, p layers.ProgressFunc) (layers.Report, error)
	GC(ctx context.Context, r GCRequest) (layers.GCReport, error)
	// Prune removes images that nothing needs.
	Prune(ctx context.Context, r PruneRequest) (layers.GCReport, error)
	// Rebuild makes the database anew from what lies beside it.
	Rebuild(ctx context.Context, r Empty) (layers.RebuildReport, error)
	// Compact writes the database anew without the space it does not use.
	Compact(ctx context.Context, r Empty) (CompactResult, error)
	// CopyDatabase keeps a copy of the database.
	CopyDatabase(ctx context.Context, r Empty) (CopyResult, error)
	DiskUsage(ctx context.Context, r Empty) (layers.DiskUsage, error)
	// Events calls f for what happens to the store, in order, until r.Until, or the end of
	// ctx or an error of f, which it returns.
	Events(ctx context.Context, r EventsRequest, f func(events.Event) error) error

	Close() error
}

// Empty is a request or an answer without content.
type Empty struct{}

// Info describes a service.
type Info struct {
	Version string `json:"version"`
	API     string `json:"api"`
	Root    string `json:"root"`
	Pid     int    `json:"pid"`
	UID     int    `json:"uid"`
	// MountNamespace is where the mounts of this service appear.
	MountNamespace uint64 `json:"mountNamespace"`
}

// NameRequest names an image or container.
type NameRequest struct {
	Name string `json:"name"`
}

// AnalyzeRequest names an image, and what is to be listed of it.
type AnalyzeRequest struct {
	Name string `json:"name"`
	layers.AnalyzeOptions
}

// ImagesRequest lists images; see [layers.ImagesOptions].
type ImagesRequest struct {
	Filter  string   `json:"filter,omitempty"` // name, or pattern of names
	Filters []string `json:"filters,omitempty"`
	All     bool     `json:"all,omitempty"`
}

// TagRequest gives an image one more name.
type TagRequest struct {
	Source string `json:"source"`
	Target string `json:"target"`
}

// RemoveImageRequest removes a reference or an image.
type RemoveImageRequest struct {
	Name    string `json:"name"`
	Force   bool   `json:"force,omitempty"`
	NoPrune bool   `json:"noPrune,omitempty"`
}

// LoadRequest goes with an archive.
type LoadRequest struct {
	Platform string `json:"platform,omitempty"`
	Ref      string `json:"ref,omitempty"`
	Size     int64  `json:"size,omitempty"` // of the stream, for progress
}

// ImportRequest goes with a root filesystem tar.
type ImportRequest struct {
	Ref      string   `json:"ref"`
	Message  string   `json:"message,omitempty"`
	Changes  []string `json:"changes,omitempty"`
	Platform string   `json:"platform,omitempty"`
	Size     int64    `json:"size,omitempty"`
}

// PullRequest asks for an image of a registry. It holds secrets.
type PullRequest struct {
	Name      string          `json:"name"`
	Access    registry.Access `json:"access"`
	Platform  string          `json:"platform,omitempty"`
	KeepBlobs bool            `json:"keepBlobs,omitempty"`
}

// PushRequest gives an image to a registry. It holds secrets.
type PushRequest struct {
	Name   string          `json:"name"`
	Access registry.Access `json:"access"`
	// Image is what to push, if it is not what the store calls Name.
	Image  string `json:"image,omitempty"`
	Format string `json:"format,omitempty"`
}

// SaveRequest asks for an archive of images.
type SaveRequest struct {
	Refs   []string `json:"refs"`
	Format string   `json:"format,omitempty"`
}

// CreateRequest makes a container.
type CreateRequest struct {
	Image string `json:"image"`
	Name  string `json:"name,omitempty"`
}

// RemoveRequest deletes a container; with Force a mounted one is unmounted first.
type RemoveRequest struct {
	Name  string `json:"name"`
	Force bool   `json:"force,omitempty"`
}

// MountRequest mounts an image with a fresh writable layer, a container, or
// either of them read-only.
type MountRequest struct {
	Source   string `json:"source"`         // reference or ID of an image, name or ID of a container
	Target   Path   `json:"target"`         // absolute
	Name     string `json:"name,omitempty"` // of the container that is made
	ReadOnly bool   `json:"readOnly,omitempty"`
	// AutoRemove deletes the container that was made once it is unmounted.
	AutoRemove bool `json:"autoRemove,omitempty"`
	Suid       bool `json:"suid,omitempty"`
	Dev        bool `json:"dev,omitempty"`
	NoExec     bool `json:"noExec,omitempty"`
	NoAtime    bool `json:"noAtime,omitempty"`
	Volatile   bool `json:"volatile,omitempty"`
	// IO is how the data of files reaches programs.
	IO         unionfs.IO `json:"io,omitempty"`
	AllowOther bool       `json:"allowOther,omitempty"`
	Debug      bool       `json:"debug,omitempty"`
	// Complete: the kernel keeps nothing, so that a trace shows everything.
	Complete bool `json:"complete,omitempty"`
	// TellLayers: extended attributes say of which layer objects are.
	TellLayers bool `json:"tellLayers,omitempty"`
	// Restart makes the mount a wanted one: see [Service.Restore].
	Restart bool `json:"restart,omitempty"`
	// Limits of the mount server.
	Limits holder.Limits `json:"limits,omitzero"`
}

// MountResult says what was mounted.
type MountResult struct {
	Target    Path              `json:"target"`
	Container *layers.Container `json:"container,omitempty"` // nil for an image
	ImageID   digest.Digest     `json:"imageID"`
	ReadOnly  bool              `json:"readOnly"`
	Pid       int               `json:"pid"` // of the holder
	// SharedWith is an earlier mount point of the container, with which this one shares
	// its server; empty if it has a server of its own.
	SharedWith Path `json:"sharedWith,omitempty"`
}

// UnmountRequest names a mount point, or a container that is mounted.
type UnmountRequest struct {
	// Name is as the user typed it; Target is the same as an absolute path.
	Name   Path `json:"name"`
	Target Path `json:"target,omitempty"`
	Lazy   bool `json:"lazy,omitempty"`
}

// UnmountResult says what was unmounted.
type UnmountResult struct {
	Target    Path   `json:"target"`
	Container string `json:"container,omitempty"` // its name
	Removed   bool   `json:"removed,omitempty"`   // the container was one-shot
	// StillInUse: out of the tree, but By keeps the mount alive: open files
	// after a lazy unmount, a bind mount, another mount namespace.
	StillInUse bool   `json:"stillInUse,omitempty"`
	By         string `json:"by,omitempty"`
}

// States of a container or mount in a [Status]; never stored, always derived.
const (
	StateCreated   = "created"   // a container that is not mounted
	StateStarting  = "starting"  // its processes run, the mount is about to appear
	StateMounted   = "mounted"   // in the mount table, and somebody answers
	StateDetached  = "detached"  // out of the mount table, but still in use
	StateDead      = "dead"      // in the mount table, nobody answers, and we could not detach it
	StateBroken    = "broken"    // the store says that its data is damaged
	StateWanted    = "wanted"    // not mounted, but is to be: Reason says why it is not
	stateGone      = "gone"      // a row without anything behind it
	stateElsewhere = "elsewhere" // a row of another boot
)

// Status is one line of ps.
type Status struct {
	Container  *layers.Container `json:"container,omitempty"` // nil: a read-only mount of an image
	ImageID    digest.Digest     `json:"imageID"`
	ImageName  string            `json:"imageName,omitempty"`
	State      string            `json:"state"`
	Target     Path              `json:"target,omitempty"`
	ReadOnly   bool              `json:"readOnly,omitempty"`
	AutoRemove bool              `json:"autoRemove,omitempty"`
	Elsewhere  bool              `json:"elsewhere,omitempty"` // in a mount namespace that we do not see
	Pid        int               `json:"pid,omitempty"`       // of the holder
	ServerPid  int               `json:"serverPid,omitempty"` // of the mount server
	Restarts   int               `json:"restarts,omitempty"`  // servers that have taken over from one that had died
	Refused    int               `json:"refused,omitempty"`   // requests answered with EIO because they have ended two servers
	Since      time.Time         `json:"since,omitzero"`      // of the mount, or of the creation
	Reason     string            `json:"reason,omitempty"`    // why a wanted mount is not there
}

// StatsRequest names a mount point, or a container that is mounted; without either all
// mounts are meant.
type StatsRequest struct {
	// Name is as the user typed it; Target is the same as an absolute path.
	Name   Path `json:"name,omitempty"`
	Target Path `json:"target,omitempty"`
}

// MountStats is what the server of a mount has counted.
type MountStats struct {
	ID        string        `json:"id"` // of the mount, as its run directory is named
	Container string        `json:"container,omitempty"`
	ImageID   digest.Digest `json:"imageID"`
	Target    Path          `json:"target"`
	State     string        `json:"state"`
	ReadOnly  bool          `json:"readOnly,omitempty"`
	Mounted   time.Time     `json:"mounted"`
	IO        string        `json:"io,omitempty"` // how file data reaches programs
	// Since is when the server began to count, Restarts how many have died before.
	Since    time.Time `json:"since,omitzero"`
	Restarts int       `json:"restarts"`
	// Counters is nil if the server did not answer; Problem says why.
	Counters *counters.Snapshot `json:"counters,omitempty"`
	Problem  string             `json:"problem,omitempty"`
}

// DiffRequest compares a container with its image, or image A with image B.
type DiffRequest struct {
	A string `json:"a"`
	B string `json:"b,omitempty"`
	// Times: images also differ in what has another modification time, and nothing else.
	Times bool `json:"times,omitempty"`
	// Detail: also of a container, say more than kind and path.
	Detail bool `json:"detail,omitempty"`
}

// Change is one line of diff. Between two images, and if details are asked for, it has all
// members, of which those that say nothing are left out.
type Change struct {
	Kind string // A, C or D
	Path Path
	ChangeDetail
}

// ChangeDetail is what there is to say of a path that differs; see
// [layers.Difference].
type ChangeDetail struct {
	Type      string   `json:"type,omitempty"`
	Size      int64    `json:"size,omitempty"`
	OldSize   int64    `json:"oldSize,omitempty"`
	LinkTo    Path     `json:"linkTo,omitempty"`
	OldLinkTo Path     `json:"oldLinkTo,omitempty"`
	Why       []string `json:"why,omitempty"`
	Details   []string `json:"details,omitempty"`
}

// CommitRequest makes an image of a container.
type CommitRequest struct {
	Container string   `json:"container"`
	Ref       string   `json:"ref,omitempty"`
	Author    string   `json:"author,omitempty"`
	Message   string   `json:"message,omitempty"`
	Changes   []string `json:"changes,omitempty"`
}

// RecordBuildRequest says which image a build step has made.
type RecordBuildRequest struct {
	Step  layers.BuildStep `json:"step"`
	Image string           `json:"image"`
}

// Inspection is an image or a container; exactly one is set.
type Inspection struct {
	Image     *layers.ImageDetail `json:"image,omitempty"`
	Container *Status             `json:"container,omitempty"`
}

// CheckRequest verifies the store.
type CheckRequest struct {
	Deep   bool `json:"deep,omitempty"`
	Repair bool `json:"repair,omitempty"`
}

// GCRequest removes what nothing needs.
type GCRequest struct {
	DryRun bool `json:"dryRun,omitempty"`
}

// PruneRequest removes images that nothing needs.
type PruneRequest struct {
	All    bool `json:"all,omitempty"` // also those that have a name
	DryRun bool `json:"dryRun,omitempty"`
}

// CompactResult has the sizes of the database in bytes.
type CompactResult struct {
	Before int64 `json:"before"`
	After  int64 `json:"after"`
}

// CopyResult says where the copy is.
type CopyResult struct {
	Path Path `json:"path"`
}
