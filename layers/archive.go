package layers

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"
	"runtime"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// archive is an image archive being read, in one pass and in whatever order
// its members come. Small JSON members are kept in memory; any other member is
// taken for a layer and unpacked into a stage at once, since the manifest that
// says so may be the last member and a pipe cannot be read twice.
//
// A layer is unpacked by goroutines of its own: while one is read, those before
// it may still be at work, as many at a time as there are slots.
type archive struct {
	s        *Store
	lease    string
	progress *progress
	dirFd    int  // of an OCI layout directory, or -1
	flat     bool // blobs are named by the digits of their digests alone

	members   map[string]*member
	jsonBytes int64
	slots     chan struct{}
	doing     string // with a layer, for progress
	did       string // with it at the end
	stop      func() // called by the first fail; may be nil

	mu     sync.Mutex
	stages []*stage // every one made, for cleaning up; guarded by mu
	err    error    // the first that ends the whole work; guarded by mu
}

// member is one file of the archive.
type member struct {
	name string
	link string // another member, for symbolic and hard links
	what string // for messages; "": its name
	// What a manifest says of it, and whether its blob is being kept.
	media string
	keep  bool
	json  []byte
	// Of a layer: closed when what follows is known. nil: it is.
	ready  chan struct{}
	digest digest.Digest // of the member as stored
	size   int64
	layer  *layerData
	err    error // why it is not a layer
}

// wrap puts the member in front of an error.
func (m *member) wrap(err error) error {
	if m.what != "" {
		return fmt.Errorf("%s: %w", m.what, err)
	}
	return fmt.Errorf("archive member %q: %w", m.name, err)
}

// wait returns when everything about the member is known.
func (m *member) wait() {
	if m.ready != nil {
		<-m.ready
	}
}

// newArchive returns an archive of which nothing has been read.
func (s *Store) newArchive(lease string, p ProgressFunc) *archive {
	return &archive{
		s: s, lease: lease, progress: &progress{fn: p}, members: map[string]*member{}, dirFd: -1, doing: "unpacking",
		slots: make(chan struct{}, min(max(2, runtime.GOMAXPROCS(0)), 8)),
	}
}

// fail ends the whole work.
func (a *archive) fail(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err == nil {
		a.err = err
		if a.stop != nil {
			a.stop()
		}
	}
}

func (a *archive) failed() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

// settle waits for all members.
func (a *archive) settle() error {
	for _, m := range a.members {
		m.wait()
	}
	return a.failed()
}

// layerData is a layer blob whose digests are known.
type layerData struct {
	name     string
	diffID   digest.Digest
	blob     digest.Digest
	blobSize int64
	// mediaType is what a manifest calls the blob; empty if none does.
	mediaType string
	keep      bool   // the blob is being kept
	stage     *stage // nil: the store has the content, or the stage was used
}

// jsonMax bounds the memory for all JSON members together.
const jsonMax = 256 << 20

// clean throws away the stages that no image has taken.
func (a *archive) clean() {
	_ = a.settle() // the work has ended, one way or the other
	for _, st := range a.stages {
		st.discard()
	}
	fsat.Close(a.dirFd)
	a.stages, a.dirFd = nil, -1
}

// read takes in a whole stream.
func (a *archive) read(ctx context.Context, r io.Reader) error {
	outer := bufio.NewReaderSize(ctxReader{ctx, r}, 256<<10)
	plain, form, err := decompress(outer)
	if err != nil {
		return fmt.Errorf("archive: %w", err)
	}
	defer plain.Close()
	tr := tar.NewReader(struct{ io.Reader }{plain})
	for n := 0; ; n++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			if n == 0 {
				return fmt.Errorf("%w: the archive is empty", ErrInvalid)
			}
			if err := a.drain(plain, outer, form); err != nil {
				return err
			}
			return a.settle()
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			if n == 0 && errors.Is(err, tar.ErrHeader) {
				return fmt.Errorf("%w: this is not an image archive: it is not a tar, nor one compressed with gzip, zstd, xz or bzip2", ErrInvalid)
			}
			return archiveError(form, err, n)
		}
		if n >= a.s.limits.Members {
			return fmt.Errorf("%w: the archive has more than %d members", ErrUnsupported, a.s.limits.Members)
		}
		if err := a.failed(); err != nil {
			return err
		}
		if err := a.member(ctx, h, tr); err != nil {
			return archiveError(form, fmt.Errorf("archive member %q: %w", h.Name, err), n)
		}
	}
}

