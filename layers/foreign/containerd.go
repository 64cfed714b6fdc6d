package foreign

import (
	"context"
	"encoding/binary"
	"fmt"
	"runtime"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/plyfs/plyfs/whiteout"
)

// The root of containerd (io.containerd.…):
//
//	metadata.v1.bolt/meta.db
//	    v1/NAMESPACE/images/NAME/target/{digest,mediatype}
//	    v1/NAMESPACE/snapshots/SNAPSHOTTER/KEY/name     KEY is a chainID, if it is an image's
//	    v1/NAMESPACE/containers/ID/{image,snapshotter,snapshotKey,createdat}
//	content.v1.content/blobs/sha256/HEX
//	snapshotter.v1.SNAPSHOTTER/metadata.db
//	    v1/snapshots/NAME/{id,kind}
//	snapshotter.v1.SNAPSHOTTER/snapshots/ID/{fs,work}
const (
	containerdMeta    = "io.containerd.metadata.v1.bolt/meta.db"
	containerdContent = "io.containerd.content.v1.content/blobs/sha256/"
	containerdActive  = 2 // kind of a snapshot that is written to
)

// containerdSnapshotters keep layers, in these dialects.
var containerdSnapshotters = map[string]whiteout.Dialect{"overlayfs": whiteout.Overlay, "fuse-overlayfs": whiteout.Auto}

func (s *Store) isContainerd() bool { return s.isFile(containerdMeta) }

func (s *Store) readContainerd(ctx context.Context) error {
	s.Kind, s.Driver = KindContainerd, ""
	r := &containerdReader{s: s, ids: map[string]map[string]containerdSnapshot{}, layers: map[string]*Layer{}, images: map[digest.Digest]*Image{}, named: map[string]*Image{}}
	meta, err := s.openBolt(containerdMeta)
	if err != nil {
		return err
	}
	v1, err := meta.bucket("v1")
	if err != nil || v1 == nil {
		return fmt.Errorf("%s: %w: it has no bucket v1", containerdMeta, ErrDamaged)
	}
	for _, sn := range sortedKeys(containerdSnapshotters) {
		if err := r.snapshotter(sn); err != nil {
			s.problem("store", sn, err)
		}
	}
	for _, ns := range v1.buckets() {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.namespace(v1, ns); err != nil {
			s.problem("store", "namespace "+ns, err)
		}
	}
	return nil
}

func (s *Store) openBolt(name string) (*boltBucket, error) {
	f, err := s.OpenFile(name)
	if err != nil {
		return nil, err
	}
	// The buckets are read when they are asked for: the file is closed with the store.
	s.open = append(s.open, f)
	return openBolt(f)
}

type containerdSnapshot struct {
	id   uint64
	kind byte
}

type containerdReader struct {
	s      *Store
	ids    map[string]map[string]containerdSnapshot // snapshotter → its name for a snapshot
	layers map[string]*Layer                        // namespace and chainID
	images map[digest.Digest]*Image
	named  map[string]*Image // namespace and name
}

// snapshotter reads which directories a snapshotter's snapshots have.
func (r *containerdReader) snapshotter(name string) error {
	file := "io.containerd.snapshotter.v1." + name + "/metadata.db"
	if !r.s.isFile(file) {
		return nil
	}
	db, err := r.s.openBolt(file)
	if err != nil {
		return err
	}
	all, err := db.bucket("v1", "snapshots")
	if err != nil || all == nil {
		return err
	}
	if r.s.Driver != "" {
		r.s.Driver += ", "
	}
	r.s.Driver += name
	ids := map[string]containerdSnapshot{}
	for _, key := range all.buckets() {
		b, err := all.bucket(key)
		if err != nil {
			return err
		}
		id, n := binary.Uvarint(b.values["id"])
		kind := b.values["kind"]
		if n > 0 && len(kind) == 1 {
			ids[key] = containerdSnapshot{id, kind[0]}
		}
	}
	r.ids[name] = ids
	return nil
}

