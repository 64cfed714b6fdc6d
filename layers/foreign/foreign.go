package foreign

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
)

// Sentinels; every error of this package wraps at most one.
var (
	// ErrNoStore: the directory is no store of a known kind.
	ErrNoStore = errors.New("not a known store")
	// ErrUnsupported: a store that is recognised and cannot be read.
	ErrUnsupported = errors.New("not supported")
	// ErrDamaged: a file of the store is missing, or is not what it must be.
	ErrDamaged = errors.New("damaged")
)

// Kinds of stores.
const (
	KindDocker     = "docker"
	KindGraph      = "docker graph"
	KindRegistry   = "registry v1"
	KindContainers = "containers-storage"
	KindContainerd = "containerd"
)

// Limits bound what is read. Zero fields take the defaults.
type Limits struct {
	Config    int64 // bytes of an image config
	Index     int64 // bytes of a file that lists things
	Total     int64 // bytes of all files but layers
	JSONDepth int
	Layers    int // of one image
	Objects   int // images, layers or containers of a store
}

func (l Limits) withDefaults() Limits {
	if l.Config == 0 {
		l.Config = 8 << 20
	}
	if l.Index == 0 {
		l.Index = 64 << 20
	}
	if l.Total == 0 {
		l.Total = 1 << 30
	}
	if l.JSONDepth == 0 {
		l.JSONDepth = 64
	}
	if l.Layers == 0 {
		l.Layers = 1000
	}
	if l.Objects == 0 {
		l.Objects = 1_000_000
	}
	return l
}

// Store is a store of another engine.
type Store struct {
	Kind   string
	Driver string // of the layers: overlay2, aufs, vfs …; may be empty
	Path   string // of the root, absolute, without symbolic links

	Images     []*Image // parents before their children
	Containers []*Container
	// Problems is what was left out, and why.
	Problems []Problem
	// Users are processes that have the store open, for messages.
	Users []string

	limits Limits
	total  int64 // bytes read
	fd     int
	open   []*os.File      // databases
	mounts map[string]bool // see Mounted
}

// Problem is an object of the store that cannot be taken over.
type Problem struct {
	Kind   string // image, layer, container, reference, store
	Object string
	Reason string
}

// Image is one image. Either Config is set, or Steps.
type Image struct {
	Key    string // its name in this store
	ID     digest.Digest
	Config []byte
	// Steps are the JSON documents of an image from before content digests and of
	// the images below it, base first: one for each layer. See [ConfigFromSteps].
	Steps  []json.RawMessage
	Parent string   // Key of the image it was made from; it may be missing
	Refs   []string // as the store has them: name:tag, or name@digest
	Layers []*Layer // base first
}

// Layer is one layer. Layers that are one in the store are one value.
type Layer struct {
	Name   string        // in this store, for messages
	DiffID digest.Digest // "": nobody knows before its tar is read
	Size   int64         // of its files, as the store says; -1: it does not
	Tree   *Tree         // nil: the layer is not unpacked
	Split  string        // tar-split record, JSON with gzip; "": none
	Blob   *Blob         // nil: its archive is not kept
}

// Tree is a directory with content.
type Tree struct {
	Dir     string // below the store's root
	Dialect whiteout.Dialect
	// Whole: the directory has not what a layer changes, but all that there is
	// with it.
	Whole bool
	// Work is the work directory of an upper; "": none.
	Work string
}

// Blob is the archive of a layer, which may be compressed.
type Blob struct {
	File   string        // below the store's root
	Digest digest.Digest // "": unknown
	Size   int64         // of the file; -1: unknown
	// Checksums is what a registry of version 1 has noted: at least one of them is
	// that of the file, of the tar in it, or of Document, a newline and the file.
	Checksums []digest.Digest
	Document  []byte
}

// Container is a writable layer.
type Container struct {
	ID        string // 64 hex digits
	Name      string
	Image     string // Key
	ImageName string // as it was given
	Upper     *Tree
	Base      *Tree // of a whole Upper: the tree that it was when it was made
	Running   bool
	Created   time.Time
}

