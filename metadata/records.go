package metadata

import (
	"encoding/json"
	"time"

	"github.com/opencontainers/go-digest"
)

// Owner names a process so that its death can be told: a pid alone is reused,
// a start time alone repeats after a reboot, a pid means nothing in another
// namespace.
type Owner struct {
	BootID    string `json:"bootID"`
	Pid       int    `json:"pid"`
	StartTime uint64 `json:"startTime"` // clock ticks since boot
	PidNS     string `json:"pidNS,omitempty"`
}

// Layer is one position in a chain of layers.
type Layer struct {
	ChainID   digest.Digest `json:"chainID"`
	DiffID    digest.Digest `json:"diffID"`
	Parent    digest.Digest `json:"parent,omitempty"` // chainID
	CacheID   string        `json:"cacheID"`
	Depth     int           `json:"depth"` // 1 for a base layer
	Blob      digest.Digest `json:"blob,omitempty"`
	BlobSize  int64         `json:"blobSize,omitempty"`
	MediaType string        `json:"mediaType,omitempty"`
	Origin    string        `json:"origin"` // load, pull, import, commit, adopt, init
	Created   time.Time     `json:"created"`
}

// Cache is one content directory. Several chains may share it.
type Cache struct {
	CacheID string        `json:"cacheID"`
	DiffID  digest.Digest `json:"diffID"`
	// Bind is empty if the content depends on nothing but the layer's tar.
	// Otherwise it is the digest of what was taken from the layers below
	// (attributes of directories the tar does not mention) and only a chain
	// that yields the same may share the directory.
	Bind       string        `json:"bind,omitempty"`
	Dialect    string        `json:"dialect"`
	Owners     string        `json:"owners"` // how owners are told: "real", "override" or "virtual" (package layers)
	Apparent   int64         `json:"apparent"`
	Allocated  int64         `json:"allocated"`
	Inodes     int64         `json:"inodes"`
	TarSize    int64         `json:"tarSize"`
	SplitSHA   digest.Digest `json:"splitSHA256"`
	SplitSize  int64         `json:"splitSize"`
	Duplicates bool          `json:"duplicates,omitempty"` // the tar names a path twice
	// Broken says what is wrong with the content, once a check has found something.
	// The next load of the layer puts whole content in its place.
	Broken string `json:"broken,omitempty"`
	// Adopted is set if the content lies in another engine's store.
	Adopted *Adopted  `json:"adopted,omitempty"`
	Created time.Time `json:"created"`
}

// Adopted is where the content of a layer lies that the store uses without owning
// it: it is never changed and never removed.
type Adopted struct {
	Path   string `json:"path"`   // of the directory, absolute, without symbolic links
	Source string `json:"source"` // kind of store: overlay2, aufs, containers-storage …
	// What the directory was at adoption; another one in its place is noticed.
	Dev   uint64    `json:"dev"`
	Ino   uint64    `json:"ino"`
	Ctime time.Time `json:"ctime"`
}

// Blob is a compressed layer that is kept, so that a push gives the registry what
// the pull has got.
type Blob struct {
	Digest  digest.Digest `json:"digest"`
	Size    int64         `json:"size"`
	Created time.Time     `json:"created"`
}

// Image is what is known of an image beside its config.
type Image struct {
	ID       digest.Digest `json:"id"`
	TopChain digest.Digest `json:"topChain,omitempty"` // empty: no layers
	Parent   digest.Digest `json:"parent,omitempty"`   // image it was committed from
	Created  time.Time     `json:"created"`            // in this store
	Made     time.Time     `json:"made,omitzero"`      // what the config says of its creation
	Layers   int           `json:"layers,omitempty"`   // of the config
	Platform string        `json:"platform"`
	Manifest digest.Digest `json:"manifest,omitempty"` // it came with
	Origin   string        `json:"origin"`
	Built    bool          `json:"built,omitempty"` // made here, not loaded
	// Tagged says that the image has had a name with a tag. Without one now, it has been
	// replaced; an image that never had one was meant to have none.
	Tagged bool `json:"tagged,omitempty"`
}

// Ref is the image a reference names.
type Ref struct {
	ImageID digest.Digest `json:"imageID"`
	Updated time.Time     `json:"updated"`
}

// Container states.
const (
	Creating = "creating"
	Ready    = "ready"
	Broken   = "broken"
)

// Container is a writable layer.
type Container struct {
	ID        string        `json:"id"`
	Name      string        `json:"name"`
	MountID   string        `json:"mountID"`
	Chain     digest.Digest `json:"chain"`          // its lower layers: the init layer's chainID
	Top       digest.Digest `json:"top,omitempty"`  // the image's top chain
	Init      string        `json:"init,omitempty"` // cacheID of the init layer
	ImageID   digest.Digest `json:"imageID"`
	ImageName string        `json:"imageName"`
	Dialect   string        `json:"dialect"` // of the upper
	State     string        `json:"state"`
	Owner     Owner         `json:"owner"` // while creating
	Created   time.Time     `json:"created"`
}

// Live is one mount.
type Live struct {
	Target      string        `json:"target"`
	ContainerID string        `json:"containerID,omitempty"`
	ImageID     digest.Digest `json:"imageID,omitempty"`
	ChainID     digest.Digest `json:"chainID,omitempty"`
	Pid         int           `json:"pid"`
	StartTime   uint64        `json:"startTime"`
	BootID      string        `json:"bootID"`
	ReadOnly    bool          `json:"readOnly,omitempty"`
	RunDir      string        `json:"runDir,omitempty"`
	Created     time.Time     `json:"created"`
}

// Wanted is a mount that is to be made again when it has ended.
type Wanted struct {
	Target      string          `json:"-"` // the key: it may have any bytes
	ContainerID string          `json:"containerID,omitempty"`
	ImageID     digest.Digest   `json:"imageID,omitempty"`
	ReadOnly    bool            `json:"readOnly,omitempty"`
	Request     json.RawMessage `json:"request"` // of package mountd
	// Unmounted is the boot in which others than plyfs have unmounted it.
	Unmounted string    `json:"unmounted,omitempty"`
	Problem   string    `json:"problem,omitempty"` // why it could not be made the last time
	Since     time.Time `json:"since"`
}

// Ingest is a stage being filled.
type Ingest struct {
	ID      string    `json:"id"` // the cacheID it will get
	Kind    string    `json:"kind"`
	Owner   Owner     `json:"owner"`
	Started time.Time `json:"started"`
}

// Lease keeps layers alive that no image names yet.
type Lease struct {
	ID      string    `json:"id"`
	Owner   Owner     `json:"owner"`
	Started time.Time `json:"started"`
}

// Trash is a path, relative to the store, to be deleted.
type Trash struct {
	Seq    uint64    `json:"seq"`
	Path   string    `json:"path"`
	Reason string    `json:"reason"`
	Since  time.Time `json:"since"`
}
