package foreign

import (
	"context"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// The directory of a registry of version 1 (docker-registry 0.x, storage "local"):
//
//	images/ID/json                         document of the image
//	images/ID/ancestry                     JSON list of IDs, itself first, base last
//	images/ID/_checksum                    "sha256:…" of the layer, or of document and layer
//	images/ID/layer                        tar, usually with gzip
//	images/ID/_inprogress                  while the layer is uploaded
//	repositories/NAMESPACE/NAME/tag_TAG    ID
//
// Older ones keep it below images/ and repositories/ of a directory "registry".

func (s *Store) isRegistry() bool { return s.isDir("images") && s.isDir("repositories") }

func (s *Store) readRegistry(ctx context.Context) error {
	s.Kind = KindRegistry
	r := &stepReader{s: s, ids: map[string]*stepImage{}}
	r.load = func(id string) (*stepImage, error) {
		dir := "images/" + id + "/"
		raw, err := s.readFile(dir+"json", s.limits.Config)
		if err != nil {
			if isAbsent(err) && !s.isDir("images/"+id) {
				return nil, fmt.Errorf("%w: image %s does not exist", ErrDamaged, id)
			}
			return nil, err
		}
		img := &stepImage{raw: raw, layer: &Layer{Name: shortName(id), Size: -1, Blob: &Blob{File: dir + "layer", Size: -1}}}
		if err := img.parse(id, s.limits.JSONDepth); err != nil {
			return nil, err
		}
		if s.isFile(dir + "_inprogress") {
			return nil, fmt.Errorf("%w: it was never uploaded to its end", ErrDamaged)
		}
		if !s.isFile(img.layer.Blob.File) {
			return nil, fmt.Errorf("%w: its layer is missing", ErrDamaged)
		}
		img.layer.Blob.Size, img.layer.Blob.Document = s.sizeOf(img.layer.Blob.File), raw
		s.readChecksums(id, img.layer.Blob)
		return img, s.checkAncestry(dir+"ancestry", id, img.parent)
	}
	ids, err := s.list("images")
	if err != nil {
		return err
	}
	if err := r.images(ctx, ids); err != nil {
		return err
	}
	return s.registryReferences(r)
}

func (s *Store) sizeOf(name string) int64 {
	fd, err := fsat.OpenNoLinks(s.fd, name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return -1
	}
	defer fsat.Close(fd)
	var st unix.Stat_t
	if fsat.Fstat(fd, &st) != nil {
		return -1
	}
	return st.Size
}

// checkAncestry compares the list of ancestors with the document. A list that is not
// there says nothing.
func (s *Store) checkAncestry(name, id, parent string) error {
	var list []string
	if err := s.readJSON(name, s.limits.Config, &list); err != nil {
		if isAbsent(err) {
			return nil
		}
		return err
	}
	below := ""
	if len(list) > 1 {
		below = list[1]
	}
	if len(list) == 0 || list[0] != id || below != parent {
		return fmt.Errorf("%w: its ancestry and its document do not agree", ErrDamaged)
	}
	return nil
}

// readChecksums notes the checksums of a layer whose form is known: "sha256:" and 64
// digits, alone or in a JSON list. Others ("tarsum") say nothing about bytes.
func (s *Store) readChecksums(id string, b *Blob) {
	raw, err := s.readFile("images/"+id+"/_checksum", smallMax)
	if err != nil {
		return
	}
	var list []string
	if decodeJSON(raw, s.limits.JSONDepth, &list) != nil {
		list = []string{strings.Trim(strings.TrimSpace(string(raw)), `"`)}
	}
	for _, text := range list {
		if d, err := parseDigest(text); err == nil {
			b.Checksums = append(b.Checksums, d)
		}
	}
}

func (s *Store) registryReferences(r *stepReader) error {
	spaces, err := s.list("repositories")
	if err != nil {
		return err
	}
	for _, space := range spaces {
		if !isName(space) {
			continue
		}
		names, err := s.list("repositories/" + space)
		if err != nil {
			s.problem("reference", space, err)
			continue
		}
		for _, name := range names {
			if !isName(name) {
				continue
			}
			dir := "repositories/" + space + "/" + name
			files, err := s.list(dir)
			if err != nil {
				s.problem("reference", space+"/"+name, err)
				continue
			}
			for _, f := range files {
				tag, ok := strings.CutPrefix(f, "tag_")
				if !ok || !s.isFile(dir+"/"+f) {
					continue
				}
				ref := name + ":" + tag
				if space != "library" {
					ref = space + "/" + ref
				}
				id, err := s.readWord(dir + "/" + f)
				if err == nil && !isHex(id, 64) {
					err = fmt.Errorf("%w: it names %.80q", ErrDamaged, id)
				}
				if err != nil {
					s.problem("reference", ref, err)
					continue
				}
				r.refer(ref, id)
			}
		}
	}
	return nil
}
