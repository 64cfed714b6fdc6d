package foreign

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/plyfs/plyfs/whiteout"
)

// The root of Docker before 1.10:
//
//	graph/ID/json                 document of the image; parent is another ID
//	graph/ID/layersize            bytes of its files
//	graph/ID/tar-data.json.gz     tar-split record, since 1.8
//	repositories-DRIVER           {"Repositories": {NAME: {TAG or digest: ID}}}
//	aufs/diff/ID                  content
//	aufs/layers/ID                IDs below it, nearest first
//
// The IDs are random, and are not kept: images get the IDs of their configs.

func (s *Store) isGraph() bool { return s.isDir("graph") }

func (s *Store) readGraph(ctx context.Context) error {
	s.Kind = KindGraph
	var trees func(string) *Tree
	switch {
	case s.isDir("aufs/diff"):
		s.Driver, trees = "aufs", plainDir("aufs/diff", whiteout.AUFS, false)
	case s.isDir("vfs/dir"):
		s.Driver, trees = "vfs", plainDir("vfs/dir", whiteout.Overlay, true)
	case s.isDir("overlay"):
		s.Driver, trees = "overlay", dockerTrees["overlay"].layer
	default:
		if d := s.strangeDriver(); d != "" {
			return s.refuseDriver(d)
		}
		return fmt.Errorf("%w: graph/ is there, but no layers (aufs/diff, vfs/dir or overlay)", ErrDamaged)
	}
	r := &stepReader{s: s, ids: map[string]*stepImage{}}
	r.load = func(id string) (*stepImage, error) {
		dir := "graph/" + id + "/"
		raw, err := s.readFile(dir+"json", s.limits.Config)
		if err != nil {
			if isAbsent(err) && !s.isDir("graph/"+id) {
				return nil, fmt.Errorf("%w: graph ID %s does not exist", ErrDamaged, id)
			}
			return nil, err
		}
		l := &Layer{Name: shortName(id), Size: -1, Tree: trees(id)}
		img := &stepImage{raw: raw, layer: l}
		if err := img.parse(id, s.limits.JSONDepth); err != nil {
			return nil, err
		}
		if text, err := s.readWord(dir + "layersize"); err == nil {
			if n, err := strconv.ParseInt(text, 10, 64); err == nil && n >= 0 {
				l.Size = n
			}
		}
		if split := dir + "tar-data.json.gz"; s.isFile(split) {
			l.Split = split
		}
		if !s.isDir(l.Tree.Dir) {
			return nil, fmt.Errorf("%w: its directory %s is missing", ErrDamaged, l.Tree.Dir)
		}
		if l.Tree.Whole && l.Split == "" {
			return nil, fmt.Errorf("%w: the driver %s keeps whole trees, and there is no record of the layer's tar", ErrUnsupported, s.Driver)
		}
		if p, err := s.readWord(dir + "parent"); err == nil && isHex(p, 64) { // Docker 1.9
			img.parent = p
		}
		return img, nil
	}
	ids, err := s.list("graph")
	if err != nil {
		return err
	}
	if err := r.images(ctx, ids); err != nil {
		return err
	}
	s.graphReferences(r)
	s.graphContainers(r)
	return nil
}

// graphReferences reads repositories-DRIVER.
func (s *Store) graphReferences(r *stepReader) {
	names, err := s.list("")
	if err != nil {
		s.problem("store", "repositories", err)
		return
	}
	for _, name := range names {
		if !strings.HasPrefix(name, "repositories-") || !s.isFile(name) {
			continue
		}
		var file struct{ Repositories map[string]map[string]string }
		if err := s.readJSON(name, s.limits.Index, &file); err != nil {
			s.problem("store", name, err)
			continue
		}
		for _, repo := range sortedKeys(file.Repositories) {
			for _, tag := range sortedKeys(file.Repositories[repo]) {
				sep := ":"
				if strings.Contains(tag, ":") {
					sep = "@"
				}
				r.refer(repo+sep+tag, file.Repositories[repo][tag])
			}
		}
	}
}

