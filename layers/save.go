package layers

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"sort"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/plyfs/plyfs/metadata"
)

// saved is one image of an archive being written.
type saved struct {
	id       digest.Digest
	config   []byte
	platform *ocispec.Platform
	layers   []savedLayer // bottom first
	refs     []string     // canonical
	manifest []byte
}

type savedLayer struct {
	diffID  digest.Digest
	cacheID string
	size    int64
}

// Save writes images as one archive: by default what Docker 25 and later
// write, which is an OCI layout with a docker-archive manifest, accepted by old
// Dockers, podman, skopeo and containerd alike; with format "oci" the layout
// alone. The same store content gives the same bytes. Layers come out as they
// came in, byte for byte, and are checked while they are written: after an
// error the output is incomplete and must be thrown away.
func (s *Store) Save(ctx context.Context, w io.Writer, refs []string, o SaveOptions) error {
	if o.Format == "" {
		o.Format = "docker"
	}
	if o.Format != "docker" && o.Format != "oci" {
		return fmt.Errorf("%w: format %q: expected docker or oci", ErrInvalid, o.Format)
	}
	if len(refs) == 0 {
		return fmt.Errorf("%w: no image given", ErrInvalid)
	}
	lease, err := s.newLease(ctx)
	if err != nil {
		return err
	}
	defer s.dropLease(lease)
	images, err := s.collect(ctx, lease, refs)
	if err != nil {
		return err
	}
	aw := archiveWriter{tw: tar.NewWriter(w), done: map[string]bool{}}
	files, err := describe(images, o.Format)
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := aw.file(f.name, f.data); err != nil {
			return err
		}
	}
	p := &progress{fn: o.Progress}
	for _, img := range images {
		if err := aw.blob(img.id, img.config); err != nil {
			return err
		}
		if err := aw.blob(digest.FromBytes(img.manifest), img.manifest); err != nil {
			return err
		}
	}
	if err := s.saveLayers(ctx, &aw, images, p); err != nil {
		return err
	}
	return aw.tw.Close()
}

// collect resolves what is to be saved and keeps it from being removed.
func (s *Store) collect(ctx context.Context, lease string, names []string) (out []*saved, err error) {
	err = s.update(ctx, func(tx *metadata.Tx) error {
		out = nil
		byID := map[digest.Digest]*saved{}
		for _, name := range names {
			r, err := resolve(tx, name)
			if err != nil {
				return err
			}
			img := byID[r.id]
			if img == nil {
				if img, err = collectOne(tx, lease, r.id); err != nil {
					return err
				}
				byID[r.id] = img
				out = append(out, img)
			}
			if r.ref != "" && !contains(img.refs, r.ref) {
				img.refs = append(img.refs, r.ref)
			}
		}
		return nil
	})
	return out, err
}

func contains(list []string, s string) bool {
	for _, l := range list {
		if l == s {
			return true
		}
	}
	return false
}

func collectOne(tx *metadata.Tx, lease string, id digest.Digest) (*saved, error) {
	img, raw, row, err := image(tx, id)
	if err != nil {
		return nil, err
	}
	out := &saved{id: id, config: raw, platform: &img.Config.Platform}
	if row.TopChain != "" {
		if err := tx.LeaseLayer(lease, row.TopChain); err != nil {
			return nil, err
		}
	}
	rows, err := tx.Chain(row.TopChain)
	if err != nil {
		return nil, err
	}
	man := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: id, Size: int64(len(raw))},
		Layers: []ocispec.Descriptor{},
	}
	for i := len(rows) - 1; i >= 0; i-- {
		c, err := tx.Cache(rows[i].CacheID)
		if err != nil {
			return nil, err
		}
		out.layers = append(out.layers, savedLayer{rows[i].DiffID, c.CacheID, c.TarSize})
		man.Layers = append(man.Layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: rows[i].DiffID, Size: c.TarSize})
	}
	out.manifest, err = json.Marshal(man)
	return out, err
}

type namedFile struct {
	name string
	data []byte
}

