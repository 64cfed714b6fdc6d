package layers

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// What the database knows of an image and of a container is kept beside it as well:
// with the sidecars of layers it is enough to make the database anew. The database is
// right where they differ. A sidecar follows the transaction that changes its rows,
// and is on the disk before the call that made the change returns; a process that dies
// in between leaves one that is missing or old, which K6 finds.

const (
	imagesName   = "images"
	imageExt     = ".json"
	containerDoc = "container.json" // beside upper and work
	sidecarMax   = 64 << 20
)

// savedImage is images/<hex>.json.
type savedImage struct {
	Version int `json:"version"`
	metadata.SavedImage
}

// savedContainer is rw/<mountID>/container.json.
type savedContainer struct {
	Version   int                `json:"version"`
	Container metadata.Container `json:"container"`
	Layers    []metadata.Layer   `json:"layers,omitempty"` // of its chain, bottom first
}

func imageFile(id digest.Digest) string { return hexOf(id) + imageExt }

// imageOfFile is the image whose sidecar has a name; "" if none can have it.
func imageOfFile(name string) digest.Digest {
	hex, ok := strings.CutSuffix(name, imageExt)
	if id := digest.NewDigestFromEncoded(digest.SHA256, hex); ok && id.Validate() == nil {
		return id
	}
	return ""
}

// hexOf is the hex part of a digest; empty if it is none.
func hexOf(d digest.Digest) string {
	if d.Validate() != nil {
		return ""
	}
	return d.Encoded()
}

