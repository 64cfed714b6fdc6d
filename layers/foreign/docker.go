package foreign

import (
	"context"
	"fmt"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/plyfs/plyfs/whiteout"
)

// The root of Docker since 1.10, for each storage driver that was ever used:
//
//	image/DRIVER/imagedb/content/sha256/HEX       config
//	image/DRIVER/imagedb/metadata/sha256/HEX/parent
//	image/DRIVER/layerdb/sha256/CHAIN/{diff,parent,cache-id,size,tar-split.json.gz}
//	image/DRIVER/layerdb/mounts/CONTAINER/{mount-id,init-id,parent}
//	image/DRIVER/repositories.json
//	containers/CONTAINER/config.v2.json
//
// The files link and lower, and the directory l, of the drivers are not looked at:
// what is on top of what stands in the layerdb.

// dockerTrees say where a driver keeps the content of a layer, given its cache-id
// or mount-id.
var dockerTrees = map[string]struct{ layer, upper func(id string) *Tree }{
	"overlay2":       {overlayDiff("overlay2", whiteout.Overlay), overlayUpper("overlay2", whiteout.Overlay)},
	"fuse-overlayfs": {overlayDiff("fuse-overlayfs", whiteout.Auto), overlayUpper("fuse-overlayfs", whiteout.Auto)},
	"aufs":           {plainDir("aufs/diff", whiteout.AUFS, false), plainDir("aufs/diff", whiteout.AUFS, false)},
	"vfs":            {plainDir("vfs/dir", whiteout.Overlay, true), plainDir("vfs/dir", whiteout.Overlay, true)},
	"overlay": {
		func(id string) *Tree {
			return &Tree{Dir: "overlay/" + id + "/root", Dialect: whiteout.Overlay, Whole: true}
		},
		func(id string) *Tree {
			return &Tree{Dir: "overlay/" + id + "/upper", Dialect: whiteout.Overlay, Work: "overlay/" + id + "/work"}
		},
	},
}

func overlayDiff(driver string, d whiteout.Dialect) func(string) *Tree {
	return func(id string) *Tree { return &Tree{Dir: driver + "/" + id + "/diff", Dialect: d} }
}

func overlayUpper(driver string, d whiteout.Dialect) func(string) *Tree {
	return func(id string) *Tree {
		return &Tree{Dir: driver + "/" + id + "/diff", Dialect: d, Work: driver + "/" + id + "/work"}
	}
}

func plainDir(dir string, d whiteout.Dialect, whole bool) func(string) *Tree {
	return func(id string) *Tree { return &Tree{Dir: dir + "/" + id, Dialect: d, Whole: whole} }
}

func (s *Store) isDocker() bool {
	drivers, err := s.list("image")
	if err != nil {
		return false
	}
	for _, d := range drivers {
		if isName(d) && (s.isDir("image/"+d+"/imagedb") || s.isDir("image/"+d+"/layerdb")) {
			return true
		}
	}
	return false
}

func (s *Store) readDocker(ctx context.Context) error {
	s.Kind = KindDocker
	drivers, err := s.list("image")
	if err != nil {
		return err
	}
	refused := ""
	known := 0
	for _, d := range drivers {
		if !isName(d) || !s.isDir("image/"+d) {
			continue
		}
		if _, ok := dockerTrees[d]; !ok {
			refused = d
			s.problem("store", "image/"+d, fmt.Errorf("%w: storage driver %s", ErrUnsupported, d))
			continue
		}
		known++
		if s.Driver != "" {
			s.Driver += ", "
		}
		s.Driver += d
		r := dockerReader{s: s, driver: d, dir: "image/" + d + "/", layers: map[digest.Digest]*Layer{}, tops: map[digest.Digest]string{}}
		if err := r.read(ctx); err != nil {
			return err
		}
	}
	if known == 0 {
		return s.refuseDriver(refused)
	}
	s.sortImages()
	// Newer engines keep images in a containerd of their own.
	if len(s.Images) == 0 && s.isFile("containerd/daemon/"+containerdMeta) {
		s.problem("store", "containerd/daemon", fmt.Errorf("%w: if images are in containerd's store, adopt them from %q", ErrUnsupported, s.Abs("containerd/daemon")))
	}
	return nil
}

