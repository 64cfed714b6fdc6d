package layers

import (
	"context"
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

// Compressed layers lie in two directories of the store:
//
//	blobs/partial/<hex>   being downloaded, or left by a download that was cut off
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

// download is a blob that is being downloaded into the store.
type download struct {
	s       *Store
	dir     int // blobs/partial
	name    string
	digest  digest.Digest
	size    int64
	file    *os.File
	resumed int64 // bytes that were there
}

// newDownload opens the partial blob of a digest, or makes one. One that another process
// is at gets another name, and is downloaded twice.
func (s *Store) newDownload(d digest.Digest, size int64) (*download, error) {
	dir, err := s.openBlobs(partialName, true)
	if err != nil {
		return nil, err
	}
	p := &download{s: s, dir: dir, name: d.Encoded(), digest: d, size: size}
	for {
		fd, err := fsat.OpenName(dir, p.name, unix.O_RDWR|unix.O_CREAT, 0o600)
		if err != nil {
			fsat.Close(dir)
			return nil, fmt.Errorf("partial blob %s: %w", p.name, err)
		}
		p.file = os.NewFile(uintptr(fd), p.name)
		var st unix.Stat_t
		err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			err = fsat.Fstat(fd, &st)
		}
		switch {
		case errors.Is(err, unix.EWOULDBLOCK):
			p.name = d.Encoded() + "." + newID()
		case err != nil:
			p.close()
			return nil, fmt.Errorf("partial blob %s: %w", p.name, err)
		case st.Nlink == 0: // removed before we had the lock
		case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > size:
			if err := p.file.Truncate(0); err != nil {
				p.close()
				return nil, fmt.Errorf("partial blob %s: %w", p.name, err)
			}
			return p, nil
		default:
			p.resumed = st.Size
			return p, nil
		}
		_ = p.file.Close() // another name, or another file of that name
	}
}

// close leaves what there is to the next pull.
func (p *download) close() {
	if p.file != nil {
		_ = p.file.Close() // a hole in a partial blob shows in the digest
		p.file = nil
	}
	fsat.Close(p.dir)
	p.dir = -1
}

// remove throws it away.
func (p *download) remove() {
	if p.dir >= 0 {
		if err := fsat.Unlink(p.dir, p.name); err != nil && !fsat.IsAbsent(err) {
			p.s.log.Warn("remove partial blob", zap.String("name", p.name), zap.Error(err))
		}
	}
	p.close()
}

// reader reads the blob: what there is, then rest, which is written down as well.
func (p *download) reader(rest io.Reader) io.Reader {
	return io.MultiReader(io.NewSectionReader(p.file, 0, p.resumed), &partWriter{p, rest, p.resumed})
}

type partWriter struct {
	p    *download
	rest io.Reader
	off  int64
}

func (w *partWriter) Read(b []byte) (int, error) {
	n, err := w.rest.Read(b)
	if n > 0 {
		if _, werr := w.p.file.WriteAt(b[:n], w.off); werr != nil {
			return n, fmt.Errorf("write partial blob: %w", werr)
		}
		w.off += int64(n)
	}
	return n, err
}

// keepParts moves complete blobs to those that are kept: durable before their rows.
// The caller holds the lock of lockBlobs until it has written them.
func (s *Store) keepParts(parts []*download) ([]metadata.Blob, error) {
	kept, err := s.openBlobs(keptName, true)
	if err != nil {
		return nil, err
	}
	defer fsat.Close(kept)
	var rows []metadata.Blob
	for _, p := range parts {
		if err := p.file.Sync(); err != nil {
			return nil, fmt.Errorf("sync blob %s: %w", p.digest, err)
		}
		if err := fsat.Rename(p.dir, p.name, kept, p.digest.Encoded(), 0); err != nil {
			return nil, fmt.Errorf("keep blob %s: %w", p.digest, err)
		}
		rows = append(rows, metadata.Blob{Digest: p.digest, Size: p.size, Created: time.Now().UTC()})
	}
	if err := s.fault("after-blob-rename"); err != nil {
		return nil, err
	}
	for _, name := range []string{keptName, ""} {
		fd, err := s.openBlobs(name, true)
		if err != nil {
			return nil, err
		}
		err = unix.Fsync(fd)
		fsat.Close(fd)
		if err != nil {
			return nil, fmt.Errorf("sync %s: %w", blobsName, err)
		}
	}
	root, err := fsat.Reopen(s.rootFd, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, fmt.Errorf("sync store directory: %w", err)
	}
	defer fsat.Close(root)
	if err := unix.Fsync(root); err != nil {
		return nil, fmt.Errorf("sync store directory: %w", err)
	}
	return rows, s.fault("after-blob-sync")
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
