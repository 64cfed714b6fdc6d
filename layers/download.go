package layers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

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

// lockPull is held while what has a manifest digest is pulled. It is an empty file among
// the partial blobs, and the only lock a pull waits for; it tells so.
func (s *Store) lockPull(ctx context.Context, top digest.Digest, tell ProgressFunc) (unlock func(), err error) {
	var t *track
	for {
		d, err := s.newDownload(top, 0)
		if err != nil {
			return nil, err
		}
		if d.name == top.Encoded() {
			if t != nil {
				t.done()
			}
			return d.remove, nil
		}
		d.remove() // it was another one's
		if t == nil {
			t = (&progress{fn: tell}).start(ShortID(top), "Waiting for another pull", 0)
		}
		timer := time.NewTimer(100 * time.Millisecond)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil, ctx.Err()
		case <-timer.C:
		}
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
