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
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// archive is an image archive being read, in one pass and in whatever order
// its members come. Small JSON members are kept in memory; any other member is
// taken for a layer and unpacked into a stage at once, since the manifest that
// says so may be the last member and a pipe cannot be read twice.
type archive struct {
	s        *Store
	lease    string
	progress *progress
	dirFd    int // of an OCI layout directory, or -1

	members   map[string]*member
	jsonBytes int64
	stages    []*stage // every one made, for cleaning up
}

// member is one file of the archive.
type member struct {
	name   string
	link   string // another member, for symbolic and hard links
	json   []byte
	digest digest.Digest // of the member as stored
	size   int64
	layer  *layerData
	err    error // why it is not a layer
}

// layerData is a layer blob whose digests are known.
type layerData struct {
	name     string
	diffID   digest.Digest
	blob     digest.Digest
	blobSize int64
	stage    *stage // nil: the store has the content, or the stage was used
}

// jsonMax bounds the memory for all JSON members together.
const jsonMax = 256 << 20

// clean throws away the stages that no image has taken.
func (a *archive) clean() {
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
			return a.drain(plain, outer, form)
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			if n == 0 && errors.Is(err, tar.ErrHeader) {
				return fmt.Errorf("%w: this is not an image archive: it is not a tar, nor one compressed with gzip, zstd or bzip2", ErrInvalid)
			}
			return archiveError(form, err, n)
		}
		if n >= a.s.limits.Members {
			return fmt.Errorf("%w: the archive has more than %d members", ErrUnsupported, a.s.limits.Members)
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
		return a.add(ctx, m, r, h.Size)
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
	if old := a.members[m.name]; old != nil && old.layer != nil && old.layer.stage != nil {
		old.layer.stage.discard()
	}
	a.members[m.name] = m
}

// add takes in one regular member.
func (a *archive) add(ctx context.Context, m *member, r io.Reader, size int64) error {
	sum := &sumReader{r: r, sum: sha256.New()}
	br := bufio.NewReaderSize(sum, 128<<10)
	head, err := br.Peek(512)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	isJSON := looksLikeJSON(head)
	switch {
	case m.name == "manifest.json" || m.name == "index.json" || m.name == "oci-layout" || m.name == "repositories":
		if size > a.s.limits.Manifest {
			return fmt.Errorf("%w: %d bytes, the limit is %d", ErrUnsupported, size, a.s.limits.Manifest)
		}
		isJSON = true
	case isJSON && size > a.s.limits.Config:
		isJSON = false
	case !isJSON && size < 512 && size > 0 && !compressed(head):
		m.err = fmt.Errorf("%w: it is not a layer: %d bytes, no tar and not compressed", ErrCorrupt, size)
	}
	switch {
	case isJSON:
		if a.jsonBytes += size; a.jsonBytes > jsonMax {
			return fmt.Errorf("%w: more than %d bytes of JSON in the archive", ErrUnsupported, int64(jsonMax))
		}
		if m.json, err = io.ReadAll(br); err != nil {
			return err
		}
	case m.err == nil:
		if err := a.addLayer(ctx, m, br, size); err != nil {
			return err
		}
	}
	if _, err := io.Copy(io.Discard, br); err != nil {
		return err
	}
	if sum.n != size {
		return fmt.Errorf("expected %d bytes, got %d: %w", size, sum.n, io.ErrUnexpectedEOF)
	}
	m.digest, m.size = sum.digest(), sum.n
	if want, ok := namedDigest(m.name); ok && want != m.digest {
		return fmt.Errorf("%w: wrong digest: its name says %s, its content has %s", ErrCorrupt, want, m.digest)
	}
	if m.layer != nil {
		m.layer.blob, m.layer.blobSize = m.digest, m.size
	}
	a.put(m)
	return nil
}

func compressed(head []byte) bool {
	_, form, err := decompress(bufio.NewReader(bytes.NewReader(head)))
	return err != nil || form != "none"
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

// fatal tells errors of this machine from those of the member.
func fatal(ctx context.Context, err error) bool {
	return ctx.Err() != nil || errors.Is(err, ErrLocked) ||
		errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EIO) || errors.Is(err, unix.EROFS) ||
		errors.Is(err, errFault)
}

// errFault ends the work at a fault point of a test.
var errFault = errors.New("fault point")