func (r *containerdReader) namespace(v1 *boltBucket, ns string) error {
	space, err := v1.bucket(ns)
	if err != nil {
		return err
	}
	images, err := space.bucket("images")
	if err != nil {
		return err
	}
	snapshots := map[string]*boltBucket{}
	for sn := range containerdSnapshotters {
		if snapshots[sn], err = space.bucket("snapshots", sn); err != nil {
			return err
		}
	}
	for _, name := range images.buckets() {
		target, err := images.bucket(name, "target")
		if err == nil && target == nil {
			err = fmt.Errorf("%w: it has no target", ErrDamaged)
		}
		if err == nil {
			err = r.image(ns, name, target, snapshots)
		}
		if err != nil {
			r.s.problem("image", name, err)
		}
	}
	containers, err := space.bucket("containers")
	if err != nil {
		return err
	}
	for _, id := range containers.buckets() {
		row, err := containers.bucket(id)
		var c *Container
		if err == nil {
			c, err = r.container(ns, id, row, snapshots)
		}
		if err != nil {
			r.s.problem("container", id, err)
			continue
		}
		r.s.Containers = append(r.s.Containers, c)
	}
	return nil
}

// blob reads a JSON document of the content store.
func (r *containerdReader) blob(d digest.Digest, v any) ([]byte, error) {
	d, err := parseDigest(d.String())
	if err != nil {
		return nil, err
	}
	raw, err := r.s.readFile(containerdContent+d.Encoded(), r.s.limits.Config)
	if err != nil {
		return nil, err
	}
	if got := digest.FromBytes(raw); got != d {
		return nil, fmt.Errorf("%w: blob %s has the digest %s", ErrDamaged, d, got)
	}
	if err := decodeJSON(raw, r.s.limits.JSONDepth, v); err != nil {
		return nil, fmt.Errorf("blob %s: %w", d, err)
	}
	return raw, nil
}

// manifest goes down indexes to the manifest for this machine.
func (r *containerdReader) manifest(d digest.Digest, media string, depth int) (man ocispec.Manifest, err error) {
	if !strings.Contains(media, "index") && !strings.Contains(media, "manifest.list") {
		_, err = r.blob(d, &man)
		return man, err
	}
	if depth > 8 {
		return man, fmt.Errorf("%w: indexes are nested too deeply", ErrUnsupported)
	}
	var idx ocispec.Index
	if _, err := r.blob(d, &idx); err != nil {
		return man, err
	}
	first := error(nil)
	for _, pass := range []func(*ocispec.Platform) bool{
		func(p *ocispec.Platform) bool {
			return p != nil && p.OS == runtime.GOOS && p.Architecture == runtime.GOARCH
		},
		func(p *ocispec.Platform) bool { return p == nil || p.OS != "unknown" },
	} {
		for _, m := range idx.Manifests {
			if !pass(m.Platform) {
				continue
			}
			if man, err = r.manifest(m.Digest, m.MediaType, depth+1); err == nil {
				return man, nil
			}
			if first == nil {
				first = err
			}
		}
	}
	if first == nil {
		first = fmt.Errorf("%w: its index names no image", ErrDamaged)
	}
	return man, first
}

