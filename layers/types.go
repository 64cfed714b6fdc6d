package layers

import (
	"encoding/json"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/zap"

	"github.com/plyfs/plyfs/layers/foreign"
	"github.com/plyfs/plyfs/layers/registry"
	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/override"
)

// Options configure [Open].
type Options struct {
	Logger      *zap.Logger      // nil: no log
	LockTimeout time.Duration    // how long to wait for a busy database; 0: 30 s
	OnLockWait  func(msg string) // called once per wait that lasts, with a sentence for the user
	Limits      Limits           // zero fields take the defaults
	// Damaged opens a store also if its database is damaged or missing, for
	// [Store.Check] and [Store.Rebuild]; everything else says so then.
	Damaged bool
	// AnyFileSystem opens a store also on a file system where locks or mappings
	// are not safe between machines.
	AnyFileSystem bool
	// OnTrash is called when something is to be deleted that the call does not
	// wait for: somebody has to call [Store.Purge]. nil: the call deletes it.
	OnTrash func()
}

// Progress is one step of long work.
type Progress struct {
	ID      string `json:"id"`     // short diffID, or a file name
	Action  string `json:"action"` // "unpacking", "verifying", "exists", "saving" …
	Current int64  `json:"current"`
	Total   int64  `json:"total"` // 0: unknown
	Done    bool   `json:"done"`
}

// ProgressFunc receives progress. It is called from several goroutines, never
// concurrently, and must not block.
type ProgressFunc func(Progress)

// Source is where an image archive comes from: a stream (file or pipe) or an
// OCI layout directory.
type Source struct {
	Reader io.Reader
	Dir    string
	Size   int64 // size of the stream when known, for progress
}

// LoadOptions configure [Store.Load].
type LoadOptions struct {
	Progress ProgressFunc
	Platform string // os/arch[/variant] wanted from an index; "" = this machine
	Ref      string // name for images that carry none; "" leaves them untagged
}

// LoadedImage is one image found in an archive.
type LoadedImage struct {
	ID   digest.Digest `json:"id"`
	Refs []string      `json:"refs"` // familiar form, as given to images and rmi
	// Replaced are those of them that other images had until then, with these images.
	Replaced map[string]digest.Digest `json:"replaced,omitempty"`
}

// PullOptions configure [Store.Pull].
type PullOptions struct {
	Progress ProgressFunc
	Platform string // os/arch[/variant] wanted from an index; "" = this machine
	// KeepBlobs keeps the layers as the registry has sent them as well, so that a
	// push gives the same digests.
	KeepBlobs bool
	Registry  registry.Options // zero fields take the defaults
}

// PullResult is what a pull has brought.
type PullResult struct {
	ID        digest.Digest `json:"id"`
	Ref       string        `json:"ref"`       // as users write it
	Canonical string        `json:"canonical"` // with registry
	Digest    digest.Digest `json:"digest"`    // of the manifest or index that the name stands for
	Platform  string        `json:"platform"`
	// Updated: the name stands for another image than before, or is new.
	Updated    bool     `json:"updated"`
	Layers     int      `json:"layers"`     // looked at; 0 if the manifest was known
	Present    int      `json:"present"`    // of which the store had
	Downloaded int64    `json:"downloaded"` // bytes of layers
	Notes      []string `json:"notes,omitempty"`
}

// PushOptions configure [Store.Push].
type PushOptions struct {
	Progress ProgressFunc
	// Image is what to push, if it is not what the store calls by the target's name.
	Image    string
	Format   string           // "oci" (default) or "docker": of a manifest that has to be made
	Registry registry.Options // zero fields take the defaults
}

// PushResult is what a push has done.
type PushResult struct {
	ID     digest.Digest `json:"id"`
	Ref    string        `json:"ref"`
	Digest digest.Digest `json:"digest"` // of the manifest
	Size   int64         `json:"size"`   // of the manifest
	// Original: the manifest is the one that the image came with.
	Original bool     `json:"original"`
	Uploaded int64    `json:"uploaded"` // bytes of blobs
	Mounted  int      `json:"mounted"`  // blobs taken from another repository
	Notes    []string `json:"notes,omitempty"`
}

// SaveOptions configure [Store.Save].
type SaveOptions struct {
	Format   string // FormatDocker (default), FormatOldDocker or FormatOCI
	Progress ProgressFunc
}

// ImportOptions configure [Store.Import].
type ImportOptions struct {
	Message  string
	Changes  []string // Dockerfile instructions as for docker import --change
	Platform string   // "" = this machine
	Progress ProgressFunc
}

// RemoveOptions configure [Store.RemoveImage].
type RemoveOptions struct {
	Force   bool
	NoPrune bool // keep untagged parents
}

// RemoveAction is one line of what rmi did.
type RemoveAction struct {
	Kind string `json:"kind"` // "Untagged" or "Deleted"
	Ref  string `json:"ref"`
}

