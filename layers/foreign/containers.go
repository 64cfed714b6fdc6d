package foreign

import (
	"context"
	"encoding/base64"
	"fmt"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/plyfs/plyfs/whiteout"
)

// The graphroot of podman, buildah, skopeo and CRI-O (containers/storage):
//
//	DRIVER-images/images.json            images: id, names, top layer
//	DRIVER-images/ID/=BASE64             "big data": manifest, config
//	DRIVER-layers/layers.json            layers: id, parent, diff-digest
//	DRIVER-layers/volatile-layers.json   the same, of containers run with --rm
//	DRIVER-layers/ID.tar-split.gz
//	DRIVER-containers/containers.json    containers: id, names, image, layer
//	overlay/ID/{diff,work}, vfs/dir/ID
//
// With a mount program layers have whiteouts in the form of the tar; without one in
// that of the kernel. A store may have seen both.

// containersDrivers are those whose layers are directories.
var containersDrivers = []string{"overlay", "vfs"}

func (s *Store) isContainers() bool {
	for _, d := range append(append([]string{}, containersDrivers...), strangeDrivers...) {
		if s.isDir(d+"-images") || s.isDir(d+"-layers") {
			return true
		}
	}
	return false
}

func (s *Store) readContainers(ctx context.Context) error {
	s.Kind = KindContainers
	known := 0
	for _, d := range containersDrivers {
		if !s.isDir(d+"-images") && !s.isDir(d+"-layers") {
			continue
		}
		known++
		if s.Driver != "" {
			s.Driver += ", "
		}
		s.Driver += d
		r := containersReader{s: s, driver: d, layers: map[string]*containersLayer{}, offered: map[string]*Layer{}}
		if err := r.read(ctx); err != nil {
			return err
		}
	}
	for _, d := range strangeDrivers {
		if !s.isDir(d+"-images") && !s.isDir(d+"-layers") {
			continue
		}
		if known == 0 {
			return s.refuseDriver(d)
		}
		s.problem("store", d, fmt.Errorf("%w: storage driver %s", ErrUnsupported, d))
	}
	return nil
}

type containersLayer struct {
	ID         string         `json:"id"`
	Parent     string         `json:"parent"`
	DiffDigest string         `json:"diff-digest"`
	DiffSize   int64          `json:"diff-size"`
	Flags      map[string]any `json:"flags"`
}

type containersImage struct {
	ID       string            `json:"id"`
	Digest   string            `json:"digest"`
	Names    []string          `json:"names"`
	Layer    string            `json:"layer"`
	Digests  map[string]string `json:"big-data-digests"`
	BigNames []string          `json:"big-data-names"`
}

type containersContainer struct {
	ID       string    `json:"id"`
	Names    []string  `json:"names"`
	Image    string    `json:"image"`
	Layer    string    `json:"layer"`
	Metadata string    `json:"metadata"`
	Created  time.Time `json:"created"`
}

type containersReader struct {
	s       *Store
	driver  string
	dialect whiteout.Dialect
	layers  map[string]*containersLayer
	offered map[string]*Layer // by ID; of one chain, as an ID is
}

func (r *containersReader) read(ctx context.Context) error {
	// The file says whether there is a mount program; it is missing in old stores.
	r.dialect = whiteout.Auto
	if word, err := r.s.readWord("overlay/.has-mount-program"); err == nil && word == "false" && r.s.ofRoot() {
		r.dialect = whiteout.Overlay
	}
	for _, name := range []string{"layers.json", "volatile-layers.json"} {
		var list []*containersLayer
		if err := r.s.readJSON(r.driver+"-layers/"+name, r.s.limits.Index, &list); err != nil && !isAbsent(err) {
			return err
		}
		for _, l := range list {
			if l != nil && isName(l.ID) {
				r.layers[l.ID] = l
			}
		}
	}
	var images []*containersImage
	if err := r.s.readJSON(r.driver+"-images/images.json", r.s.limits.Index, &images); err != nil && !isAbsent(err) {
		return err
	}
	for _, i := range images {
		if err := ctx.Err(); err != nil {
			return err
		}
		if i == nil || !isName(i.ID) {
			continue
		}
		img, err := r.image(i)
		if err != nil {
			r.s.problem("image", shortName(i.ID), err)
			continue
		}
		r.s.Images = append(r.s.Images, img)
	}
	for _, name := range []string{"containers.json", "volatile-containers.json"} {
		var list []*containersContainer
		if err := r.s.readJSON(r.driver+"-containers/"+name, r.s.limits.Index, &list); err != nil && !isAbsent(err) {
			return err
		}
		for _, c := range list {
			if c == nil || !isName(c.ID) {
				continue
			}
			out, err := r.container(c)
			if err != nil {
				r.s.problem("container", shortName(c.ID), err)
				continue
			}
			r.s.Containers = append(r.s.Containers, out)
		}
	}
	return nil
}

// bigData is the file of a named piece of data of an image.
func (r *containersReader) bigData(image, key string) string {
	name := key
	for _, c := range []byte(key) {
		if c != '.' && (c < '0' || c > '9') && (c < 'a' || c > 'z') {
			// Of the keys we ask for, none gives a '/'.
			name = "=" + base64.StdEncoding.EncodeToString([]byte(key))
			break
		}
	}
	return r.driver + "-images/" + image + "/" + name
}

