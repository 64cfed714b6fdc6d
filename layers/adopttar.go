package layers

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/layers/foreign"
)

// The tar of another engine's layer comes from one of three places: its tar-split
// record and its files, the archive it came in, or, where nobody has ever kept its
// tar, its files alone.

// recordLine bounds one line of another engine's tar-split record. The longest that
// is written holds 1 MiB of padding.
const recordLine = 16 << 20

// splitEntries reads a tar-split record of another engine.
func splitEntries(ctx context.Context, f *os.File, l Limits, fn func(*storage.Entry) error) error {
	zr, err := gzip.NewReader(bufio.NewReaderSize(ctxReader{ctx, f}, 64<<10))
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrCorrupt, f.Name(), err)
	}
	defer zr.Close()
	var entries, size int64
	sc := bufio.NewScanner(zr)
	sc.Buffer(make([]byte, 0, 64<<10), recordLine)
	for sc.Scan() {
		if len(bytes.TrimSpace(sc.Bytes())) == 0 {
			continue
		}
		var e storage.Entry
		if err := json.Unmarshal(sc.Bytes(), &e); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrCorrupt, f.Name(), err)
		}
		switch {
		case e.Type == storage.SegmentType:
			size += int64(len(e.Payload))
		case e.Type == storage.FileType && e.Size >= 0:
			// Checked one by one: the sum cannot overflow.
			if e.Size > l.LayerBytes {
				size = e.Size
			} else {
				size += e.Size
			}
		default:
			return fmt.Errorf("%w: %s: an entry of type %d and %d bytes", ErrCorrupt, f.Name(), e.Type, e.Size)
		}
		if size > l.LayerBytes {
			return fmt.Errorf("%w: more than %d bytes in one layer", ErrUnsupported, l.LayerBytes)
		}
		// Two or three for an entry of the tar.
		if entries++; entries > 3*l.Entries+1024 {
			return fmt.Errorf("%w: more than %d entries", ErrUnsupported, l.Entries)
		}
		if err := fn(&e); err != nil {
			return err
		}
	}
	if err := sc.Err(); err != nil {
		if cerr := ctx.Err(); cerr != nil {
			return cerr
		}
		return fmt.Errorf("%w: %s: %w", ErrCorrupt, f.Name(), err)
	}
	return nil
}

// placer finds where the files of a tar lie in a directory.
type placer struct {
	fd    int
	depth int
	last  string // directory as in the tar
	real  string // the same without symbolic links
}

// place returns the path of an entry without symbolic links on the way, as it would
// be found by a process whose root the directory is.
func (p *placer) place(name string) (string, error) {
	comps, err := tarPath(name, p.depth)
	if err != nil {
		return "", err
	}
	if len(comps) == 0 {
		return "", fmt.Errorf("%w: the root directory has no content", ErrCorrupt)
	}
	dir, base := strings.Join(comps[:len(comps)-1], "/"), comps[len(comps)-1]
	if dir == "" {
		return base, nil
	}
	if dir != p.last {
		real, err := realDir(p.fd, dir)
		if err != nil {
			return "", fmt.Errorf("directory %q: %w", dir, err)
		}
		p.last, p.real = dir, real
	}
	return join(p.real, base), nil
}

