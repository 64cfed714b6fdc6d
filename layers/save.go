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
	spec     ocispec.Image
	parent   digest.Digest
	layers   []savedLayer // bottom first
	refs     []string     // canonical
	manifest []byte
}

type savedLayer struct {
	diffID  digest.Digest
	cacheID string
	size    int64
	dir     string // in an archive of an old Docker
}

// member is the name of the layer in an archive.
func (l savedLayer) member() string {
	if l.dir != "" {
		return l.dir + "/layer.tar"
	}
	return blobPath(l.diffID)
}

// Formats of [SaveOptions].
const (
	FormatDocker    = "docker"     // OCI layout and docker-archive in one
	FormatOldDocker = "docker-old" // docker-archive with a directory for each layer
	FormatOCI       = "oci"        // OCI layout alone
)

// Save writes images as one archive: by default what Docker 25 and later
// write, which is an OCI layout with a docker-archive manifest, accepted by old
// Dockers, podman, skopeo and containerd alike; with [FormatOCI] the layout
// alone; with [FormatOldDocker] what Docker 1.10 to 24 wrote and every Docker
// reads. The same store content gives the same bytes. Layers come out as they
// came in, byte for byte, and are checked while they are written: after an
// error the output is incomplete and must be thrown away.
func (s *Store) Save(ctx context.Context, w io.Writer, refs []string, o SaveOptions) error {
	switch o.Format {
	case "":
		o.Format = FormatDocker
	case FormatDocker, FormatOldDocker, FormatOCI:
	default:
		return fmt.Errorf("%w: format %q: expected docker, docker-old or oci", ErrInvalid, o.Format)
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
	describe := describe
	if o.Format == FormatOldDocker {
		describe = func(images []*saved, _ string) ([]namedFile, error) { return describeOld(images) }
	}
	files, err := describe(images, o.Format)
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := aw.file(f.name, f.data); err != nil {
			return err
		}
	}
	if err := s.saveLayers(ctx, &aw, images, &progress{fn: o.Progress}); err != nil {
		return err
	}
	return aw.tw.Close()
}

// collect resolves what is to be saved and keeps it from being removed.
func (s *Store) collect(ctx context.Context, lease string, names []string) (out []*saved, err error) {
	err = s.update(ctx, func(tx *metadata.Tx) error {
		out = nil
		byID := map[digest.Digest]*saved{}
		var all []resolved
		for _, name := range names {
			some, err := resolveAll(tx, name)
			if err != nil {
				return err
			}
			all = append(all, some...)
		}
		for _, r := range all {
			img := byID[r.id]
			if img == nil {
				if img, err = collectOne(tx, lease, r.id); err != nil {
					return err
				}
				byID[r.id] = img
				out = append(out, img)
			}
			// A digest is no name that an archive could give.
			if r.ref != "" && len(digestOf(r.ref)) == 0 && !contains(img.refs, r.ref) {
				img.refs = append(img.refs, r.ref)
			}
		}
		return nil
	})
	return out, err
}

// resolveAll finds the image of a name, or all that a repository has, as docker save does.
func resolveAll(tx *metadata.Tx, name string) (out []resolved, err error) {
	if named, err := reference.ParseNormalizedNamed(name); err == nil && reference.IsNameOnly(named) {
		names, refs, err := tx.Refs()
		if err != nil {
			return nil, err
		}
		for i, n := range names {
			if other, err := reference.ParseNormalizedNamed(n); err == nil && other.Name() == named.Name() {
				out = append(out, resolved{refs[i].ImageID, n})
			}
		}
		if len(out) > 0 {
			return out, nil
		}
	}
	r, err := resolve(tx, name)
	return []resolved{r}, err
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
	out := &saved{id: id, config: raw, spec: img.Config, parent: row.Parent}
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
		out.layers = append(out.layers, savedLayer{diffID: rows[i].DiffID, cacheID: c.CacheID, size: c.TarSize})
		man.Layers = append(man.Layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: rows[i].DiffID, Size: c.TarSize})
	}
	out.manifest, err = json.Marshal(man)
	return out, err
}

type namedFile struct {
	name string
	data []byte
}

// archiveIndex collects the small files of an archive.
type archiveIndex struct {
	files []namedFile
	has   map[string]bool // names
}

func (a *archiveIndex) once(f namedFile) {
	if !a.has[f.name] {
		a.has[f.name] = true
		a.files = append(a.files, f)
	}
}

func (a *archiveIndex) json(name string, v any) error {
	raw, err := json.Marshal(v)
	a.once(namedFile{name, raw})
	return err
}

// describe makes the files that say what the layers are, manifests and configs
// included. They come first, so that a reader of a pipe knows each layer when it
// meets it.
func describe(images []*saved, format string) ([]namedFile, error) {
	a := archiveIndex{has: map[string]bool{}}
	if err := a.oci(images); err != nil {
		return nil, err
	}
	if format == FormatDocker {
		if err := a.docker(images); err != nil {
			return nil, err
		}
	}
	for _, img := range images {
		a.once(namedFile{blobPath(img.id), img.config})
		a.once(namedFile{blobPath(digest.FromBytes(img.manifest)), img.manifest})
	}
	return a.files, nil
}

