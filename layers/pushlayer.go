package layers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers/registry"
)

// originalLayers sees to it that the registry has the layers of a manifest, and
// counts those that it cannot get. Nothing is sent if there are any.
func (p *pusher) originalLayers(ctx context.Context, man ocispec.Manifest) (missing int, err error) {
	var mu sync.Mutex
	send := make([]bool, len(man.Layers))
	err = p.each(ctx, func(ctx context.Context, i int) error {
		d := man.Layers[i]
		there, err := p.there(ctx, d, p.layers[i].DiffID)
		if err != nil || there {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		if send[i] = p.kept[d.Digest]; !send[i] {
			missing++
		}
		return nil
	})
	if err != nil || missing > 0 {
		return missing, err
	}
	return 0, p.each(ctx, func(ctx context.Context, i int) error {
		if !send[i] {
			return nil
		}
		return p.sendKept(ctx, man.Layers[i])
	})
}

func (p *pusher) sendKept(ctx context.Context, d ocispec.Descriptor) error {
	return p.send(ctx, d, func(off int64) (io.ReadCloser, error) {
		f, err := p.s.openKept(d.Digest)
		if err == nil && f == nil {
			err = fmt.Errorf("%w: the kept blob %s is missing; run check --repair and push again", ErrCorrupt, d.Digest)
		}
		if err == nil {
			_, err = f.Seek(off, io.SeekStart)
		}
		return f, err
	})
}

// layer sees to it that the registry has a layer, and describes the blob.
func (p *pusher) layer(ctx context.Context, i int, mediaType string) (ocispec.Descriptor, error) {
	l := &p.layers[i]
	// A blob that it came in, if it is gzip as the media type says.
	if known := (ocispec.Descriptor{MediaType: mediaType, Digest: l.Blob, Size: l.BlobSize}); l.Blob != "" && isGzipType(l.MediaType) {
		there, err := p.there(ctx, known, l.DiffID)
		if err != nil || there {
			return known, err
		}
		if p.kept[l.Blob] {
			return known, p.sendKept(ctx, known)
		}
	}
	f, d, err := p.compress(ctx, l)
	if err != nil {
		return d, err
	}
	defer f.Close()
	d.MediaType, l.made = mediaType, d
	return d, p.blob(ctx, d, func(off int64) (io.ReadCloser, error) {
		return io.NopCloser(io.NewSectionReader(f, off, d.Size-off)), nil
	}, p.origins[l.DiffID])
}

func isGzipType(t string) bool {
	return t == ocispec.MediaTypeImageLayerGzip || t == registry.MediaDockerLayer
}

// compress writes a layer's blob to a file without a name, verifying the layer.
func (p *pusher) compress(ctx context.Context, l *pushLayer) (f *os.File, d ocispec.Descriptor, err error) {
	if f, err = p.s.tempFile(); err != nil {
		return nil, d, err
	}
	defer func() {
		if err != nil {
			_ = f.Close() // gone with its name
			f = nil
		}
	}()
	files, side, err := p.s.openLayer(l.CacheID)
	if err != nil {
		return f, d, err
	}
	defer files.Close()
	t := p.progress.start(ShortID(l.DiffID), "Preparing", l.tarSize)
	defer t.done()
	sum := digest.SHA256.Digester()
	z, err := newGzip(io.MultiWriter(f, sum.Hash()))
	if err != nil {
		return f, d, err
	}
	if _, err = files.assemble(ctx, io.MultiWriter(z, t), l.DiffID, side.displaced()); err != nil {
		return f, d, err
	}
	if err = z.Close(); err != nil {
		return f, d, fmt.Errorf("write compressed layer: %w", err)
	}
	d.Digest = sum.Digest()
	d.Size, err = f.Seek(0, io.SeekCurrent)
	return f, d, err
}

// newGzip compresses the same to the same: no name, no time, one goroutine.
func newGzip(w io.Writer) (*gzip.Writer, error) { return gzip.NewWriterLevel(w, gzipLevel) }

// tempFile makes a file in the store that ends with this process.
func (s *Store) tempFile() (*os.File, error) {
	dir, err := s.openBlobs(partialName, true)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	fd, err := unix.Openat(dir, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), "compressed layer"), nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return nil, fmt.Errorf("make temporary file: %w", err)
	}
	name := newID()
	fd, err = unix.Openat(dir, name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		err = unix.Unlinkat(dir, name, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("make temporary file: %w", err)
	}
	return os.NewFile(uintptr(fd), "compressed layer"), nil
}

// there reports whether the registry has a blob in the repository, or takes it from
// another one.
func (p *pusher) there(ctx context.Context, d ocispec.Descriptor, diffID digest.Digest) (bool, error) {
	if err := checkDigest(d.Digest); err != nil {
		return false, err
	}
	have, err := p.rem.HasBlob(ctx, d)
	if err != nil {
		return false, err
	}
	if have {
		p.tell(d, "Layer already exists")
		return true, nil
	}
	return p.mount(ctx, d, p.origins[diffID])
}

func (p *pusher) mount(ctx context.Context, d ocispec.Descriptor, repos []string) (bool, error) {
	for _, from := range repos {
		ok, err := p.rem.MountBlob(ctx, d, from)
		if err != nil {
			return false, err
		}
		if ok {
			p.tell(d, "Mounted from "+from)
			p.mu.Lock()
			p.res.Mounted++
			p.mu.Unlock()
			return true, nil
		}
	}
	return false, nil
}

// blob sees to it that the registry has a blob whose bytes we have.
func (p *pusher) blob(ctx context.Context, d ocispec.Descriptor, get func(off int64) (io.ReadCloser, error), repos []string) error {
	have, err := p.rem.HasBlob(ctx, d)
	if err != nil {
		return err
	}
	if !have {
		have, err = p.mount(ctx, d, repos)
	} else if repos != nil {
		p.tell(d, "Layer already exists")
	}
	if err != nil || have {
		return err
	}
	return p.send(ctx, d, get)
}

// send uploads a blob.
func (p *pusher) send(ctx context.Context, d ocispec.Descriptor, get func(off int64) (io.ReadCloser, error)) error {
	t := p.progress.start(ShortID(d.Digest), "Pushing", d.Size)
	defer t.done()
	err := p.rem.PushBlob(ctx, d, func(off int64) (io.ReadCloser, error) {
		t.tell(true, func(ev *Progress) { ev.Current = off })
		r, err := get(off)
		if err != nil {
			return nil, err
		}
		return readCloser{t.reader(r), r}, nil
	})
	if err != nil {
		return err
	}
	t.action("Pushed")
	p.mu.Lock()
	defer p.mu.Unlock()
	p.res.Uploaded += d.Size
	return nil
}

type readCloser struct {
	io.Reader
	io.Closer
}