// realDir resolves the symbolic links of a directory below fd.
func realDir(fd int, dir string) (string, error) {
	if d, err := fsat.OpenBeneath(fd, dir, unix.O_PATH|unix.O_DIRECTORY); err == nil {
		fsat.Close(d)
		return dir, nil
	}
	var stack []string
	links := 0
	for todo := strings.Split(dir, "/"); len(todo) > 0; {
		c := todo[0]
		todo = todo[1:]
		switch c {
		case "", ".":
			continue
		case "..":
			if len(stack) > 0 {
				stack = stack[:len(stack)-1]
			}
			continue
		}
		at := join(strings.Join(stack, "/"), c)
		p, err := fsat.OpenBeneath(fd, at, unix.O_PATH|unix.O_NOFOLLOW)
		if err != nil {
			return "", fmt.Errorf("%w: %w", ErrCorrupt, err)
		}
		var st unix.Stat_t
		err = fsat.Fstat(p, &st)
		target := ""
		if err == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
			target, err = fsat.Readlink(p, "")
		}
		fsat.Close(p)
		if err != nil {
			return "", err
		}
		if target == "" {
			stack = append(stack, c)
			continue
		}
		if links++; links > maxLinks {
			return "", fmt.Errorf("%w: too many symbolic links", ErrCorrupt)
		}
		if strings.HasPrefix(target, "/") {
			stack = nil
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return strings.Join(stack, "/"), nil
}

// writeForeign writes the tar of a layer. tree is its directory, -1 if it has none.
func (s *Store) writeForeign(ctx context.Context, w io.Writer, src *foreign.Store, l *foreign.Layer, tree int) error {
	switch {
	case l.Split != "" && tree >= 0:
		return s.writeRecorded(ctx, w, src, l, tree)
	case l.Blob != nil:
		return s.writeBlob(ctx, w, src, l.Blob)
	case l.DiffID == "" && tree >= 0 && !l.Tree.Whole:
		return writeDirectory(ctx, w, src.Abs(l.Tree.Dir), l.Tree)
	case tree >= 0:
		return fmt.Errorf("%w: its tar cannot be made again: the store has kept neither its form nor its archive", ErrUnsupported)
	}
	return fmt.Errorf("%w: the store has neither its content nor its archive", ErrUnsupported)
}

// writeRecorded puts a tar together from another engine's record and files.
func (s *Store) writeRecorded(ctx context.Context, w io.Writer, src *foreign.Store, l *foreign.Layer, tree int) error {
	f, err := src.OpenFile(l.Split)
	if err != nil {
		return err
	}
	defer f.Close()
	files := layerFiles{dir: -1, diff: tree}
	where := placer{fd: tree, depth: s.limits.Depth}
	buf := make([]byte, 256<<10)
	return splitEntries(ctx, f, s.limits, func(e *storage.Entry) error {
		if e.Type == storage.SegmentType {
			_, err := w.Write(e.Payload)
			return err
		}
		if e.Size == 0 {
			return nil
		}
		path, err := where.place(e.GetName())
		if err != nil {
			return fmt.Errorf("content of %q: %w", e.GetName(), err)
		}
		named := storage.Entry{Type: e.Type, Size: e.Size, Payload: e.Payload}
		named.SetName(path)
		return files.content(w, &named, false, buf)
	})
}

// writeBlob writes the tar in an archive, and fails at its end if the archive is not
// what it should be.
func (s *Store) writeBlob(ctx context.Context, w io.Writer, src *foreign.Store, b *foreign.Blob) error {
	f, err := src.OpenFile(b.File)
	if err != nil {
		return err
	}
	defer f.Close()
	sum, withDocument, ofTar := sha256.New(), sha256.New(), sha256.New()
	_, _ = withDocument.Write(append(bytes.Clone(b.Document), '\n')) // hashes do not fail
	hashes := []io.Writer{sum}
	if len(b.Checksums) > 0 {
		hashes = append(hashes, withDocument)
		w = io.MultiWriter(w, ofTar)
	}
	br := bufio.NewReaderSize(io.TeeReader(ctxReader{ctx, f}, io.MultiWriter(hashes...)), 256<<10)
	plain, form, err := decompress(br)
	if err != nil {
		return err
	}
	defer plain.Close()
	if _, err := io.Copy(w, &countReader{r: plain, limit: s.limits.LayerBytes}); err != nil {
		return decompressError(form, err)
	}
	if _, err := io.Copy(io.Discard, br); err != nil {
		return err
	}
	if got := digest.NewDigest(digest.SHA256, sum); b.Digest != "" && got != b.Digest {
		return fmt.Errorf("%w: wrong digest: expected %s, got %s", ErrCorrupt, b.Digest, got)
	}
	for _, want := range b.Checksums {
		for _, h := range []digest.Digest{digest.NewDigest(digest.SHA256, sum), digest.NewDigest(digest.SHA256, withDocument), digest.NewDigest(digest.SHA256, ofTar)} {
			if h == want {
				return nil
			}
		}
	}
	if len(b.Checksums) > 0 {
		return fmt.Errorf("%w: wrong checksum: the registry has noted %s", ErrCorrupt, b.Checksums[0])
	}
	return nil
}

// writeDirectory writes a layer whose tar nobody has kept: always the same bytes for
// the same directory.
func writeDirectory(ctx context.Context, w io.Writer, path string, t *foreign.Tree) error {
	v, err := openView(ctx, []LayerDir{{Path: path, Dialect: t.Dialect}})
	if err != nil {
		return err
	}
	list, err := v.layers[0].listing("")
	v.Close()
	if err != nil {
		return err
	}
	if len(list.Entries) == 0 && !list.Opaque {
		_, err := w.Write(make([]byte, 1024)) // the empty tar, of which every engine knows the digest
		return err
	}
	_, err = writeUpper(ctx, w, Stack{Upper: path, Dialect: t.Dialect})
	return err
}

// recorded is what has become of a tar that was read to make its record.
type recorded struct {
	diffID    digest.Digest
	tarSize   int64
	splitSHA  digest.Digest
	splitSize int64
	dup       bool // a path occurs twice
}

// convertRecord writes the record of another engine in our form, without reading
// contents. The diffID is not known then.
func (s *Store) convertRecord(ctx context.Context, src *foreign.Store, l *foreign.Layer, tree int, out *os.File) (r recorded, err error) {
	f, err := src.OpenFile(l.Split)
	if err != nil {
		return r, err
	}
	defer f.Close()
	w, err := newSplitWriter(bytes.NewReader(nil), out)
	if err != nil {
		return r, err
	}
	where := placer{fd: tree, depth: s.limits.Depth}
	seen := map[string]struct{}{}
	err = splitEntries(ctx, f, s.limits, func(e *storage.Entry) error {
		if e.Type == storage.SegmentType {
			r.tarSize += int64(len(e.Payload))
			return w.add(storage.Entry{Type: storage.SegmentType, Payload: e.Payload})
		}
		if e.Size == 0 {
			return nil
		}
		path, err := where.place(e.GetName())
		if err != nil {
			return fmt.Errorf("content of %q: %w", e.GetName(), err)
		}
		_, twice := seen[path]
		r.dup = r.dup || twice
		seen[path] = struct{}{}
		r.tarSize += e.Size
		named := storage.Entry{Type: storage.FileType, Size: e.Size, Payload: e.Payload}
		named.SetName(path)
		return w.add(named)
	})
	if cerr := w.close(); err == nil {
		err = cerr
	}
	r.splitSHA, r.splitSize = w.digest(), w.size
	return r, err
}

// recordTar reads a tar whose files lie in tree, and writes its record.
func (s *Store) recordTar(ctx context.Context, tarball io.Reader, tree int, out *os.File) (r recorded, err error) {
	sum := sha256.New()
	count := &countReader{r: io.TeeReader(ctxReader{ctx, tarball}, sum), limit: s.limits.LayerBytes}
	w, err := newSplitWriter(bufio.NewReaderSize(count, 64<<10), out)
	if err != nil {
		return r, err
	}
	if err := s.recordEntries(w, tree, &r); err != nil {
		w.abort()
		return r, err
	}
	if err := w.close(); err != nil {
		return r, err
	}
	r.diffID, r.tarSize = digest.NewDigest(digest.SHA256, sum), count.n
	r.splitSHA, r.splitSize = w.digest(), w.size
	return r, nil
}

func (s *Store) recordEntries(w *splitWriter, tree int, r *recorded) error {
	where := placer{fd: tree, depth: s.limits.Depth}
	seen := map[string]struct{}{}
	tr := tar.NewReader(w)
	var entries int64
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return tarError(err, entries)
		}
		if entries++; entries > s.limits.Entries {
			return fmt.Errorf("%w: more than %d entries", ErrUnsupported, s.limits.Entries)
		}
		switch h.Typeflag {
		case tar.TypeReg, '\x00', tar.TypeCont:
		default:
			continue
		}
		if h.Size <= 0 || sparse(h) {
			continue // in the record as it is
		}
		path, err := where.place(h.Name)
		if err != nil {
			return fmt.Errorf("content of %q: %w", h.Name, err)
		}
		_, twice := seen[path]
		r.dup = r.dup || twice
		seen[path] = struct{}{}
		if err := w.beginPayload(); err != nil {
			return err
		}
		n, err := io.Copy(io.Discard, tr)
		if err == nil && n != h.Size {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return tarError(err, entries)
		}
		if _, err := w.endPayload(path, h.Size); err != nil {
			return err
		}
	}
	_, err := io.Copy(io.Discard, w)
	return err
}
