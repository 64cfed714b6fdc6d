package layers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// fileReader opens the files of layers whose names come from indexes. It has a
// descriptor for each layer that it was asked for.
type fileReader struct {
	dirs []LayerDir
	fds  map[int]int
	buf  []byte // for contents
}

// readBuffer is the size of the buffer that files are read through.
const readBuffer = 128 << 10

func newFileReader(dirs []LayerDir) *fileReader {
	return &fileReader{dirs: dirs, fds: map[int]int{}, buf: make([]byte, readBuffer)}
}

func (c *fileReader) Close() {
	for _, fd := range c.fds {
		fsat.Close(fd)
	}
	c.fds = nil
}

// open opens the file at path in dirs[layer]. An index that says it is a file is not
// believed: nothing else is opened.
func (c *fileReader) open(layer int, path string) (*os.File, error) {
	dir, ok := c.fds[layer]
	if !ok {
		var err error
		if dir, err = c.dirs[layer].open(); err != nil {
			return nil, err
		}
		c.fds[layer] = dir
	}
	wrap := func(err error) error {
		return fmt.Errorf("read %q in layer directory %s: %w", path, c.dirs[layer].Path, err)
	}
	p, err := fsat.OpenBeneath(dir, path, unix.O_PATH|unix.O_NOFOLLOW)
	if fsat.IsAbsent(err) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EXDEV) {
		return nil, wrap(fmt.Errorf("%w: it is not there, as the layer's index says; see plyfs check: %w", ErrCorrupt, err))
	}
	if err != nil {
		return nil, wrap(err)
	}
	defer fsat.Close(p)
	var st unix.Stat_t
	if err := fsat.Fstat(p, &st); err != nil {
		return nil, wrap(err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, wrap(fmt.Errorf("%w: it is no file, as the layer's index says; see plyfs check", ErrCorrupt))
	}
	fd, err := fsat.Reopen(p, unix.O_RDONLY)
	if err != nil {
		return nil, wrap(err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// digest is that of a file's content.
func (c *fileReader) digest(ctx context.Context, layer int, path string) (digest.Digest, error) {
	f, err := c.open(layer, path)
	if err != nil {
		return "", err
	}
	defer f.Close() // was only read
	d := digest.SHA256.Digester()
	if _, err := io.CopyBuffer(d.Hash(), ctxReader{ctx, f}, c.buf); err != nil {
		return "", fmt.Errorf("read %q in layer directory %s: %w", path, c.dirs[layer].Path, err)
	}
	return d.Digest(), nil
}