// graphContainers reads containers/ID/config.json; the writable layer has the ID of
// the container.
func (s *Store) graphContainers(r *stepReader) {
	ids, err := s.list("containers")
	if err != nil {
		s.problem("store", "containers", err)
		return
	}
	for _, id := range ids {
		if !isHex(id, 64) {
			continue
		}
		var conf dockerContainer
		if err := s.readJSON("containers/"+id+"/config.json", s.limits.Config, &conf); err != nil {
			s.problem("container", shortName(id), err)
			continue
		}
		c := &Container{ID: id, Name: strings.TrimPrefix(conf.Name, "/"), Image: conf.Image, ImageName: conf.Config.Image, Created: conf.Created}
		if c.Name == "" {
			c.Name = id[:12]
		}
		switch s.Driver {
		case "aufs":
			c.Upper = plainDir("aufs/diff", whiteout.AUFS, false)(id)
		case "overlay":
			c.Upper = dockerTrees["overlay"].upper(id)
		case "vfs":
			c.Upper = dockerTrees["vfs"].upper(id)
			c.Base = dockerTrees["vfs"].upper(id + "-init")
		}
		if !s.isDir(c.Upper.Dir) {
			s.problem("container", shortName(id), fmt.Errorf("%w: its directory %s is missing", ErrDamaged, c.Upper.Dir))
			continue
		}
		c.Running = s.Mounted("aufs/mnt/"+id) || s.Mounted("overlay/"+id+"/merged")
		s.Containers = append(s.Containers, c)
	}
}

// stepReader reads images that are a document and a layer each, on top of another.
type stepReader struct {
	s    *Store
	load func(id string) (*stepImage, error)
	ids  map[string]*stepImage // nil value: damaged, and reported
	byID map[string]*Image
}

// stepImage is one of them.
type stepImage struct {
	raw    json.RawMessage
	parent string
	layer  *Layer
}

func (i *stepImage) parse(id string, depth int) error {
	var d stepDocument
	if err := decodeJSON(i.raw, depth, &d); err != nil {
		return fmt.Errorf("json: %w", err)
	}
	if d.ID != "" && d.ID != id {
		return fmt.Errorf("%w: its document is that of %q", ErrDamaged, d.ID)
	}
	i.parent = d.Parent
	if i.parent == "" {
		i.parent = strings.TrimPrefix(d.ParentID, "sha256:")
	}
	if i.parent != "" && !isHex(i.parent, 64) {
		return fmt.Errorf("%w: its parent is %q", ErrDamaged, i.parent)
	}
	return nil
}

// images offers every image whose ancestors are all there.
func (r *stepReader) images(ctx context.Context, ids []string) error {
	r.byID = map[string]*Image{}
	for _, id := range ids {
		if !isHex(id, 64) { // _tmp, and what migrations have left
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		img, err := r.image(id)
		if err != nil {
			r.s.problem("image", shortName(id), err)
			continue
		}
		r.byID[id] = img
		r.s.Images = append(r.s.Images, img)
	}
	r.s.sortImages()
	return nil
}

func (r *stepReader) get(id string) (*stepImage, error) {
	if img, ok := r.ids[id]; ok {
		if img == nil {
			return nil, fmt.Errorf("%w: graph ID %s is damaged", ErrDamaged, id)
		}
		return img, nil
	}
	img, err := r.load(id)
	if err != nil {
		r.ids[id] = nil
		return nil, err
	}
	r.ids[id] = img
	return img, nil
}

func (r *stepReader) image(id string) (*Image, error) {
	out := &Image{Key: id}
	seen := map[string]bool{}
	for at := id; at != ""; {
		if seen[at] {
			return nil, fmt.Errorf("%w: its ancestors form a circle", ErrDamaged)
		}
		if seen[at] = true; len(seen) > r.s.limits.Layers {
			return nil, fmt.Errorf("%w: more than %d layers", ErrUnsupported, r.s.limits.Layers)
		}
		img, err := r.get(at)
		if err != nil {
			if at != id {
				return nil, fmt.Errorf("its ancestor %s: %w", shortName(at), err)
			}
			return nil, err
		}
		if at == id {
			out.Parent = img.parent
		}
		out.Steps = append(out.Steps, img.raw)
		out.Layers = append(out.Layers, img.layer)
		at = img.parent
	}
	for i, j := 0, len(out.Steps)-1; i < j; i, j = i+1, j-1 {
		out.Steps[i], out.Steps[j] = out.Steps[j], out.Steps[i]
		out.Layers[i], out.Layers[j] = out.Layers[j], out.Layers[i]
	}
	return out, nil
}

// refer gives an image a reference.
func (r *stepReader) refer(ref, id string) {
	if img := r.byID[id]; img != nil {
		img.Refs = append(img.Refs, ref)
		return
	}
	if _, known := r.ids[id]; known {
		r.s.problem("reference", ref, fmt.Errorf("%w: the image %s that it names is damaged", ErrDamaged, shortName(id)))
		return
	}
	r.s.problem("reference", ref, fmt.Errorf("%w: graph ID %s does not exist", ErrDamaged, id))
}