// drain reads what follows the end mark, so that a writer at the other end of
// a pipe does not die of it, and damage to a compressed tail is seen.
func (a *archive) drain(plain io.Reader, outer *bufio.Reader, form string) error {
	if _, err := io.Copy(io.Discard, plain); err != nil {
		return archiveError(form, err, len(a.members))
	}
	_, err := io.Copy(io.Discard, outer)
	return err
}

func archiveError(form string, err error, members int) error {
	if err := decompressError(form, err); errors.Is(err, ErrCorrupt) {
		return fmt.Errorf("archive: %w", err)
	}
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: the archive is truncated after %d complete members: %w", ErrCorrupt, members, err)
	case errors.Is(err, tar.ErrHeader):
		return fmt.Errorf("%w: the archive is damaged after %d members: %w", ErrCorrupt, members, err)
	}
	return err
}

func (a *archive) member(ctx context.Context, h *tar.Header, r io.Reader) error {
	comps, err := tarPath(h.Name, 64)
	if err != nil {
		return err
	}
	m := &member{name: strings.Join(comps, "/")}
	switch h.Typeflag {
	case tar.TypeReg, '\x00':
		drained, err := a.add(ctx, m, r, h.Size, nil)
		if drained != nil {
			<-drained // the next member is behind it
		}
		return err
	case tar.TypeSymlink, tar.TypeLink:
		// Old writers link duplicate layers to one another. Links lead
		// nowhere but to other members.
		target := h.Linkname
		if h.Typeflag == tar.TypeSymlink && !strings.HasPrefix(target, "/") {
			target = path.Dir(m.name) + "/" + target
		}
		comps, err := tarPath(target, 64)
		if err != nil {
			return fmt.Errorf("link: %w", err)
		}
		m.link = strings.Join(comps, "/")
		a.put(m)
	}
	return nil
}

func (a *archive) put(m *member) {
	old := a.members[m.name]
	if old != nil {
		old.wait()
	}
	if old != nil && old.layer != nil && old.layer.stage != nil {
		old.layer.stage.discard()
	}
	a.members[m.name] = m
}

// add takes in one regular member. Of a layer it returns at once, with a channel
// that is closed when r has been read; then done is called.
func (a *archive) add(ctx context.Context, m *member, r io.Reader, size int64, done func()) (drained <-chan struct{}, err error) {
	br := bufio.NewReaderSize(r, 64<<10)
	head, err := br.Peek(512)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	isJSON := looksLikeJSON(head)
	switch {
	case m.name == "manifest.json" || m.name == "index.json" || m.name == "oci-layout" || m.name == "repositories":
		if size > a.s.limits.Manifest {
			return nil, fmt.Errorf("%w: %d bytes, the limit is %d", ErrUnsupported, size, a.s.limits.Manifest)
		}
		isJSON = true
	case isJSON && size > a.s.limits.Config:
		isJSON = false
	case !isJSON && size < 512 && size > 0 && formOf(head) == "none":
		m.err = fmt.Errorf("%w: it is not a layer: %d bytes, no tar and not compressed", ErrCorrupt, size)
	}
	if !isJSON && m.err == nil {
		return a.start(ctx, m, br, size, done)
	}
	if done != nil {
		defer done()
	}
	sum := sha256.New()
	in := io.TeeReader(br, sum)
	if isJSON {
		if a.jsonBytes += size; a.jsonBytes > jsonMax {
			return nil, fmt.Errorf("%w: more than %d bytes of JSON in the archive", ErrUnsupported, int64(jsonMax))
		}
		m.json, err = io.ReadAll(in)
		m.size = int64(len(m.json))
	} else {
		m.size, err = io.Copy(io.Discard, in)
	}
	if err == nil {
		err = m.is(digest.NewDigest(digest.SHA256, sum), size)
	}
	if err == nil {
		a.put(m)
	}
	return nil, err
}