// CommitOptions configure [Store.Commit].
type CommitOptions struct {
	Author   string
	Message  string
	Changes  []string // Dockerfile instructions as for docker commit --change
	Progress ProgressFunc
}

// Image is a resolved image.
type Image struct {
	ID       digest.Digest   `json:"id"`
	Refs     []string        `json:"refs"`
	Parent   digest.Digest   `json:"parent,omitempty"`
	Created  time.Time       `json:"created"`
	Platform string          `json:"platform"`
	DiffIDs  []digest.Digest `json:"diffIDs"`
	ChainID  digest.Digest   `json:"chainID,omitempty"` // of the top layer; empty for an image without layers
	Config   ocispec.Image   `json:"config"`
}

// ImageSummary is one line of images.
type ImageSummary struct {
	Repository string        `json:"repository"` // "<none>" when untagged
	Tag        string        `json:"tag"`
	ID         digest.Digest `json:"id"`
	Created    time.Time     `json:"created"`
	Size       int64         `json:"size"`       // apparent bytes of all its layers
	SharedSize int64         `json:"sharedSize"` // of which in other images too
	UniqueSize int64         `json:"uniqueSize"`
	Layers     int           `json:"layers"`
	Containers int           `json:"containers"`
	// Broken: some of its layers are missing; it has to be loaded again.
	Broken bool `json:"broken,omitempty"`
	// Digests of its manifests or indexes in registries, under this repository.
	Digests []digest.Digest `json:"digests,omitempty"`
}

// HistoryEntry is one line of history, newest first.
type HistoryEntry struct {
	ID        string        `json:"id"` // image ID, or "<missing>"
	Created   time.Time     `json:"created"`
	CreatedBy string        `json:"createdBy"`
	Author    string        `json:"author,omitempty"`
	Comment   string        `json:"comment,omitempty"`
	Empty     bool          `json:"emptyLayer,omitempty"`
	DiffID    digest.Digest `json:"diffID,omitempty"`
	ChainID   digest.Digest `json:"chainID,omitempty"`
	Size      int64         `json:"size"`
	Tags      []string      `json:"tags,omitempty"`
}

// ImageDetail is everything inspect shows.
type ImageDetail struct {
	Image
	Size         int64           `json:"size"`
	LayerDetails []LayerInfo     `json:"layers"` // bottom first, as in the config
	RawConfig    json.RawMessage `json:"rawConfig"`
	Containers   []string        `json:"containers,omitempty"`
	Origin       string          `json:"origin,omitempty"` // load, pull, import, commit
	// Manifests are the digests of the manifests and indexes that it came with, or was
	// pushed as, which are kept.
	Manifests []digest.Digest `json:"manifests,omitempty"`
}

// LayerInfo describes one layer of the store.
type LayerInfo struct {
	DiffID    digest.Digest    `json:"diffID"`
	ChainID   digest.Digest    `json:"chainID"`
	Parent    digest.Digest    `json:"parent,omitempty"`
	CacheID   string           `json:"cacheID"`
	Path      string           `json:"path"`
	Dialect   whiteout.Dialect `json:"dialect"`
	Size      int64            `json:"size"`      // sum of file sizes, hard links once
	Allocated int64            `json:"allocated"` // bytes on disk
	Inodes    int64            `json:"inodes"`
	TarSize   int64            `json:"tarSize"`
	Exact     bool             `json:"exact"`             // can be written out again byte for byte
	Adopted   string           `json:"adopted,omitempty"` // kind of the store that Path belongs to
	Created   time.Time        `json:"created"`
}

// Container states.
const (
	StateReady  = "ready"
	StateBroken = "broken"
)

// Container is a writable layer on an image.
type Container struct {
	ID        string        `json:"id"` // 64 hex digits
	Name      string        `json:"name"`
	MountID   string        `json:"mountID"`
	InitID    string        `json:"initID"`
	ImageID   digest.Digest `json:"imageID"`
	ImageName string        `json:"imageName"` // as given at creation
	ChainID   digest.Digest `json:"chainID"`
	Created   time.Time     `json:"created"`
	State     string        `json:"state"`
	Upper     string        `json:"upper"`
	Live      []Live        `json:"live,omitempty"` // where it is mounted now, dead ones left out
}

// LayerDir is one read-only directory of a stack.
type LayerDir struct {
	Path    string           `json:"path"`
	Dialect whiteout.Dialect `json:"dialect"`
	DiffID  digest.Digest    `json:"diffID,omitempty"` // empty for the init layer
	CacheID string           `json:"cacheID,omitempty"`
	// Override is how files say what they are in a store without privileges.
	// Symbolic links cannot; only the index knows their owners.
	Override override.Form `json:"override,omitempty"`
	// Virtual: the files say nothing, neither by what they are nor by Override.
	// Only the index knows owners, modes and types.
	Virtual bool `json:"virtual,omitempty"`

	tree    *node             // of a stage without privileges: what its index will say
	adopted *metadata.Adopted // Path is in another engine's store
	ids     *foreign.IDs      // see encoding
}

