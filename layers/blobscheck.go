package layers

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// oldParts removes partial blobs that nobody is at and that are older than age, and
// returns what they were; a dry run removes nothing.
func (s *Store) oldParts(age time.Duration, dryRun bool) (paths []string, freed int64, err error) {
	dir, err := s.openBlobs(partialName, false)
	if err != nil || dir < 0 {
		return nil, 0, err
	}
	defer fsat.Close(dir)
	names, err := listDir(dir)
	if err != nil {
		return nil, 0, err
	}
	for _, n := range names {
		fd, err := fsat.OpenName(dir, n, unix.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			continue // gone, or nothing of ours
		}
		var st unix.Stat_t
		old := fsat.Fstat(fd, &st) == nil && time.Since(time.Unix(st.Mtim.Sec, st.Mtim.Nsec)) >= age
		if old && unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) == nil {
			if dryRun || fsat.Unlink(dir, n) == nil {
				paths = append(paths, blobsName+"/"+partialName+"/"+n)
				freed += st.Blocks * 512
			}
		}
		fsat.Close(fd)
	}
	return paths, freed, nil
}

// strayBlobs are the names of kept blobs without a row. It is called under lockBlobs.
func (s *Store) strayBlobs(ctx context.Context) (stray []digest.Digest, err error) {
	dir, err := s.openBlobs(keptName, false)
	if err != nil || dir < 0 {
		return nil, err
	}
	defer fsat.Close(dir)
	names, err := listDir(dir)
	if err != nil {
		return nil, err
	}
	err = s.view(ctx, func(tx *metadata.Tx) error {
		stray = nil
		for _, n := range names {
			d := digest.NewDigestFromEncoded(digest.SHA256, n)
			if _, err := tx.Blob(d); errors.Is(err, metadata.ErrNotFound) && d.Validate() == nil {
				stray = append(stray, d)
			}
		}
		return nil
	})
	return stray, err
}

// gcBlobs removes partial blobs, and kept ones without a row.
func (s *Store) gcBlobs(ctx context.Context, rep *GCReport, dryRun bool) error {
	paths, freed, err := s.oldParts(0, dryRun)
	if err != nil {
		return err
	}
	rep.Paths, rep.Reclaimed = append(rep.Paths, paths...), rep.Reclaimed+freed
	if fd, err := s.openBlobs(keptName, false); err != nil || fd < 0 {
		return err
	} else {
		defer fsat.Close(fd)
		unlock, err := s.lockBlobs(ctx)
		if err != nil {
			return err
		}
		defer unlock()
		stray, err := s.strayBlobs(ctx)
		if err != nil {
			return err
		}
		for _, d := range stray {
			var st unix.Stat_t
			if fsat.Stat(fd, d.Encoded(), &st) != nil {
				continue // somebody else was faster
			}
			if !dryRun {
				if err := s.removeKeptLocked(ctx, d); err != nil {
					return err
				}
			}
			rep.Paths = append(rep.Paths, blobsName+"/"+keptName+"/"+d.Encoded())
			rep.Reclaimed += st.Blocks * 512
		}
	}
	return nil
}

// blobUse is what blobs occupy: kept ones, and all the rest of blobs/.
func (s *Store) blobUse() (kept, rest int64, err error) {
	all, err := s.sizeOf(s.rootFd, blobsName)
	if err != nil || all == 0 {
		return 0, 0, err
	}
	fd, err := s.openBlobs("", false)
	if err != nil || fd < 0 {
		return 0, 0, err
	}
	defer fsat.Close(fd)
	kept, err = s.sizeOf(fd, keptName)
	return kept, all - kept, err
}

// checkBlobs compares the rows of kept blobs with their files.
func (c *checker) blobs() error {
	var rows []metadata.Blob
	lonely := map[digest.Digest]bool{}
	err := c.s.view(c.ctx, func(tx *metadata.Tx) (err error) {
		rows, err = tx.Blobs()
		for _, b := range rows {
			lonely[b.Digest] = len(tx.ChainsByBlob(b.Digest)) == 0
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, b := range rows {
		problem, err := c.blob(b)
		if err != nil {
			return err
		}
		if problem == "" && lonely[b.Digest] {
			problem = "no layer has come from it"
		}
		if problem == "" {
			continue
		}
		c.found("K30", blobsName+"/"+keptName+"/"+b.Digest.Encoded(), problem, "remove it; a push makes it anew", func() error {
			var junk []metadata.Trash
			err := c.s.update(c.ctx, func(tx *metadata.Tx) (err error) {
				if err = tx.DeleteBlob(b.Digest); err == nil {
					junk, err = addTrash(tx, "damaged blob", blobsName+"/"+b.Digest.Encoded())
				}
				return err
			})
			c.s.purge(c.ctx, junk)
			return err
		})
	}
	if fd, err := c.s.openBlobs(keptName, false); err != nil || fd < 0 {
		return err
	} else {
		fsat.Close(fd)
	}
	unlock, err := c.s.lockBlobs(c.ctx)
	if err != nil {
		return err
	}
	stray, err := c.s.strayBlobs(c.ctx)
	unlock()
	for _, d := range stray {
		c.found("K30", blobsName+"/"+keptName+"/"+d.Encoded(), "a kept blob that no row names", "remove", func() error { return c.s.removeKept(d.Encoded()) })
	}
	return err
}

// blob returns what is wrong with a kept blob.
func (c *checker) blob(b metadata.Blob) (problem string, err error) {
	f, err := c.s.openKept(b.Digest)
	if err != nil || f == nil {
		return strings.TrimSuffix(fmt.Sprintf("the file of a kept blob is missing: %v", err), ": <nil>"), nil
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	if st.Size() != b.Size {
		return fmt.Sprintf("expected %d bytes, got %d", b.Size, st.Size()), nil
	}
	if !c.o.Deep {
		return "", nil
	}
	got, err := digest.SHA256.FromReader(ctxReader{c.ctx, f})
	c.r.Bytes += b.Size
	if err != nil {
		return "", err
	}
	if got != b.Digest {
		return fmt.Sprintf("its content has %s", got), nil
	}
	return "", nil
}