// follow brings the sidecars of what a transaction has touched up to date.
func (s *Store) follow(ctx context.Context, t metadata.Touched) error {
	if len(t.Images)+len(t.Containers) == 0 {
		return nil
	}
	unlock := s.lockSaved()
	defer unlock()
	type file struct {
		dir  string // below rw/; "" is images/
		name string
		raw  []byte // nil: to be removed
	}
	var files []file
	err := s.view(ctx, func(tx *metadata.Tx) error {
		files = nil
		for _, id := range t.Images {
			f := file{name: imageFile(id)}
			if id.Validate() != nil {
				continue
			}
			var err error
			f.raw, err = s.encodeImage(tx, id)
			if err != nil && !errors.Is(err, metadata.ErrNotFound) {
				continue // it cannot be read: what was saved before may be all there is
			}
			files = append(files, f)
		}
		for _, id := range t.Containers {
			c, err := tx.Container(id)
			if err != nil || c.State == metadata.Creating || !validID(c.MountID) {
				continue // gone, with its directory, or not there yet
			}
			raw, err := encodeContainer(tx, c)
			if err != nil {
				return err
			}
			files = append(files, file{c.MountID, containerDoc, raw})
		}
		return nil
	})
	if err != nil {
		return err
	}
	wrote := false
	for _, f := range files {
		dir := s.imagesFd
		if f.dir != "" {
			fd, err := fsat.OpenName(s.rwFd, f.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
			if err != nil {
				continue // K13 tells
			}
			defer fsat.Close(fd)
			dir = fd
		}
		if f.raw == nil {
			if err := fsat.Unlink(dir, f.name); err != nil && !fsat.IsAbsent(err) {
				return fmt.Errorf("remove %s/%s: %w", imagesName, f.name, err)
			}
			continue // durable before the trash row goes
		}
		if have, err := readFile(dir, f.name, sidecarMax); err == nil && bytes.Equal(have, f.raw) {
			continue
		}
		dropDirectory(dir, f.name)
		if err := replaceFile(dir, f.name, f.raw); err != nil {
			return err
		}
		wrote = wrote || dir == s.imagesFd
		if dir != s.imagesFd {
			if err := unix.Fsync(dir); err != nil {
				return fmt.Errorf("sync %s/%s: %w", rwName, f.dir, err)
			}
		}
	}
	if wrote {
		if err := unix.Fsync(s.imagesFd); err != nil {
			return fmt.Errorf("sync %s: %w", imagesName, err)
		}
	}
	return nil
}

// lockSaved keeps others from writing sidecars. Whoever has the lock reads the rows
// anew, so the last one to write has seen the last transaction. A lock that somebody
// keeps is not waited for long: an old sidecar is better than a command that hangs.
func (s *Store) lockSaved() (unlock func()) {
	s.savedMu.Lock()
	for range 100 {
		if err := unix.Flock(s.imagesFd, unix.LOCK_EX|unix.LOCK_NB); err == nil || !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	return func() {
		_ = unix.Flock(s.imagesFd, unix.LOCK_UN)
		s.savedMu.Unlock()
	}
}

// followed is follow for those who have done their work and cannot take it back.
func (s *Store) followed(ctx context.Context, t metadata.Touched) {
	if err := s.follow(context.WithoutCancel(ctx), t); err != nil {
		s.log.Warn("what is kept beside the database is not up to date; plyfs check --repair writes it anew", zap.Error(err))
	}
}

// encodeImage returns what the sidecar of an image should be.
func (s *Store) encodeImage(tx *metadata.Tx, id digest.Digest) ([]byte, error) {
	img, err := tx.SavedImage(id)
	if err != nil {
		return nil, err
	}
	// A chain that has lost rows must not take them from the sidecar, too.
	if len(img.Layers) < img.Image.Layers {
		if old, err := s.readSavedImage(imageFile(id)); err == nil && len(old.Layers) > len(img.Layers) {
			img.Layers = old.Layers
		}
	}
	return encodeSaved(savedImage{1, img})
}

func encodeSaved(v any) ([]byte, error) {
	raw, err := json.Marshal(v)
	return append(raw, '\n'), err
}

func encodeContainer(tx *metadata.Tx, c metadata.Container) ([]byte, error) {
	if c.State == metadata.Creating {
		c.State = metadata.Ready // as soon as this is in its place
	}
	c.Owner = metadata.Owner{}
	return encodeSaved(savedContainer{1, c, tx.SavedChain(c.Chain)})
}

// writeContainerDoc writes the sidecar of a container that is being made; dir is
// synced by the caller.
func (s *Store) writeContainerDoc(ctx context.Context, dir int, c metadata.Container) error {
	var raw []byte
	err := s.view(ctx, func(tx *metadata.Tx) (err error) { raw, err = encodeContainer(tx, c); return err })
	if err != nil {
		return err
	}
	return replaceFile(dir, containerDoc, raw)
}

// replaceFile puts a file in the place of one of this name, whole and durable.
func replaceFile(dir int, name string, raw []byte) error {
	tmp := name + ".new"
	fd, err := fsat.OpenName(dir, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), tmp)
	_, err = f.Write(raw)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = fsat.Rename(dir, tmp, dir, name, 0)
	}
	if err != nil {
		_ = fsat.Unlink(dir, tmp) // overwritten by the next one otherwise
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// dropDirectory removes a directory that has the name of a file of ours.
func dropDirectory(dir int, name string) {
	var st unix.Stat_t
	if fsat.Stat(dir, name, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		_ = removeTree(dir, name) // the write tells
	}
}

// readFile reads a regular file of at most limit bytes.
func readFile(dir int, name string, limit int64) ([]byte, error) {
	fd, err := fsat.OpenRegular(dir, name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(raw)) > limit {
		err = fmt.Errorf("%w: %s has more than %d bytes", ErrUnsupported, name, limit)
	}
	return raw, err
}

// readSavedImage reads and checks the sidecar of an image.
func (s *Store) readSavedImage(name string) (metadata.SavedImage, error) {
	var v savedImage
	raw, err := readFile(s.imagesFd, name, sidecarMax)
	if err == nil {
		err = decodeJSON(raw, s.limits.JSONDepth, &v)
	}
	id := v.Image.ID
	switch {
	case err != nil:
	case v.Version != 1:
		err = fmt.Errorf("%w: version %d", ErrUnsupported, v.Version)
	case checkDigest(id) != nil || imageFile(id) != name:
		err = fmt.Errorf("%w: it is that of image %q", ErrCorrupt, id)
	case digest.FromBytes(v.Config) != id:
		err = fmt.Errorf("%w: its config does not have the image's digest", ErrCorrupt)
	default:
		_, err = parseConfig(v.Config, s.limits)
	}
	return v.SavedImage, err
}

// readSavedContainer reads and checks the sidecar of a container.
func (s *Store) readSavedContainer(mountID string) (savedContainer, error) {
	var v savedContainer
	if !validID(mountID) {
		return v, fmt.Errorf("%w: directory %q", ErrCorrupt, mountID)
	}
	dir, err := fsat.OpenName(s.rwFd, mountID, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return v, err
	}
	defer fsat.Close(dir)
	raw, err := readFile(dir, containerDoc, sidecarMax)
	if err == nil {
		err = decodeJSON(raw, s.limits.JSONDepth, &v)
	}
	c := v.Container
	switch {
	case err != nil:
	case v.Version != 1:
		err = fmt.Errorf("%w: version %d", ErrUnsupported, v.Version)
	case c.MountID != mountID || !containerID(c.ID) || !containerName.MatchString(c.Name):
		err = fmt.Errorf("%w: it is that of container %q on %q", ErrCorrupt, c.Name, c.MountID)
	case c.Chain != "" && checkDigest(c.Chain) != nil || checkDigest(c.ImageID) != nil:
		err = fmt.Errorf("%w: container %q names no image", ErrCorrupt, c.Name)
	case c.State != metadata.Ready && c.State != metadata.Broken:
		err = fmt.Errorf("%w: container %q is %q", ErrCorrupt, c.Name, c.State)
	}
	return v, err
}

func containerID(id string) bool {
	return len(id) == 64 && strings.Trim(id, "0123456789abcdef") == ""
}
