package metadata

import (
	"maps"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Salvaged are the rows that could be read from a database file, whatever state it is
// in.
type Salvaged struct {
	rows map[string]map[string][]byte // bucket → key → value
	// Problems says what could not be read; empty for a file that is whole.
	Problems []string
}

// Salvage reads what can be read. The error is that of opening the file.
func Salvage(path string) (*Salvaged, error) {
	s := &Salvaged{rows: map[string]map[string][]byte{}}
	err := scanFile(path, func(bucket string, k, v []byte) {
		b := s.rows[bucket]
		if b == nil {
			b = map[string][]byte{}
			s.rows[bucket] = b
		}
		b[string(k)] = v
	}, func(p string) {
		if len(s.Problems) < 100 {
			s.Problems = append(s.Problems, p)
		}
	})
	return s, err
}

// salvage decodes the rows of a bucket in key order.
func salvage[T any](s *Salvaged, bucket []byte) (keys []string, rows []T) {
	for _, k := range slices.Sorted(maps.Keys(s.rows[string(bucket)])) {
		var v T
		if decode(s.rows[string(bucket)][k], &v) == nil {
			keys, rows = append(keys, k), append(rows, v)
		}
	}
	return keys, rows
}

// Layers returns the layers that could be read.
func (s *Salvaged) Layers() []Layer { _, l := salvage[Layer](s, bktLayers); return l }

// Caches returns the content rows that could be read.
func (s *Salvaged) Caches() []Cache { _, c := salvage[Cache](s, bktCache); return c }

// Images returns the images that could be read and have a config.
func (s *Salvaged) Images() (out []SavedImage) {
	_, rows := salvage[Image](s, bktImages)
	have := map[digest.Digest]int{}
	for _, i := range rows {
		config := s.rows[string(bktConfigs)][i.ID.String()]
		if i.ID.Validate() != nil || i.ID.Algorithm().FromBytes(config) != i.ID {
			continue
		}
		have[i.ID] = len(out)
		out = append(out, SavedImage{Image: i, Config: config})
	}
	names, refs := salvage[Ref](s, bktRefs)
	for n, r := range refs {
		if i, ok := have[r.ImageID]; ok {
			out[i].Refs = append(out[i].Refs, NamedRef{Name: names[n], Ref: r})
		}
	}
	for _, k := range slices.Sorted(maps.Keys(s.rows[string(bktManifests)])) {
		image, _ := split([]byte(k))
		if i, ok := have[digest.Digest(image)]; ok {
			out[i].Manifests = append(out[i].Manifests, s.rows[string(bktManifests)][k])
		}
	}
	return out
}

// Containers returns the containers that could be read.
func (s *Salvaged) Containers() []Container {
	_, c := salvage[Container](s, bktContainers)
	return c
}

// Trash returns the paths that were to be deleted.
func (s *Salvaged) Trash() (paths map[string]bool) {
	_, rows := salvage[Trash](s, bktTrash)
	paths = map[string]bool{}
	for _, t := range rows {
		paths[t.Path] = true
	}
	return paths
}

// Rest puts into tx what nothing but a database knows: who it is, which compressed
// layers are kept, which mounts are wanted, what the build cache knows of images that
// exist. Rows that are there stay. identity says that the database is to be the same one.
func (s *Salvaged) Rest(tx *Tx, identity bool) error {
	for _, k := range [][]byte{keyUUID, keyCreated, keyPlace} {
		if !identity {
			break
		}
		if v := s.rows[string(bktMeta)][string(k)]; len(v) > 0 {
			if err := tx.b(bktMeta).Put(k, v); err != nil {
				return err
			}
		}
	}
	_, blobs := salvage[Blob](s, bktBlobs)
	for _, b := range blobs {
		if _, err := tx.Blob(b.Digest); err == nil || b.Digest.Validate() != nil {
			continue
		}
		if err := tx.PutBlob(b); err != nil {
			return err
		}
	}
	wanted, mounts := salvage[Wanted](s, bktWanted)
	for i, w := range mounts {
		if !identity { // an older copy has what is not wanted any more
			break
		}
		w.Target = wanted[i]
		if err := tx.PutWanted(w); err != nil {
			return err
		}
	}
	builds := s.rows[string(bktBuildCache)]
	for _, k := range slices.Sorted(maps.Keys(builds)) {
		parent, hash, ok := strings.Cut(k, "\x00")
		image := digest.Digest(builds[k])
		if _, have := tx.Build(digest.Digest(parent), hash); have || !ok {
			continue
		}
		if _, err := tx.Image(image); err != nil {
			continue
		}
		if err := tx.PutBuild(digest.Digest(parent), hash, image); err != nil {
			return err
		}
	}
	return nil
}

// NamedRef is a reference with its name.
type NamedRef struct {
	Name string `json:"name"`
	Ref  Ref    `json:"ref"`
}

// SavedImage is everything the database knows of an image: enough to make its rows
// anew once its layers are there.
type SavedImage struct {
	Image     Image      `json:"image"`
	Config    []byte     `json:"config"`
	Refs      []NamedRef `json:"refs,omitempty"`
	Manifests [][]byte   `json:"manifests,omitempty"`
	// Layers of the chain, bottom first. Their content rows are in their own
	// directories.
	Layers []Layer `json:"layers,omitempty"`
}

// SavedImage reads everything of an image.
func (tx *Tx) SavedImage(id digest.Digest) (SavedImage, error) {
	var s SavedImage
	var err error
	if s.Image, err = tx.Image(id); err != nil {
		return s, err
	}
	if s.Config, err = tx.Config(id); err != nil {
		return s, err
	}
	for _, name := range tx.RefsOf(id) {
		if r, err := tx.Ref(name); err == nil {
			s.Refs = append(s.Refs, NamedRef{name, r})
		}
	}
	for _, d := range tx.Manifests(id) {
		raw, err := tx.Manifest(id, d)
		if err != nil {
			return s, err
		}
		s.Manifests = append(s.Manifests, raw)
	}
	s.Layers = tx.SavedChain(s.Image.TopChain)
	return s, nil
}

// SavedChain returns the layers of a chain, bottom first, as far as there are rows,
// without what follows from others and what changes by itself: depths, and the blobs
// that a layer was found in.
func (tx *Tx) SavedChain(top digest.Digest) []Layer {
	ls, _ := tx.Chain(top)
	slices.Reverse(ls)
	for i := range ls {
		ls[i].Depth, ls[i].Blob, ls[i].BlobSize, ls[i].MediaType = 0, "", 0, ""
	}
	return ls
}

// RestoreImage puts back an image whose row or whose names are missing. The chain is
// not asked for: an image without its layers is one that has to be loaded again.
// Names that another image has stay with it.
func (tx *Tx) RestoreImage(s SavedImage) error {
	id := s.Image.ID
	if id.Validate() != nil || id.Algorithm().FromBytes(s.Config) != id {
		return errInvariantf("config of image %s: it does not have this digest", id)
	}
	i := s.Image
	if top, ok := configChain(s.Config); ok {
		i.TopChain = top
	}
	i.brief(s.Config)
	tx.touchImage(id)
	if _, err := tx.Image(id); err != nil {
		if err := put(tx, bktImages, []byte(id), i); err != nil {
			return err
		}
		if err := tx.indexImage(i); err != nil {
			return err
		}
	}
	if err := tx.b(bktConfigs).Put([]byte(id), s.Config); err != nil {
		return err
	}
	for _, r := range s.Refs {
		if _, err := tx.Ref(r.Name); err == nil || r.Name == "" {
			continue
		}
		if _, err := tx.SetRef(r.Name, Ref{ImageID: id, Updated: r.Ref.Updated}); err != nil {
			return err
		}
	}
	for _, raw := range s.Manifests {
		if err := tx.AddManifest(id, digest.Canonical.FromBytes(raw), raw); err != nil {
			return err
		}
	}
	return nil
}

// RestoreContainer puts back a container whose row is missing. Neither its image nor
// its layers are asked for. A name that is taken gets a suffix.
func (tx *Tx) RestoreContainer(c Container) error {
	if c.ID == "" || c.MountID == "" || tx.b(idxContainerMount).Get([]byte(c.MountID)) != nil {
		return errInvariantf("container %q: it is there, or has no ID", c.ID)
	}
	if _, err := tx.Container(c.ID); err == nil {
		return errInvariantf("container %q: there is another with this ID", c.ID)
	}
	for {
		if _, taken := tx.ContainerByName(c.Name); !taken && c.Name != "" {
			break
		}
		c.Name += "-restored"
	}
	c.Owner = Owner{}
	tx.touchContainer(c.ID)
	if err := put(tx, bktContainers, []byte(c.ID), c); err != nil {
		return err
	}
	return tx.indexContainer(c)
}