// config reads the config of an image: the manifest says which it is.
func (r *containersReader) config(i *containersImage) ([]byte, error) {
	var man struct {
		Config struct {
			Digest string `json:"digest"`
		} `json:"config"`
	}
	key := "sha256:" + i.ID
	if err := r.s.readJSON(r.bigData(i.ID, "manifest"), r.s.limits.Config, &man); err == nil && man.Config.Digest != "" {
		d, err := parseDigest(man.Config.Digest)
		if err != nil {
			return nil, fmt.Errorf("manifest: %w", err)
		}
		key = d.String()
	}
	raw, err := r.s.readFile(r.bigData(i.ID, key), r.s.limits.Config)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if got := digest.FromBytes(raw); got.String() != key {
		return nil, fmt.Errorf("%w: its config should have the digest %s, and has %s", ErrDamaged, key, got)
	}
	return raw, nil
}

func (r *containersReader) image(i *containersImage) (*Image, error) {
	raw, err := r.config(i)
	if err != nil {
		return nil, err
	}
	diffIDs, err := r.s.diffIDs(raw)
	if err != nil {
		return nil, err
	}
	img := &Image{Key: i.ID, ID: digest.FromBytes(raw), Config: raw, Refs: i.Names}
	at := i.Layer
	for k := len(diffIDs) - 1; k >= 0; k-- {
		l, err := r.layer(at, diffIDs[k])
		if err != nil {
			return nil, fmt.Errorf("layer %d (%s): %w", k+1, diffIDs[k], err)
		}
		img.Layers = append(img.Layers, l)
		at = r.layers[at].Parent
	}
	if at != "" {
		return nil, fmt.Errorf("%w: it has more layers than its config", ErrDamaged)
	}
	for a, b := 0, len(img.Layers)-1; a < b; a, b = a+1, b-1 {
		img.Layers[a], img.Layers[b] = img.Layers[b], img.Layers[a]
	}
	return img, nil
}

func (r *containersReader) layer(id string, diffID digest.Digest) (*Layer, error) {
	row := r.layers[id]
	if row == nil {
		return nil, fmt.Errorf("%w: layer %q is not in layers.json", ErrDamaged, shortName(id))
	}
	if row.DiffDigest != diffID.String() {
		return nil, fmt.Errorf("%w: layer %s has the diffID %q", ErrDamaged, shortName(id), row.DiffDigest)
	}
	if row.Flags["incomplete"] == true {
		return nil, fmt.Errorf("%w: layer %s is incomplete", ErrDamaged, shortName(id))
	}
	if l := r.offered[id]; l != nil {
		return l, nil
	}
	l := &Layer{Name: shortName(id), DiffID: diffID, Size: -1, Tree: r.tree(id)}
	if !r.s.isDir(l.Tree.Dir) {
		return nil, fmt.Errorf("%w: its directory %s is missing", ErrDamaged, l.Tree.Dir)
	}
	if split := r.driver + "-layers/" + id + ".tar-split.gz"; r.s.isFile(split) {
		l.Split = split
	}
	r.offered[id] = l
	return l, nil
}

func (r *containersReader) tree(id string) *Tree {
	if r.driver == "vfs" {
		return &Tree{Dir: "vfs/dir/" + id, Dialect: whiteout.Overlay, Whole: true}
	}
	return &Tree{Dir: "overlay/" + id + "/diff", Dialect: r.dialect}
}

func (r *containersReader) container(c *containersContainer) (*Container, error) {
	if !isHex(c.ID, 64) {
		return nil, fmt.Errorf("%w: %q is no ID of a container", ErrDamaged, c.ID)
	}
	row := r.layers[c.Layer]
	if row == nil {
		return nil, fmt.Errorf("%w: its layer %q is not in layers.json", ErrDamaged, shortName(c.Layer))
	}
	if c.Image == "" {
		return nil, fmt.Errorf("%w: it has no image", ErrUnsupported)
	}
	out := &Container{ID: c.ID, Name: c.ID[:12], Image: c.Image, Created: c.Created, Upper: r.tree(c.Layer)}
	if len(c.Names) > 0 && c.Names[0] != "" {
		out.Name = c.Names[0]
	}
	var meta struct {
		ImageName string `json:"image-name"`
	}
	if decodeJSON([]byte(c.Metadata), r.s.limits.JSONDepth, &meta) == nil {
		out.ImageName = meta.ImageName
	}
	if r.driver == "vfs" {
		if !isName(row.Parent) {
			return nil, fmt.Errorf("%w: its layer lies on %q", ErrDamaged, row.Parent)
		}
		out.Base = r.tree(row.Parent)
	} else {
		out.Upper.Work = "overlay/" + c.Layer + "/work"
	}
	if !r.s.isDir(out.Upper.Dir) {
		return nil, fmt.Errorf("%w: its directory %s is missing", ErrDamaged, out.Upper.Dir)
	}
	out.Running = r.s.Mounted(out.Upper.Dir) || r.s.Mounted(strings.TrimSuffix(out.Upper.Dir, "/diff")+"/merged")
	return out, nil
}