// describe makes the files that say what the blobs are. They come first, so
// that a reader of a pipe knows each blob when it meets it.
func describe(images []*saved, format string) ([]namedFile, error) {
	tags := map[string]int{}
	for _, img := range images {
		for _, r := range img.refs {
			_, tag := splitRef(r)
			tags[tag]++
		}
	}
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	type item struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	items := []item{}
	repos := map[string]map[string]string{}
	for _, img := range images {
		d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(img.manifest), Size: int64(len(img.manifest))}
		if img.platform.OS != "" {
			d.Platform = &ocispec.Platform{OS: img.platform.OS, Architecture: img.platform.Architecture, Variant: img.platform.Variant}
		}
		it := item{Config: blobPath(img.id), Layers: []string{}}
		for _, l := range img.layers {
			it.Layers = append(it.Layers, blobPath(l.diffID))
		}
		sort.Strings(img.refs)
		for _, r := range img.refs {
			named, err := reference.ParseNormalizedNamed(r)
			if err != nil {
				return nil, fmt.Errorf("%w: reference %q: %w", ErrCorrupt, r, err)
			}
			repo, tag := splitRef(r)
			name := tag
			if tags[tag] > 1 {
				name = r // a tag alone would not tell them apart
			}
			with := d
			with.Annotations = map[string]string{annotationName: r, ocispec.AnnotationRefName: name}
			idx.Manifests = append(idx.Manifests, with)
			if _, tagged := named.(reference.Tagged); !tagged {
				continue
			}
			it.RepoTags = append(it.RepoTags, reference.FamiliarString(named))
			if n := len(img.layers); n > 0 {
				if repos[repo] == nil {
					repos[repo] = map[string]string{}
				}
				repos[repo][tag] = img.layers[n-1].diffID.Encoded()
			}
		}
		if len(img.refs) == 0 {
			idx.Manifests = append(idx.Manifests, d)
		}
		items = append(items, it)
	}
	var out []namedFile
	add := func(name string, v any) error {
		raw, err := json.Marshal(v)
		out = append(out, namedFile{name, raw})
		return err
	}
	if err := add("oci-layout", ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}); err != nil {
		return nil, err
	}
	if err := add("index.json", idx); err != nil {
		return nil, err
	}
	if format == "docker" {
		if err := add("manifest.json", items); err != nil {
			return nil, err
		}
		if len(repos) > 0 {
			if err := add("repositories", repos); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

func blobPath(d digest.Digest) string { return "blobs/" + d.Algorithm().String() + "/" + d.Encoded() }

// archiveWriter writes members with nothing in their headers that could differ
// between two runs.
type archiveWriter struct {
	tw   *tar.Writer
	done map[string]bool
	dirs bool
}

func (a *archiveWriter) header(name string, typ byte, size int64) error {
	mode := int64(0o444)
	if typ == tar.TypeDir {
		mode = 0o755
	}
	return a.tw.WriteHeader(&tar.Header{Name: name, Typeflag: typ, Mode: mode, Size: size, ModTime: time.Unix(0, 0)})
}

func (a *archiveWriter) file(name string, data []byte) error {
	if err := a.header(name, tar.TypeReg, int64(len(data))); err != nil {
		return err
	}
	_, err := io.Copy(a.tw, bytes.NewReader(data))
	return err
}

// begin writes the header of a blob, unless the archive has it already.
func (a *archiveWriter) begin(d digest.Digest, size int64) (skip bool, err error) {
	name := blobPath(d)
	if a.done[name] {
		return true, nil
	}
	a.done[name] = true
	if !a.dirs {
		a.dirs = true
		for _, dir := range []string{"blobs/", "blobs/sha256/"} {
			if err := a.header(dir, tar.TypeDir, 0); err != nil {
				return false, err
			}
		}
	}
	return false, a.header(name, tar.TypeReg, size)
}

func (a *archiveWriter) blob(d digest.Digest, data []byte) error {
	if skip, err := a.begin(d, int64(len(data))); skip || err != nil {
		return err
	}
	_, err := io.Copy(a.tw, bytes.NewReader(data))
	return err
}

// saveLayers writes the layers of all images. While one is written, the next one
// is put together and hashed.
func (s *Store) saveLayers(ctx context.Context, aw *archiveWriter, images []*saved, p *progress) (err error) {
	var todo []*layerStream
	seen := map[digest.Digest]bool{}
	for _, img := range images {
		for i, l := range img.layers {
			if !seen[l.diffID] {
				what := fmt.Sprintf("image %s: layer %d (%s)", ShortID(img.id), i+1, l.diffID)
				todo = append(todo, &layerStream{savedLayer: l, what: what})
			}
			seen[l.diffID] = true
		}
	}
	defer func() {
		for _, l := range todo {
			l.stop()
		}
	}()
	for i, l := range todo {
		for _, l := range todo[i:min(i+2, len(todo))] {
			if err := l.begin(ctx, s); err != nil {
				return fmt.Errorf("%s: %w", l.what, err)
			}
		}
		if err := l.write(aw, p); err != nil {
			return fmt.Errorf("%s: %w", l.what, err)
		}
	}
	return nil
}

// layerStream is a layer's tar, put together in the background.
type layerStream struct {
	savedLayer
	what string // for messages
	tar  *ahead // nil: not begun
	pipe *io.PipeReader
	done chan struct{} // closed: the layer's files are closed
}

func (l *layerStream) begin(ctx context.Context, s *Store) error {
	if l.tar != nil {
		return nil
	}
	files, side, err := s.openLayer(l.cacheID)
	if err != nil {
		return err
	}
	pr, pw := io.Pipe()
	l.pipe, l.done = pr, make(chan struct{})
	go func() {
		defer close(l.done)
		defer files.Close()
		bw := bufio.NewWriterSize(pw, blockSize)
		err := files.join(ctx, bw, side.displaced())
		if err == nil {
			err = bw.Flush()
		}
		_ = pw.CloseWithError(err) // nil closes with EOF
	}()
	l.tar = readAhead(ctx, pr, rawBlocks)
	return nil
}

// stop ends the stream before its end.
func (l *layerStream) stop() {
	if l.tar == nil {
		return
	}
	_ = l.pipe.CloseWithError(io.ErrClosedPipe)
	l.tar.stop()
	<-l.done
}

func (l *layerStream) write(aw *archiveWriter, p *progress) error {
	if skip, err := aw.begin(l.diffID, l.size); skip || err != nil {
		return err
	}
	t := p.start(ShortID(l.diffID), "saving", l.size)
	defer t.done()
	if _, err := io.Copy(io.MultiWriter(aw.tw, t), l.tar); err != nil {
		return err
	}
	got, err := l.tar.finish()
	if err != nil {
		return err
	}
	return isLayer(got, l.diffID)
}