func (r *containerdReader) image(ns, name string, target *boltBucket, snapshots map[string]*boltBucket) error {
	man, err := r.manifest(digest.Digest(target.text("digest")), target.text("mediatype"), 0)
	if err != nil {
		return err
	}
	var conf imageConfig
	raw, err := r.blob(man.Config.Digest, &conf)
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	id := digest.FromBytes(raw)
	img := r.images[id]
	if img == nil {
		diffIDs, err := r.s.diffIDs(raw)
		if err != nil {
			return err
		}
		if len(diffIDs) != len(man.Layers) {
			return fmt.Errorf("%w: its manifest has %d layers, its config %d", ErrDamaged, len(man.Layers), len(diffIDs))
		}
		img = &Image{Key: id.String(), ID: id, Config: raw}
		var chain digest.Digest
		for i, d := range diffIDs {
			chain = chainID(chain, d)
			l, err := r.layer(ns, chain, d, man.Layers[i], snapshots)
			if err != nil {
				return fmt.Errorf("layer %d (%s): %w", i+1, d, err)
			}
			img.Layers = append(img.Layers, l)
		}
		r.images[id] = img
		r.s.Images = append(r.s.Images, img)
	}
	r.named[ns+"\x00"+name] = img
	if !strings.HasPrefix(name, "sha256:") { // so Kubernetes calls an ID
		img.Refs = append(img.Refs, name)
	}
	return nil
}

func (r *containerdReader) layer(ns string, chain, diffID digest.Digest, d ocispec.Descriptor, snapshots map[string]*boltBucket) (*Layer, error) {
	key := ns + "\x00" + chain.String()
	if l := r.layers[key]; l != nil {
		return l, nil
	}
	l := &Layer{Name: shortName(chain.String()), DiffID: diffID, Size: -1}
	for _, sn := range sortedKeys(containerdSnapshotters) {
		t, _, err := r.tree(sn, chain.String(), snapshots[sn])
		if err != nil {
			return nil, err
		}
		if t != nil {
			l.Tree = t
			break
		}
	}
	if blob, err := parseDigest(d.Digest.String()); err == nil {
		if file := containerdContent + blob.Encoded(); r.s.isFile(file) {
			l.Blob = &Blob{File: file, Digest: blob, Size: d.Size}
		}
	}
	if l.Tree == nil && l.Blob == nil {
		return nil, fmt.Errorf("%w: it is neither unpacked nor is its archive there", ErrDamaged)
	}
	r.layers[key] = l
	return l, nil
}

// tree is the directory of a snapshot; nil if there is none.
func (r *containerdReader) tree(sn, key string, rows *boltBucket) (*Tree, byte, error) {
	if rows == nil {
		return nil, 0, nil
	}
	row, err := rows.bucket(key)
	if err != nil || row == nil {
		return nil, 0, err
	}
	snap, ok := r.ids[sn][row.text("name")]
	if !ok {
		return nil, 0, nil
	}
	dir := fmt.Sprintf("io.containerd.snapshotter.v1.%s/snapshots/%d", sn, snap.id)
	if !r.s.isDir(dir + "/fs") {
		return nil, 0, nil
	}
	t := r.s.asWritten(&Tree{Dir: dir + "/fs", Dialect: containerdSnapshotters[sn]})
	if snap.kind == containerdActive {
		t.Work = dir + "/work"
	}
	return t, snap.kind, nil
}

func (r *containerdReader) container(ns, id string, row *boltBucket, snapshots map[string]*boltBucket) (*Container, error) {
	name, sn, key := row.text("image"), row.text("snapshotter"), row.text("snapshotKey")
	img := r.named[ns+"\x00"+name]
	if img == nil {
		return nil, fmt.Errorf("%w: its image %q is not there", ErrDamaged, name)
	}
	if _, ok := containerdSnapshotters[sn]; !ok {
		return nil, fmt.Errorf("%w: snapshotter %q", ErrUnsupported, sn)
	}
	t, kind, err := r.tree(sn, key, snapshots[sn])
	if err != nil {
		return nil, err
	}
	if t == nil || kind != containerdActive {
		return nil, fmt.Errorf("%w: its snapshot %q is missing", ErrDamaged, key)
	}
	c := &Container{
		// Its own ID is a name.
		ID: digest.FromString("containerd " + ns + " " + id).Encoded(), Name: id,
		Image: img.Key, ImageName: name, Upper: t, Running: r.s.Mounted(t.Dir),
	}
	var created time.Time
	if created.UnmarshalBinary(row.values["createdat"]) == nil {
		c.Created = created
	}
	return c, nil
}
