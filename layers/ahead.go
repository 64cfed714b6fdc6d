package layers

import (
	"context"
	"crypto/sha256"
	"hash"
	"io"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
)

const (
	blockSize   = 256 << 10
	aheadBlocks = 8
	// rawBlocks is how much of a layer in an archive is taken in while it is
	// unpacked: a smaller one as a whole, so that the next one can begin.
	rawBlocks = 96
)

// ahead reads a stream in a goroutine of its own, some blocks ahead of its
// reader, and hashes it in another one. End it with finish or stop.
type ahead struct {
	cancel   context.CancelFunc
	full     chan *block
	gone     chan struct{} // closed: the reader wants no more
	abandons sync.Once
	drained  chan struct{} // closed: the source has ended
	hashed   chan struct{} // closed: sum is complete

	// Written before drained is closed.
	size int64
	err  error // of the source, nil at its end

	sum hash.Hash // written before hashed is closed

	cur *block // the reader's
	off int
}

type block struct {
	buf  []byte
	n    int
	refs atomic.Int32
}

var blocks = sync.Pool{New: func() any { return &block{buf: make([]byte, blockSize)} }}

func (b *block) release() {
	if b.refs.Add(-1) == 0 {
		blocks.Put(b)
	}
}

// readAhead begins to read r, at most depth blocks ahead.
func readAhead(ctx context.Context, r io.Reader, depth int) *ahead {
	ctx, cancel := context.WithCancel(ctx)
	a := &ahead{
		cancel: cancel, full: make(chan *block, depth), gone: make(chan struct{}), drained: make(chan struct{}), hashed: make(chan struct{}),
		sum: sha256.New(),
	}
	toHash := make(chan *block, depth)
	go a.pump(ctxReader{ctx, r}, toHash)
	go func() {
		for b := range toHash {
			_, _ = a.sum.Write(b.buf[:b.n]) // hashes do not fail
			b.release()
		}
		close(a.hashed)
	}()
	return a
}

func (a *ahead) pump(r io.Reader, toHash chan<- *block) {
	for {
		b := blocks.Get().(*block)
		n, err := io.ReadFull(r, b.buf)
		if n > 0 {
			a.size += int64(n)
			b.n = n
			b.refs.Store(2)
			toHash <- b
			select {
			case a.full <- b:
			case <-a.gone:
				b.release()
			}
		}
		if err == nil {
			continue
		}
		if err != io.EOF && err != io.ErrUnexpectedEOF {
			a.err = err
		}
		close(a.drained)
		close(toHash)
		close(a.full)
		return
	}
}

// Read implements io.Reader.
func (a *ahead) Read(p []byte) (int, error) {
	if a.cur == nil {
		b, ok := <-a.full
		if !ok {
			if a.err != nil {
				return 0, a.err
			}
			return 0, io.EOF
		}
		a.cur, a.off = b, 0
	}
	n := copy(p, a.cur.buf[a.off:a.cur.n])
	if a.off += n; a.off == a.cur.n {
		a.cur.release()
		a.cur = nil
	}
	return n, nil
}

// abandon says that nobody will read on.
func (a *ahead) abandon() { a.abandons.Do(func() { close(a.gone) }) }

// finish reads what is left of the source and returns the digest of the whole.
func (a *ahead) finish() (digest.Digest, error) {
	a.abandon()
	<-a.hashed
	a.cancel()
	return digest.NewDigest(digest.SHA256, a.sum), a.err
}

// stop ends the reading of the source.
func (a *ahead) stop() {
	a.cancel()
	a.abandon()
	<-a.hashed
}