type dockerReader struct {
	s      *Store
	driver string
	dir    string                   // image/DRIVER/
	layers map[digest.Digest]*Layer // by chainID
	tops   map[digest.Digest]string // chainID → Key of an image that ends there
}

func (r *dockerReader) read(ctx context.Context) error {
	refs := r.repositories()
	names, err := r.s.list(r.dir + "imagedb/content/sha256")
	if err != nil {
		return err
	}
	have := map[string]*Image{}
	for _, hex := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		img, err := r.image(hex)
		if err != nil {
			r.s.problem("image", "sha256:"+hex, err)
			continue
		}
		have[img.Key] = img
		r.s.Images = append(r.s.Images, img)
	}
	for _, ref := range sortedKeys(refs) {
		if img := have[refs[ref]]; img != nil {
			img.Refs = append(img.Refs, ref)
		} else {
			r.s.problem("reference", ref, fmt.Errorf("%w: the image %s that it names is not there, or is damaged", ErrDamaged, shortName(refs[ref])))
		}
	}
	return r.containers(ctx)
}

// repositories reads which image each reference names.
func (r *dockerReader) repositories() map[string]string {
	var file struct{ Repositories map[string]map[string]string }
	refs := map[string]string{}
	name := r.dir + "repositories.json"
	if err := r.s.readJSON(name, r.s.limits.Index, &file); err != nil {
		if !isAbsent(err) {
			r.s.problem("store", name, err)
		}
		return refs
	}
	for _, repo := range file.Repositories {
		for ref, id := range repo {
			refs[ref] = id
		}
	}
	return refs
}

func (r *dockerReader) image(hex string) (*Image, error) {
	if !isHex(hex, 64) {
		return nil, fmt.Errorf("%w: its name is no digest", ErrDamaged)
	}
	id := digest.NewDigestFromEncoded(digest.SHA256, hex)
	raw, err := r.s.readFile(r.dir+"imagedb/content/sha256/"+hex, r.s.limits.Config)
	if err != nil {
		return nil, err
	}
	if got := digest.FromBytes(raw); got != id {
		return nil, fmt.Errorf("%w: its config has the digest %s", ErrDamaged, got)
	}
	diffIDs, err := r.s.diffIDs(raw)
	if err != nil {
		return nil, err
	}
	img := &Image{Key: id.String(), ID: id, Config: raw}
	var chain digest.Digest
	for i, d := range diffIDs {
		parent := chain
		chain = chainID(parent, d)
		l := r.layers[chain]
		if l == nil {
			if l, err = r.layer(chain, parent, d); err != nil {
				return nil, fmt.Errorf("layer %d (%s): %w", i+1, d, err)
			}
			r.layers[chain] = l
		}
		img.Layers = append(img.Layers, l)
	}
	if _, ok := r.tops[chain]; !ok {
		r.tops[chain] = img.Key
	}
	if p, err := r.s.readWord(r.dir + "imagedb/metadata/sha256/" + hex + "/parent"); err == nil {
		if d, err := parseDigest(p); err == nil {
			img.Parent = d.String()
		}
	}
	return img, nil
}

// layer reads what the layerdb says of a chain, and checks that it says what the
// config does.
func (r *dockerReader) layer(chain, parent, diffID digest.Digest) (*Layer, error) {
	dir := r.dir + "layerdb/sha256/" + chain.Encoded() + "/"
	diff, err := r.s.readWord(dir + "diff")
	if err != nil {
		return nil, err
	}
	if diff != diffID.String() {
		return nil, fmt.Errorf("%w: the layerdb has the diffID %q for it", ErrDamaged, diff)
	}
	below, err := r.s.readWord(dir + "parent")
	if err != nil && !isAbsent(err) {
		return nil, err
	}
	if below != parent.String() {
		return nil, fmt.Errorf("%w: in the layerdb it lies on %q, by its chainID on %q", ErrDamaged, below, parent)
	}
	cache, err := r.s.readWord(dir + "cache-id")
	if err != nil {
		return nil, err
	}
	if !isName(cache) {
		return nil, fmt.Errorf("%w: its cache-id is %q", ErrDamaged, cache)
	}
	l := &Layer{Name: shortName(chain.String()), DiffID: diffID, Size: -1, Tree: r.s.asWritten(dockerTrees[r.driver].layer(cache))}
	if text, err := r.s.readWord(dir + "size"); err == nil {
		if n, err := strconv.ParseInt(text, 10, 64); err == nil && n >= 0 {
			l.Size = n
		}
	}
	if !r.s.isDir(l.Tree.Dir) {
		return nil, fmt.Errorf("%w: its directory %s is missing", ErrDamaged, l.Tree.Dir)
	}
	if split := dir + "tar-split.json.gz"; r.s.isFile(split) {
		l.Split = split
	}
	return l, nil
}

