package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// LikeNFSEnv, set to a directory, makes the test binary serve it on the directory of
// LikeNFSTarget, as an NFS client would show it: renameat2(2) takes no flags, no devices
// can be made, and there are no extended attributes, no files without a name and no
// file handles that last.
const (
	LikeNFSEnv    = "PLYFS_TEST_LIKE_NFS"
	likeNFSTarget = "PLYFS_TEST_LIKE_NFS_TARGET"
)

// likeNFS passes on what NFS can do.
type likeNFS struct{ *fs.LoopbackNode }

var (
	_ = fs.NodeWrapChilder((*likeNFS)(nil))
	_ = fs.NodeRenamer((*likeNFS)(nil))
	_ = fs.NodeMknoder((*likeNFS)(nil))
)

func (n *likeNFS) WrapChild(_ context.Context, ops fs.InodeEmbedder) fs.InodeEmbedder {
	return &likeNFS{ops.(*fs.LoopbackNode)}
}

// inherit gives a new object the group of a setgid directory, which LoopbackNode takes
// from it.
func (n *likeNFS) inherit(name string, mode uint32, out *fuse.EntryOut, errno syscall.Errno) syscall.Errno {
	dir := filepath.Join(n.RootData.Path, n.Path(nil))
	var st unix.Stat_t
	if errno != 0 || unix.Stat(dir, &st) != nil || st.Mode&unix.S_ISGID == 0 {
		return errno
	}
	path := filepath.Join(dir, name)
	if err := unix.Lchown(path, -1, int(st.Gid)); err != nil {
		return errnoOf(err)
	}
	out.Gid = st.Gid
	if out.Mode&unix.S_IFMT == unix.S_IFDIR {
		mode |= unix.S_ISGID
		out.Mode |= unix.S_ISGID
	}
	if out.Mode&unix.S_IFMT == unix.S_IFLNK {
		return 0
	}
	return errnoOf(unix.Chmod(path, mode&0o7777))
}

func (n *likeNFS) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	i, h, f, errno := n.LoopbackNode.Create(ctx, name, flags, mode, out)
	return i, h, f, n.inherit(name, mode, out, errno)
}

func (n *likeNFS) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	i, errno := n.LoopbackNode.Mkdir(ctx, name, mode, out)
	if errno == 0 && mode&unix.S_ISVTX != 0 { // which Go's mkdir has another bit for
		out.Mode |= unix.S_ISVTX
		errno = errnoOf(unix.Chmod(filepath.Join(n.RootData.Path, n.Path(nil), name), mode&0o7777))
	}
	return i, n.inherit(name, mode, out, errno)
}

func (n *likeNFS) Symlink(ctx context.Context, target, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	i, errno := n.LoopbackNode.Symlink(ctx, target, name, out)
	return i, n.inherit(name, 0, out, errno)
}

func (n *likeNFS) Rename(ctx context.Context, name string, newParent fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	if flags != 0 {
		return syscall.EINVAL
	}
	return n.LoopbackNode.Rename(ctx, name, newParent.(*likeNFS).LoopbackNode, newName, 0)
}

func (n *likeNFS) Link(ctx context.Context, target fs.InodeEmbedder, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return n.LoopbackNode.Link(ctx, target.(*likeNFS).LoopbackNode, name, out)
}

func (n *likeNFS) Mknod(ctx context.Context, name string, mode, dev uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if t := mode & unix.S_IFMT; t == unix.S_IFCHR || t == unix.S_IFBLK {
		return nil, syscall.EPERM
	}
	i, errno := n.LoopbackNode.Mknod(ctx, name, mode, dev, out)
	return i, n.inherit(name, mode, out, errno)
}

func (n *likeNFS) Tmpfile(context.Context, uint32, uint32, *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	return nil, nil, 0, syscall.EOPNOTSUPP
}

func (n *likeNFS) Getxattr(context.Context, string, []byte) (uint32, syscall.Errno) {
	return 0, syscall.EOPNOTSUPP
}

func (n *likeNFS) Setxattr(context.Context, string, []byte, uint32) syscall.Errno {
	return syscall.EOPNOTSUPP
}

func (n *likeNFS) Listxattr(context.Context, []byte) (uint32, syscall.Errno) { return 0, 0 }

func (n *likeNFS) Removexattr(context.Context, string) syscall.Errno { return syscall.EOPNOTSUPP }

// errnoOf is the number of an error; those of package unix have one.
func errnoOf(err error) syscall.Errno {
	if e, ok := errors.AsType[syscall.Errno](err); ok || err == nil {
		return e
	}
	return syscall.EIO
}

// RunLikeNFS serves until it is unmounted.
func RunLikeNFS(dir string) error {
	unix.Umask(0)
	root, err := fs.NewLoopbackRoot(dir)
	if err != nil {
		return err
	}
	server, err := fs.Mount(os.Getenv(likeNFSTarget), &likeNFS{root.(*fs.LoopbackNode)}, &fs.Options{
		NullPermissions: true,
		MountOptions: fuse.MountOptions{
			FsName: "like-nfs", Name: "like-nfs", AllowOther: os.Geteuid() == 0, DirectMount: true, Options: []string{"default_permissions", "suid", "dev"},
		},
	})
	if err != nil {
		return err
	}
	server.Wait()
	return nil
}

// onLikeNFS is a file system that can do what NFS can; its files lie next to the directory.
func onLikeNFS(dir string, fill func() error) (func() error, error) {
	if err := os.Mkdir(dir+".export", 0o755); err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	cmd.Env = append(os.Environ(), LikeNFSEnv+"="+dir+".export", likeNFSTarget+"="+dir)
	var log LockedBuffer
	cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = &log, &log, childAttr()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	track(cmd.Process.Pid, "like-nfs "+dir)
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	ended := func() error {
		select {
		case err := <-done:
			untrack(cmd.Process.Pid)
			return err
		case <-time.After(startLimit):
			return errors.Join(fmt.Errorf("like-nfs %s does not end: %s", dir, log.String()), cmd.Process.Kill())
		}
	}
	deadline := time.After(startLimit)
	for mounted := false; !mounted; _, mounted = IsMounted(dir) {
		select {
		case err := <-done:
			untrack(cmd.Process.Pid)
			return nil, fmt.Errorf("like-nfs %s: %w: %s", dir, err, log.String())
		case <-deadline:
			return nil, errors.Join(fmt.Errorf("like-nfs %s: no mount: %s", dir, log.String()), cmd.Process.Kill(), ended())
		case <-time.After(time.Millisecond): // polling: mountinfo of a directory has no other event
		}
	}
	return func() error { return errors.Join(umount(dir), ended()) }, fill()
}
