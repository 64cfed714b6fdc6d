package layers

import ("context"; "fmt"; "io")
var errTodo = fmt.Errorf("%w: not there yet", ErrUnsupported)
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