// dockerContainer is what has to be known of config.v2.json.
type dockerContainer struct {
	ID      string
	Name    string
	Image   string
	Created time.Time
	Config  struct{ Image string }
	State   struct{ Running, Paused bool }
}

func (r *dockerReader) containers(ctx context.Context) error {
	ids, err := r.s.list(r.dir + "layerdb/mounts")
	if err != nil {
		return err
	}
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return err
		}
		c, err := r.container(id)
		if err != nil {
			r.s.problem("container", shortName(id), err)
			continue
		}
		r.s.Containers = append(r.s.Containers, c)
	}
	return nil
}

func (r *dockerReader) container(id string) (*Container, error) {
	if !isHex(id, 64) {
		return nil, fmt.Errorf("%w: %q is no ID of a container", ErrDamaged, id)
	}
	dir := r.dir + "layerdb/mounts/" + id + "/"
	mount, err := r.s.readWord(dir + "mount-id")
	if err != nil {
		return nil, err
	}
	if !isName(mount) {
		return nil, fmt.Errorf("%w: its mount-id is %q", ErrDamaged, mount)
	}
	parent, err := r.s.readWord(dir + "parent")
	if err != nil && !isAbsent(err) { // an image without layers has none
		return nil, err
	}
	c := &Container{ID: id, Name: id[:12], Upper: r.s.asWritten(dockerTrees[r.driver].upper(mount))}
	var conf dockerContainer
	switch err := r.s.readJSON("containers/"+id+"/config.v2.json", r.s.limits.Config, &conf); {
	case err == nil:
		if name := strings.TrimPrefix(conf.Name, "/"); name != "" {
			c.Name = name
		}
		c.Image, c.ImageName, c.Created = conf.Image, conf.Config.Image, conf.Created
		// What a daemon has left behind that was killed is not running.
		c.Running = conf.State.Running && len(r.s.Users) > 0
	case !isAbsent(err):
		r.s.problem("container", shortName(id), fmt.Errorf("its name is lost: %w", err))
	}
	if c.Image == "" {
		c.Image = r.tops[digest.Digest(parent)]
	}
	if c.Image == "" {
		return nil, fmt.Errorf("%w: its image is unknown", ErrDamaged)
	}
	if c.Upper.Whole {
		initID, err := r.s.readWord(dir + "init-id")
		if err != nil {
			return nil, err
		}
		if !isName(initID) {
			return nil, fmt.Errorf("%w: its init-id is %q", ErrDamaged, initID)
		}
		c.Base = dockerTrees[r.driver].upper(initID)
	}
	if !r.s.isDir(c.Upper.Dir) {
		return nil, fmt.Errorf("%w: its directory %s is missing", ErrDamaged, c.Upper.Dir)
	}
	if r.s.Mounted(c.Upper.Dir) || r.s.Mounted(r.driver+"/"+mount+"/merged") || r.s.Mounted("aufs/mnt/"+mount) {
		c.Running = true
	}
	return c, nil
}

// asWritten corrects the dialect of a tree: the engine of a user cannot write what
// root's does.
func (s *Store) asWritten(t *Tree) *Tree {
	if t.Dialect == whiteout.Overlay && !t.Whole && !s.ofRoot() {
		t.Dialect = whiteout.Auto
	}
	return t
}

func sortedKeys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}
