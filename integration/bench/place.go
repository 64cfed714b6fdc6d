package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// place is a file system on which layers and uppers lie.
type place struct {
	Name string // its type, made unique: ext4, tmpfs
	dir  string // work directory of this run, without symbolic links

	fixtures map[string]*fixture
	runs     int
	close    func() error
}

// tmpfsSize is how much the tmpfs may take. Only what is used takes memory.
const tmpfsSize = 12 << 30

// newPlace makes a work directory in dir, which is made, too, if need be.
func newPlace(dir string) (*place, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	work, err := os.MkdirTemp(dir, "bench-")
	if err != nil {
		return nil, err
	}
	if work, err = filepath.EvalSymlinks(work); err != nil {
		return nil, err
	}
	if work, err = filepath.Abs(work); err != nil {
		return nil, err
	}
	name, err := fsType(work)
	p := &place{Name: name, dir: work, fixtures: map[string]*fixture{}}
	p.close = func() error { return errors.Join(detachBelow(work), os.RemoveAll(work)) }
	return p, errors.Join(err, os.Chmod(work, 0o755))
}

// newTmpfs mounts a tmpfs of its own below a directory.
func newTmpfs(dir string) (*place, error) {
	p, err := newPlace(dir)
	if err != nil {
		return nil, err
	}
	outer := p.dir
	p.Name, p.dir = "tmpfs", filepath.Join(outer, "tmpfs")
	if err := os.Mkdir(p.dir, 0o755); err != nil {
		return nil, err
	}
	options := "mode=755,nr_inodes=0,size=" + strconv.Itoa(tmpfsSize)
	if err := unix.Mount("tmpfs", p.dir, "tmpfs", 0, options); err != nil {
		return nil, errors.Join(fmt.Errorf("mount tmpfs on %s: %w", p.dir, err), os.RemoveAll(outer))
	}
	p.close = func() error {
		return errors.Join(detachBelow(outer), os.RemoveAll(outer))
	}
	return p, nil
}

// fsType names the file system that dir lies on.
func fsType(dir string) (string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "", fmt.Errorf("statfs %s: %w", dir, err)
	}
	switch uint32(st.Type) {
	case unix.EXT4_SUPER_MAGIC:
		return "ext4", nil
	case unix.TMPFS_MAGIC:
		return "tmpfs", nil
	case unix.XFS_SUPER_MAGIC:
		return "xfs", nil
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs", nil
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlay", nil
	case unix.FUSE_SUPER_MAGIC:
		return "fuse", nil
	}
	return fmt.Sprintf("fs-%x", uint32(st.Type)), nil
}

// memory says whether there is no disk below.
func (p *place) memory() bool { return p.Name == "tmpfs" }

// fixture returns the fixture of that name, made at the first call.
func (p *place) fixture(ctx context.Context, name string, sz *sizes) (*fixture, error) {
	if f := p.fixtures[name]; f != nil {
		return f, nil
	}
	f, err := makeFixture(ctx, name, filepath.Join(p.dir, "fixtures", name), sz)
	if err != nil {
		return nil, fmt.Errorf("make the layers %q on %s: %w", name, p.Name, err)
	}
	p.fixtures[name] = f
	return f, p.sync()
}

// room is the directory of one mount.
type room struct {
	dir, upper, work, target string
}

// newRoom makes a fresh upper, workdir and mount point.
func (p *place) newRoom() (*room, error) {
	p.runs++
	dir := filepath.Join(p.dir, "rooms", strconv.Itoa(p.runs))
	r := &room{dir: dir, upper: filepath.Join(dir, "upper"), work: filepath.Join(dir, "work"), target: filepath.Join(dir, "mnt")}
	for _, d := range []string{r.upper, r.work, r.target} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// sync writes out what the place has in memory.
func (p *place) sync() error { return syncfs(p.dir) }

func syncfs(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dir, err)
	}
	defer unix.Close(fd)
	if err := unix.Syncfs(fd); err != nil {
		return fmt.Errorf("syncfs %s: %w", dir, err)
	}
	return nil
}

// dropCaches makes the kernel forget pages, names and inodes that nobody uses.
func dropCaches() error {
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("drop caches: %w", err)
	}
	return nil
}