// addLayer unpacks a member, or only hashes it if the store has its content.
// What is wrong with it matters only if a manifest turns out to name it.
func (a *archive) addLayer(ctx context.Context, m *member, br *bufio.Reader, size int64) error {
	short := m.name
	if d, ok := namedDigest(m.name); ok {
		short = d.Encoded()[:12]
	}
	track := a.progress.start(short, "unpacking", size)
	defer track.done()
	raw := bufio.NewReaderSize(track.reader(br), 128<<10)
	plain, form, err := decompress(raw)
	if err != nil {
		m.err = err
		return nil
	}
	defer plain.Close()
	known, err := a.haveContent(ctx, m.name)
	if err != nil {
		return err
	}
	if known {
		track.action("verifying")
		sum := &sumReader{r: ctxReader{ctx, plain}, sum: sha256.New(), limit: a.s.limits.LayerBytes}
		if _, err := io.Copy(io.Discard, sum); err != nil {
			if m.err = decompressError(form, err); fatal(ctx, err) || form == "none" {
				return err
			}
			return nil
		}
		m.layer = &layerData{name: m.name, diffID: sum.digest()}
		return a.mustHave(ctx, m)
	}
	st, err := a.s.newStage(ctx, "load")
	if err != nil {
		return err
	}
	a.stages = append(a.stages, st)
	if err := st.unpack(ctx, plain); err != nil {
		st.discard()
		if fatal(ctx, err) {
			return err
		}
		m.err = decompressError(form, err)
		return nil
	}
	m.layer = &layerData{name: m.name, diffID: st.u.stats.diffID, stage: st}
	return nil
}

// haveContent asks whether the store has what a member's name promises, and
// keeps it from being removed meanwhile.
func (a *archive) haveContent(ctx context.Context, name string) (bool, error) {
	d, ok := namedDigest(name)
	if m := layerTarName.FindStringSubmatch(name); m != nil {
		d, ok = digest.NewDigestFromEncoded(digest.SHA256, m[1]), true
	}
	if !ok {
		return false, nil
	}
	find := func(tx *metadata.Tx) []digest.Digest {
		return append(tx.ChainsByDiff(d), tx.ChainsByBlob(d)...)
	}
	have := false
	err := a.s.view(ctx, func(tx *metadata.Tx) error { have = len(find(tx)) > 0; return nil })
	if err != nil || !have {
		return false, err
	}
	err = a.s.update(ctx, func(tx *metadata.Tx) error {
		chains := find(tx)
		have = len(chains) > 0
		for _, c := range chains {
			if err := tx.LeaseLayer(a.lease, c); err != nil {
				return err
			}
		}
		return nil
	})
	return have, err
}

// mustHave makes sure that a member that was only hashed is what its name
// promised: if not, its content is nowhere.
func (a *archive) mustHave(ctx context.Context, m *member) error {
	return a.s.view(ctx, func(tx *metadata.Tx) error {
		if len(tx.ChainsByDiff(m.layer.diffID)) == 0 {
			return fmt.Errorf("%w: wrong digest: its name promises a layer of the store, its content has diffID %s", ErrCorrupt, m.layer.diffID)
		}
		return nil
	})
}

// get finds a member by name, through links. An OCI layout directory is read
// as it is asked for.
func (a *archive) get(ctx context.Context, name string) (*member, error) {
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
	defer f.Close()
	m := &member{name: name}
	if err := a.add(ctx, m, ctxReader{ctx, f}, st.Size); err != nil {
		return nil, fmt.Errorf("%q: %w", name, err)
	}
	return m, nil
}

// progress turns byte counts into calls of a ProgressFunc.
type progress struct {
	fn ProgressFunc
}

type track struct {
	p    *progress
	last time.Time
	ev   Progress
}

func (p *progress) start(id, action string, total int64) *track {
	t := &track{p: p, ev: Progress{ID: id, Action: action, Total: total}}
	t.tell(true)
	return t
}

func (t *track) tell(force bool) {
	if t.p == nil || t.p.fn == nil || (!force && time.Since(t.last) < 50*time.Millisecond) {
		return
	}
	t.last = time.Now()
	t.p.fn(t.ev)
}

func (t *track) action(a string) {
	t.ev.Action = a
	t.tell(true)
}

func (t *track) add(n int64) {
	t.ev.Current += n
	t.tell(false)
}

func (t *track) done() {
	t.ev.Done = true
	t.tell(true)
}

func (t *track) reader(r io.Reader) io.Reader { return trackReader{t, r} }

type trackReader struct {
	t *track
	r io.Reader
}

func (r trackReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.t.add(int64(n))
	return n, err
}

func (t *track) Write(p []byte) (int, error) { t.add(int64(len(p))); return len(p), nil }
