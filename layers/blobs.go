package layers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// Compressed layers lie in two directories of the store:
//
//	blobs/partial/<hex>   being downloaded, or left by a download that was cut off;
//	                      empty: the lock of who pulls a manifest
//	blobs/sha256/<hex>    kept, with a row
//
// Who writes a partial blob holds a lock (flock) on it, which ends with the process.
// One without a lock is a cache: the next pull goes on with it, gc removes it, and
// so does any work that adds to the store when nobody has touched it for partialAge.
// What is in it is believed only when the digest of the whole has been compared.
//
// A kept blob is moved into place and gets its row, or loses its row and is deleted,
// under a lock on blobs/: its name says nothing about who put it there.
const (
	blobsName   = "blobs"
	partialName = "partial"
	keptName    = "sha256"

	partialAge = 24 * time.Hour
)

// openBlobs opens a directory of blobs/, or blobs/ itself for ""; without make, -1 if
// it is not there.
func (s *Store) openBlobs(name string, make bool) (int, error) {
	dir, err := s.openDir(s.rootFd, blobsName, make)
	if err != nil || dir < 0 || name == "" {
		return dir, err
	}
	defer fsat.Close(dir)
	return s.openDir(dir, name, make)
}

func (s *Store) openDir(at int, name string, make bool) (int, error) {
	if make {
		if err := fsat.Mkdir(at, name, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
			return -1, fmt.Errorf("make %s: %w", name, err)
		}
	}
	fd, err := fsat.OpenName(at, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if fsat.IsAbsent(err) && !make {
		return -1, nil
	}
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", name, err)
	}
	return fd, nil
}

// lockBlobs excludes others who move kept blobs. The returned function unlocks.
func (s *Store) lockBlobs(ctx context.Context) (func(), error) {
	fd, err := s.openBlobs("", true)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { fsat.Close(fd) }, nil // which ends the lock
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			fsat.Close(fd)
			return nil, fmt.Errorf("lock %s: %w", blobsName, err)
		}
		t := time.NewTimer(5 * time.Millisecond)
		select {
		case <-ctx.Done():
			t.Stop()
			fsat.Close(fd)
			return nil, ctx.Err()
		case <-t.C:
		}
	}
}

// openKept opens a blob that is kept; nil if it is not there.
func (s *Store) openKept(d digest.Digest) (*os.File, error) {
	dir, err := s.openBlobs(keptName, false)
	if err != nil || dir < 0 {
		return nil, err
	}
	defer fsat.Close(dir)
	fd, err := fsat.OpenRegular(dir, d.Encoded(), unix.O_RDONLY)
	if fsat.IsAbsent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", d, err)
	}
	return os.NewFile(uintptr(fd), d.Encoded()), nil
}

// setBlob notes the blob that a layer was found in. One that is kept gives way only to
// another that is.
func setBlob(tx *metadata.Tx, chain digest.Digest, ld *layerData) ([]metadata.Trash, error) {
	l, err := tx.Layer(chain)
	if err != nil || ld.blob == "" || l.Blob == ld.blob {
		return nil, err
	}
	if l.Blob != "" && !ld.keep {
		if _, err := tx.Blob(l.Blob); err == nil {
			return nil, nil
		}
	}
	if err := tx.SetBlob(chain, ld.blob, ld.blobSize, ld.mediaType); err != nil {
		return nil, err
	}
	return dropBlob(tx, l.Blob)
}

// dropBlob forgets a kept blob that no layer has come from, for the trash.
func dropBlob(tx *metadata.Tx, d digest.Digest) ([]metadata.Trash, error) {
	if d == "" || len(tx.ChainsByBlob(d)) > 0 {
		return nil, nil
	}
	if _, err := tx.Blob(d); errors.Is(err, metadata.ErrNotFound) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if err := tx.DeleteBlob(d); err != nil {
		return nil, err
	}
	return addTrash(tx, "blob of no layer", blobsName+"/"+d.Encoded())
}

// removeKept deletes the file of a kept blob, unless there is a row for it again.
func (s *Store) removeKept(hex string) error {
	d := digest.NewDigestFromEncoded(digest.SHA256, hex)
	if d.Validate() != nil {
		return fmt.Errorf("%w: %q is not the name of a blob", ErrCorrupt, hex)
	}
	if fd, err := s.openBlobs("", false); err != nil || fd < 0 {
		return err
	} else {
		fsat.Close(fd)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	unlock, err := s.lockBlobs(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return s.removeKeptLocked(ctx, d)
}

func (s *Store) removeKeptLocked(ctx context.Context, d digest.Digest) error {
	named := false
	err := s.view(ctx, func(tx *metadata.Tx) error {
		_, err := tx.Blob(d)
		named = err == nil
		return nil
	})
	if err != nil || named {
		return err
	}
	dir, err := s.openBlobs(keptName, false)
	if err != nil || dir < 0 {
		return err
	}
	defer fsat.Close(dir)
	if err := fsat.Unlink(dir, d.Encoded()); err != nil && !fsat.IsAbsent(err) {
		return fmt.Errorf("remove blob %s: %w", d, err)
	}
	return nil
}