// oci adds what makes the archive an OCI layout.
func (a *archiveIndex) oci(images []*saved) error {
	tags := map[string]int{}
	for _, img := range images {
		for _, r := range img.refs {
			_, tag := splitRef(r)
			tags[tag]++
		}
	}
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	for _, img := range images {
		d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(img.manifest), Size: int64(len(img.manifest))}
		if img.spec.OS != "" {
			d.Platform = &ocispec.Platform{OS: img.spec.OS, Architecture: img.spec.Architecture, Variant: img.spec.Variant}
		}
		sort.Strings(img.refs)
		for _, r := range img.refs {
			_, name := splitRef(r)
			if tags[name] > 1 {
				name = r // a tag alone would not tell them apart
			}
			with := d
			with.Annotations = map[string]string{annotationName: r, ocispec.AnnotationRefName: name}
			idx.Manifests = append(idx.Manifests, with)
		}
		if len(img.refs) == 0 {
			idx.Manifests = append(idx.Manifests, d)
		}
	}
	if err := a.json("oci-layout", ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}); err != nil {
		return err
	}
	return a.json("index.json", idx)
}

// docker adds manifest.json, and repositories for what is older than it.
func (a *archiveIndex) docker(images []*saved) error {
	items := []dockerItem{}
	byID := map[digest.Digest]*saved{}
	for _, img := range images {
		byID[img.id] = img
	}
	repos := map[string]map[string]string{}
	for _, img := range images {
		it := dockerItem{Config: blobPath(img.id), Layers: []string{}}
		if name := img.id.Encoded() + ".json"; a.has[name] {
			it.Config = name
		}
		// docker refuses a parent that is not in the archive, or that is more than one step below.
		if p := byID[img.parent]; p != nil && isStep(p.spec, img.spec) {
			it.Parent = img.parent
		}
		for _, l := range img.layers {
			it.Layers = append(it.Layers, l.member())
		}
		sort.Strings(img.refs)
		for _, r := range img.refs {
			named, err := reference.ParseNormalizedNamed(r)
			if err != nil {
				return fmt.Errorf("%w: reference %q: %w", ErrCorrupt, r, err)
			}
			if _, tagged := named.(reference.Tagged); !tagged {
				continue
			}
			it.RepoTags = append(it.RepoTags, reference.FamiliarString(named))
			if n := len(img.layers); n > 0 {
				repo, tag := splitRef(r)
				if repos[repo] == nil {
					repos[repo] = map[string]string{}
				}
				top := img.layers[n-1]
				if repos[repo][tag] = top.dir; top.dir == "" {
					repos[repo][tag] = top.diffID.Encoded()
				}
			}
		}
		items = append(items, it)
	}
	if err := a.json("manifest.json", items); err != nil {
		return err
	}
	if len(repos) == 0 {
		return nil
	}
	return a.json("repositories", repos)
}

func blobPath(d digest.Digest) string { return "blobs/" + d.Algorithm().String() + "/" + d.Encoded() }

// archiveWriter writes members with nothing in their headers that could differ
// between two runs.
type archiveWriter struct {
	tw   *tar.Writer
	done map[string]bool // names that are there
}

func (a *archiveWriter) header(name string, typ byte, size int64, link string) error {
	mode := int64(0o444)
	switch typ {
	case tar.TypeDir:
		mode = 0o755
	case tar.TypeSymlink:
		mode = 0o777
	}
	return a.tw.WriteHeader(&tar.Header{Name: name, Typeflag: typ, Mode: mode, Size: size, Linkname: link, ModTime: time.Unix(0, 0)})
}

// begin writes the header of a member, after those of its directories.
func (a *archiveWriter) begin(name string, typ byte, size int64, link string) error {
	for i, c := range []byte(name) {
		if dir := name[:i] + "/"; c == '/' && !a.done[dir] {
			a.done[dir] = true
			if err := a.header(dir, tar.TypeDir, 0, ""); err != nil {
				return err
			}
		}
	}
	a.done[name] = true
	return a.header(name, typ, size, link)
}

func (a *archiveWriter) file(name string, data []byte) error {
	if err := a.begin(name, tar.TypeReg, int64(len(data)), ""); err != nil {
		return err
	}
	_, err := io.Copy(a.tw, bytes.NewReader(data))
	return err
}

// saveLayers writes the layers of all images. While one is written, the next one
// is put together and hashed.
func (s *Store) saveLayers(ctx context.Context, aw *archiveWriter, images []*saved, p *progress) (err error) {
	var todo []*layerStream
	first := map[digest.Digest]string{}
	type again struct{ name, link string }
	var links []again // to the member that has the same content
	for _, img := range images {
		for i, l := range img.layers {
			name := l.member()
			switch have, ok := first[l.diffID]; {
			case !ok:
				first[l.diffID] = name
				what := fmt.Sprintf("image %s: layer %d (%s)", ShortID(img.id), i+1, l.diffID)
				todo = append(todo, &layerStream{savedLayer: l, what: what})
			case have != name:
				links = append(links, again{name, "../" + have})
			}
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
	for _, l := range links {
		if aw.done[l.name] {
			continue
		}
		if err := aw.begin(l.name, tar.TypeSymlink, 0, l.link); err != nil {
			return err
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
	if err := aw.begin(l.member(), tar.TypeReg, l.size, ""); err != nil {
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
