package layers

import (
	"context"
	"fmt"
	"io"
)

// Store is a layer and image store in one directory. Its methods may be called
// from several goroutines, and several processes may have the same directory
// open.
type Store struct {
	root string
	opts Options
}

var errTodo = fmt.Errorf("%w: not there yet", ErrUnsupported)

// Open opens the store in root and makes an empty one if there is none. The
// database is not kept open between calls.
func Open(ctx context.Context, root string, o Options) (*Store, error) {
	return &Store{root: root, opts: o}, nil
}

// Close releases what the store holds. It does not touch the disk.
func (s *Store) Close() error { return nil }

// Root returns the absolute directory of the store.
func (s *Store) Root() string { return s.root }

// Load reads every image of an archive or OCI layout into the store.
func (s *Store) Load(ctx context.Context, src Source, o LoadOptions) ([]LoadedImage, error) {
	return nil, errTodo
}

// Save writes images as one archive.
func (s *Store) Save(ctx context.Context, w io.Writer, refs []string, o SaveOptions) error {
	return errTodo
}

// Import makes a one-layer image of a flat root filesystem tar.
func (s *Store) Import(ctx context.Context, r io.Reader, ref string, o ImportOptions) (Image, error) {
	return Image{}, errTodo
}

// Export writes the merged tree of a container or image as a flat tar.
func (s *Store) Export(ctx context.Context, nameOrRef string, w io.Writer) error { return errTodo }

// Images lists images, newest first. filter is "", a repository, a
// repository:tag or a pattern of them.
func (s *Store) Images(ctx context.Context, filter string) ([]ImageSummary, error) {
	return nil, errTodo
}

// ResolveImage finds an image by reference, ID or unique ID prefix.
func (s *Store) ResolveImage(ctx context.Context, nameOrID string) (Image, error) {
	return Image{}, errTodo
}

// Tag gives an image one more name.
func (s *Store) Tag(ctx context.Context, source, target string) error { return errTodo }

// RemoveImage removes a reference and, with the last one, the image and every
// layer nothing else needs.
func (s *Store) RemoveImage(ctx context.Context, nameOrID string, o RemoveOptions) ([]RemoveAction, error) {
	return nil, errTodo
}

// History lists the steps that made an image, newest first.
func (s *Store) History(ctx context.Context, nameOrID string) ([]HistoryEntry, error) {
	return nil, errTodo
}

// Inspect returns everything known of an image.
func (s *Store) Inspect(ctx context.Context, nameOrID string) (*ImageDetail, error) {
	return nil, errTodo
}

// Layers lists the layers of an image, bottom first, or of the whole store for "".
func (s *Store) Layers(ctx context.Context, nameOrID string) ([]LayerInfo, error) {
	return nil, errTodo
}

// CreateContainer makes a writable layer on an image. An empty name is
// generated.
func (s *Store) CreateContainer(ctx context.Context, imageRef, name string, o CreateOptions) (*Container, error) {
	return nil, errTodo
}

// Container finds a container by name, ID or unique ID prefix.
func (s *Store) Container(ctx context.Context, nameOrID string) (*Container, error) {
	return nil, errTodo
}

// Containers lists all containers, newest first.
func (s *Store) Containers(ctx context.Context) ([]Container, error) { return nil, errTodo }

// RemoveContainer deletes a container and its writable layer. A mounted one is
// refused.
func (s *Store) RemoveContainer(ctx context.Context, nameOrID string) error { return errTodo }

// ContainerStack returns the directories a mount of the container is made of:
// init layer, then image layers.
func (s *Store) ContainerStack(ctx context.Context, nameOrID string) (Stack, error) {
	return Stack{}, errTodo
}

// ImageStack returns the directories of a read-only mount of an image.
func (s *Store) ImageStack(ctx context.Context, nameOrID string) (Stack, error) {
	return Stack{}, errTodo
}

// Diff lists what a container has changed against its image.
func (s *Store) Diff(ctx context.Context, nameOrID string) ([]Change, error) { return nil, errTodo }

// DiffImages lists what changed from image a to image b.
func (s *Store) DiffImages(ctx context.Context, a, b string) ([]Change, error) { return nil, errTodo }

// Commit makes an image of a container's image and changes. An empty ref
// leaves it untagged. Of a mounted container only after its server has been
// quiesced and synced.
func (s *Store) Commit(ctx context.Context, container, ref string, o CommitOptions) (Image, error) {
	return Image{}, errTodo
}

// AddLive records a mount. A row of a dead process for the same target is
// replaced; a living one is ErrInUse.
func (s *Store) AddLive(ctx context.Context, l Live) error { return errTodo }

// RemoveLive forgets a mount. Unknown targets are not an error.
func (s *Store) RemoveLive(ctx context.Context, target string) error { return errTodo }

// LiveMounts lists every recorded mount of this boot, dead ones too: the
// caller decides what to do with them.
func (s *Store) LiveMounts(ctx context.Context) ([]Live, error) { return nil, errTodo }

// Check verifies the invariants of the store.
func (s *Store) Check(ctx context.Context, o CheckOptions) (*Report, error) { return nil, errTodo }

// GC removes what no row names, images that nothing names, and trash.
func (s *Store) GC(ctx context.Context, dryRun bool) (GCReport, error) { return GCReport{}, errTodo }

// DiskUsage says where the bytes are.
func (s *Store) DiskUsage(ctx context.Context) (DiskUsage, error) { return DiskUsage{}, errTodo }
