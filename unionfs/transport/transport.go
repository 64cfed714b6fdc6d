package transport

import (
	"errors"
	"os"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
)

// MountOptions are what mount(2) is told; the union itself is described by
// unionfs.Options.
type MountOptions struct {
	Target     string // directory to mount on
	FSName     string // first column of the mount table; "plyfs" if empty
	Subtype    string // type is "fuse.<Subtype>"; "plyfs" if empty
	ReadOnly   bool
	AllowOther bool
	NoSuid     bool
	NoDev      bool
	NoExec     bool
	NoAtime    bool
}

// ServeOptions tune the request loop.
type ServeOptions struct {
	// Ready is called once, after the kernel's INIT was answered.
	Ready func()
	// Debug logs every request.
	Debug  bool
	Logger *zap.Logger
}

// Mount opens /dev/fuse and mounts it on o.Target: by mount(2) where the
// caller may, else through fusermount3. The caller owns the returned file and
// must keep it open for as long as the mount shall live.
func Mount(o MountOptions) (*os.File, error) { return nil, errors.New("transport: not built yet") }

// Serve answers the requests that arrive on dev until the file system is
// unmounted (nil) or the connection breaks (an error).
func Serve(dev *os.File, fs fuse.RawFileSystem, o ServeOptions) error {
	return errors.New("transport: not built yet")
}

// Unmount detaches target: umount2(2) where the caller may, else fusermount3.
// With lazy the name disappears at once and the rest when the last user left.
func Unmount(target string, lazy bool) error { return errors.New("transport: not built yet") }
