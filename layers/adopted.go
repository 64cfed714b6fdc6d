package layers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// The content of an adopted layer lies in another engine's store. Here, its directory
// has all the rest: sidecar, index, tar-split record. Whoever opens the content makes
// sure that it is the directory that was adopted; what is changed below it, only a
// deep check sees.

// open opens the content of a layer, O_PATH or for reading.
func (d LayerDir) open() (int, error) {
	if d.adopted != nil {
		return openAdopted(d.adopted)
	}
	fd, err := fsat.OpenTrusted(d.Path)
	if err != nil {
		return -1, fmt.Errorf("%w: open layer directory %s: %w", ErrCorrupt, d.Path, err)
	}
	return fd, nil
}

// openContent opens the content of the layer whose directory is dir.
func openContent(dir int) (int, error) {
	fd, err := fsat.OpenName(dir, diffName, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if !fsat.IsAbsent(err) {
		return fd, err
	}
	side, serr := readSidecar(dir)
	if serr != nil || side.Cache.Adopted == nil {
		return -1, err
	}
	return openAdopted(side.Cache.Adopted)
}

// hasContent reports whether the content of a layer lies in its own directory.
func hasContent(dir int) bool {
	var st unix.Stat_t
	return fsat.Stat(dir, diffName, &st) == nil
}

// openAdopted opens a directory of another store, if it is still the one that was
// adopted.
func openAdopted(a *metadata.Adopted) (fd int, err error) {
	fail := func(err error) (int, error) {
		return -1, fmt.Errorf("%w: the layer's content in another store, %q: %w", ErrCorrupt, a.Path, err)
	}
	if !filepath.IsAbs(a.Path) || filepath.Clean(a.Path) != a.Path {
		return fail(errors.New("it is no absolute path"))
	}
	root, err := fsat.OpenTrusted("/")
	if err != nil {
		return -1, err
	}
	defer fsat.Close(root)
	if fd, err = fsat.OpenNoLinks(root, a.Path[1:], unix.O_RDONLY|unix.O_DIRECTORY); err != nil {
		return fail(err)
	}
	var st unix.Stat_t
	if err = fsat.Fstat(fd, &st); err == nil && (st.Ino != a.Ino || !ctimeOf(&st).Equal(a.Ctime)) {
		err = fmt.Errorf("it has changed since %s, when it was adopted", a.Ctime.Format(time.RFC3339))
	}
	if err != nil {
		fsat.Close(fd)
		return fail(err)
	}
	return fd, nil
}

func ctimeOf(st *unix.Stat_t) time.Time { return time.Unix(st.Ctim.Sec, st.Ctim.Nsec).UTC() }

// checkAdopted makes sure that adopted content is there before somebody else opens it
// by its path.
func checkAdopted(dirs []LayerDir) error {
	for _, d := range dirs {
		if d.adopted == nil {
			continue
		}
		fd, err := openAdopted(d.adopted)
		if err != nil {
			return err
		}
		fsat.Close(fd)
	}
	return nil
}

// statContent is stat(2) of a layer's content.
func (s *Store) statContent(d LayerDir, st *unix.Stat_t) error {
	if d.adopted != nil {
		fd, err := openAdopted(d.adopted)
		if err != nil {
			return err
		}
		defer fsat.Close(fd)
		return fsat.Fstat(fd, st)
	}
	if err := fsat.Stat(s.layersFd, d.CacheID+"/"+diffName, st); err != nil {
		return fmt.Errorf("%w: layer directory %s: %w", ErrCorrupt, d.Path, err)
	}
	return nil
}

// lost reports whether a layer has its content in another store, where it is no more
// what was adopted: whoever has the content gives it to the layer anew.
func (s *Store) lost(ctx context.Context, chain digest.Digest) (bool, error) {
	var a *metadata.Adopted
	err := s.view(ctx, func(tx *metadata.Tx) error {
		a = nil
		if !tx.HasLayer(chain) {
			return nil
		}
		l, err := tx.Layer(chain)
		if err != nil {
			return err
		}
		c, err := tx.Cache(l.CacheID)
		a = c.Adopted
		return err
	})
	if err != nil || a == nil {
		return false, err
	}
	fd, err := openAdopted(a)
	if err != nil {
		return errors.Is(err, ErrCorrupt), nil
	}
	fsat.Close(fd)
	return false, nil
}

func sameAdopted(a, b *metadata.Adopted) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Path == b.Path && a.Ino == b.Ino && a.Ctime.Equal(b.Ctime)
}

// reopenQuietly opens the file behind the O_PATH descriptor p for reading, without a
// trace in its access time where we may do that.
func reopenQuietly(p int) (int, error) {
	fd, err := fsat.Reopen(p, unix.O_RDONLY|unix.O_NOATIME)
	if errors.Is(err, unix.EPERM) { // O_NOATIME is for owners and root
		fd, err = fsat.Reopen(p, unix.O_RDONLY)
	}
	return fd, err
}

// writeStream makes a file of the stage.
func (st *stage) writeStream(name string, write func(*os.File) error) error {
	fd, err := fsat.OpenName(st.dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	err = write(f)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}