// is notes the digest of a member and checks it and its size.
func (m *member) is(d digest.Digest, size int64) error {
	m.digest = d
	if m.size != size {
		return fmt.Errorf("expected %d bytes, got %d: %w", size, m.size, io.ErrUnexpectedEOF)
	}
	if want, ok := namedDigest(m.name); ok && want != d {
		if m.what != "" {
			return fmt.Errorf("%w: wrong digest: expected %s, got %s", ErrCorrupt, want, d)
		}
		return fmt.Errorf("%w: wrong digest: its name says %s, its content has %s", ErrCorrupt, want, d)
	}
	return nil
}

// looksLikeJSON tells configs and manifests from layers, which are tars, even
// ones whose first name begins with a brace, or compressed.
func looksLikeJSON(head []byte) bool {
	t := bytes.TrimLeft(head, " \t\r\n")
	if len(t) == 0 || (t[0] != '{' && t[0] != '[') {
		return false
	}
	return len(head) < 512 || !bytes.Equal(head[257:262], []byte("ustar"))
}

var (
	blobName     = regexp.MustCompile(`^blobs/sha256/([0-9a-f]{64})$`)
	layerTarName = regexp.MustCompile(`^([0-9a-f]{64})\.tar$`)
)

// namedDigest is the digest a member must have because of its name.
func namedDigest(name string) (digest.Digest, bool) {
	if m := blobName.FindStringSubmatch(name); m != nil {
		return digest.NewDigestFromEncoded(digest.SHA256, m[1]), true
	}
	return "", false
}

// prefetch begins to read members of a directory. What is wrong with one is
// found when it is got.
func (a *archive) prefetch(ctx context.Context, names []string) {
	for _, n := range names {
		if a.dirFd < 0 || a.members[n] != nil {
			continue
		}
		if m, err := a.open(ctx, n); err != nil || m == nil {
			return
		}
	}
}

// get finds a member by name, through links. An OCI layout directory is read
// as it is asked for.
func (a *archive) get(ctx context.Context, name string) (*member, error) {
	m, err := a.find(ctx, name)
	if err != nil {
		return nil, err
	}
	m.wait()
	return m, a.failed()
}

func (a *archive) find(ctx context.Context, name string) (*member, error) {
	comps, err := tarPath(name, 64)
	if err != nil {
		return nil, err
	}
	name = strings.Join(comps, "/")
	for range maxLinks {
		m := a.members[name]
		if m == nil && a.dirFd >= 0 {
			if m, err = a.open(ctx, name); err != nil {
				return nil, err
			}
		}
		if m == nil {
			return nil, fmt.Errorf("%w: the archive has no %q", ErrCorrupt, name)
		}
		if m.link == "" {
			return m, nil
		}
		name = m.link
	}
	return nil, fmt.Errorf("%w: %q is a circle of links", ErrCorrupt, name)
}

// open reads a file of an OCI layout directory; nil if there is none.
func (a *archive) open(ctx context.Context, name string) (*member, error) {
	p, err := fsat.OpenBeneath(a.dirFd, name, unix.O_PATH|unix.O_NOFOLLOW)
	if fsat.IsAbsent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open %q: %w", name, err)
	}
	defer fsat.Close(p)
	var st unix.Stat_t
	if err := fsat.Fstat(p, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%w: %q is not a regular file", ErrCorrupt, name)
	}
	fd, err := fsat.Reopen(p, unix.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("open %q: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	m := &member{name: name}
	drained, err := a.add(ctx, m, ctxReader{ctx, f}, st.Size, func() { _ = f.Close() })
	if err != nil {
		return nil, fmt.Errorf("%q: %w", name, err)
	}
	_ = drained // each member has a file of its own
	return m, nil
}