// Stack is what a mount is made of. Lowers[0] is the topmost.
type Stack struct {
	Lowers  []LayerDir       `json:"lowers"`
	Upper   string           `json:"upper,omitempty"`
	Work    string           `json:"work,omitempty"`
	Dialect whiteout.Dialect `json:"dialect"` // of the upper
	// Override is how files of the upper say what they are.
	Override override.Form `json:"override,omitempty"`
	// ChainID is the chain that Lowers are, if they are one.
	ChainID digest.Digest `json:"chainID,omitempty"`
	// History is the file that says what was copied up to the upper, and by whom. It need
	// not exist.
	History string `json:"history,omitempty"`

	ids *foreign.IDs // of the upper, see encoding
}

// Change is one line of diff: kind A, C or D and an absolute path.
type Change struct {
	Kind string `json:"kind"`
	Path string `json:"path"`
}

// Live is one mount that somebody has made.
type Live struct {
	Target      string        `json:"target"`
	ContainerID string        `json:"containerID,omitempty"`
	ImageID     digest.Digest `json:"imageID,omitempty"`
	ChainID     digest.Digest `json:"chainID,omitempty"`
	Pid         int           `json:"pid"`
	StartTime   uint64        `json:"startTime"` // of the pid, in clock ticks since boot
	BootID      string        `json:"bootID"`
	ReadOnly    bool          `json:"readOnly"`
	RunDir      string        `json:"runDir,omitempty"`
	Created     time.Time     `json:"created"`
}

// CheckOptions configure [Store.Check].
type CheckOptions struct {
	Deep     bool // read all content and compare with the digests
	Repair   bool
	Progress ProgressFunc
}

// Severities of a [Finding].
const (
	SeverityError   = "error"
	SeverityWarning = "warning" // nothing is broken; something deserves a look
)

// Finding is one broken invariant.
type Finding struct {
	Invariant string   `json:"invariant"` // "K7"
	Severity  string   `json:"severity"`
	Object    string   `json:"object"`
	Problem   string   `json:"problem"`
	Repair    string   `json:"repair"`           // what --repair does about it, or the user can
	Images    []string `json:"images,omitempty"` // that have to be loaded again
	Fixed     bool     `json:"fixed"`
}

// Open reports whether the finding is an error that is still there.
func (f Finding) Open() bool { return !f.Fixed && f.Severity != SeverityWarning }

// Report is the result of a check.
type Report struct {
	Findings   []Finding `json:"findings"`
	Layers     int       `json:"layers"`
	Images     int       `json:"images"`
	Containers int       `json:"containers"`
	Bytes      int64     `json:"bytes"` // read, when deep
}

// PruneOptions configure [Store.Prune].
type PruneOptions struct {
	All    bool // also images with names that no container and no mount uses
	DryRun bool
}

// GCReport says what gc or prune removed, or would remove.
type GCReport struct {
	Untagged  []string        `json:"untagged,omitempty"` // references that prune removed
	Images    []digest.Digest `json:"images,omitempty"`
	Layers    []digest.Digest `json:"layers,omitempty"` // chainIDs
	Stages    []string        `json:"stages,omitempty"`
	Paths     []string        `json:"paths,omitempty"` // directories without a row
	Reclaimed int64           `json:"reclaimed"`       // bytes of this store
	DryRun    bool            `json:"dryRun"`
}

// Usage is one line of df.
type Usage struct {
	Count       int   `json:"count"`
	Active      int   `json:"active"`
	Size        int64 `json:"size"` // allocated bytes
	Reclaimable int64 `json:"reclaimable"`
}

// DiskUsage says where the bytes of the store are. The parts add up to Total.
type DiskUsage struct {
	Images     Usage `json:"images"` // count of images; size of their layers
	Layers     Usage `json:"layers"`
	Containers Usage `json:"containers"` // RW layers
	Chains     int64 `json:"chains"`     // merged indexes, a cache
	Blobs      int64 `json:"blobs"`      // compressed layers that are kept
	Init       int64 `json:"init"`
	Stage      int64 `json:"stage"` // with partial downloads
	Trash      int64 `json:"trash"`
	// Adopted is what layers in other engines' stores take there; no part of Total.
	Adopted  int64 `json:"adopted,omitempty"`
	Database int64 `json:"database"` // with the reserve for full disks and the store's own directories
	Records  int64 `json:"records"`  // what is kept beside the database, copies of it
	Other    int64 `json:"other"`    // what no row explains
	Total    int64 `json:"total"`
}