// Open finds out what lies in path, which the operator has named, and reads it.
func Open(ctx context.Context, path string, l Limits) (*Store, error) {
	var r fsat.Resolver
	abs, err := r.Resolve(path)
	if err != nil {
		return nil, err
	}
	s := &Store{Path: abs, limits: l.withDefaults(), fd: -1}
	if s.fd, err = fsat.OpenTrusted(abs); err != nil {
		return nil, fmt.Errorf("open %q: %w", path, err)
	}
	if err := s.read(ctx); err != nil {
		s.Close()
		return nil, fmt.Errorf("%q: %w", path, err)
	}
	return s, nil
}

// Close releases the store.
func (s *Store) Close() {
	for _, f := range s.open {
		_ = f.Close() // read only
	}
	s.open = nil
	fsat.Close(s.fd)
	s.fd = -1
}

func (s *Store) read(ctx context.Context) error {
	for _, k := range []struct {
		found func() bool
		read  func(context.Context) error
	}{
		{s.isDocker, s.readDocker},
		{s.isGraph, s.readGraph},
		{s.isContainers, s.readContainers},
		{s.isContainerd, s.readContainerd},
		{s.isRegistry, s.readRegistry},
	} {
		if k.found() {
			s.look()
			return k.read(ctx)
		}
	}
	if d := s.strangeDriver(); d != "" {
		return s.refuseDriver(d)
	}
	if d := "containerd/daemon"; s.isFile(d + "/" + containerdMeta) {
		return fmt.Errorf("%w: the images of this Docker are in a containerd of its own: adopt %s", ErrNoStore, s.Abs(d))
	}
	return fmt.Errorf("%w: expected the root of Docker (image/, or graph/), of podman (overlay-images/), of containerd (io.containerd.metadata.v1.bolt/) or of a registry of version 1 (images/ and repositories/)", ErrNoStore)
}

// strangeDrivers keep layers where nobody can look into them.
var strangeDrivers = []string{"devicemapper", "btrfs", "zfs", "windowsfilter"}

func (s *Store) strangeDriver() string {
	for _, d := range strangeDrivers {
		if s.isDir(d) {
			return d
		}
	}
	return ""
}

func (s *Store) refuseDriver(d string) error {
	return fmt.Errorf("%w: its layers are those of the storage driver %s, which are no directories: save the images with the engine and load them", ErrUnsupported, d)
}

// problem notes what is left out.
func (s *Store) problem(kind, object string, err error) {
	s.Problems = append(s.Problems, Problem{kind, object, err.Error()})
}

// OpenTree opens a directory of content, O_PATH.
func (s *Store) OpenTree(t *Tree) (int, error) {
	return fsat.OpenNoLinks(s.fd, t.Dir, unix.O_PATH|unix.O_DIRECTORY)
}

// OpenFile opens a regular file of the store for reading.
func (s *Store) OpenFile(name string) (*os.File, error) {
	p, err := fsat.OpenNoLinks(s.fd, name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer fsat.Close(p)
	var st unix.Stat_t
	if err := fsat.Fstat(p, &st); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%s: %w: it is no regular file", name, ErrDamaged)
	}
	fd, err := fsat.Reopen(p, unix.O_RDONLY|unix.O_NOATIME)
	if errors.Is(err, unix.EPERM) { // O_NOATIME is for owners and root
		fd, err = fsat.Reopen(p, unix.O_RDONLY)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Abs is the absolute path of a directory of the store.
func (s *Store) Abs(rel string) string { return filepath.Join(s.Path, rel) }

// Mounted reports whether anything is mounted on a directory of the store, or the
// directory is the upper of an overlay, in any mount namespace that we can see.
func (s *Store) Mounted(rel string) bool { return s.mounts[s.Abs(rel)] }

// sortImages puts parents before their children.
func (s *Store) sortImages() {
	byKey := map[string]*Image{}
	for _, i := range s.Images {
		byKey[i.Key] = i
	}
	done := map[string]bool{}
	out := make([]*Image, 0, len(s.Images))
	for _, i := range s.Images {
		// Ancestors first, without recursion: a chain may be long, or a circle.
		var chain []*Image
		for at := i; at != nil && !done[at.Key]; at = byKey[at.Parent] {
			done[at.Key] = true
			chain = append(chain, at)
		}
		for k := len(chain) - 1; k >= 0; k-- {
			out = append(out, chain[k])
		}
	}
	s.Images = out
}

// shortName is a name for messages.
func shortName(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	if len(id) > 12 {
		return id[:12]
	}
	return id
}
