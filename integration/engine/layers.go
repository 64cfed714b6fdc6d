package engine

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// Entry is one entry of a layer: its name without a slash at the end, and all that its
// header says, with a digest of its content; a time of today is "now". What kernel overlayfs keeps for itself in
// attributes that users can read is left out: podman 4.3 writes it into layers.
type Entry struct{ Name, Text string }

// Layers reads an archive as `docker save` and `podman save --format docker-archive` write
// it, and returns the entries of each layer in order, the bottom layer first.
func Layers(file string) ([][]Entry, error) {
	members := map[string][]byte{}
	if err := eachEntry(file, func(h *tar.Header, content []byte) {
		members[h.Name] = content
		if h.Typeflag == tar.TypeSymlink { // to a layer that is in the archive already
			members[h.Name] = members[strings.TrimPrefix(h.Linkname, "../")]
		}
	}); err != nil {
		return nil, err
	}
	var manifest []struct{ Layers []string }
	if err := json.Unmarshal(members["manifest.json"], &manifest); err != nil || len(manifest) != 1 {
		return nil, fmt.Errorf("manifest of %s: %d images: %w", file, len(manifest), err)
	}
	var layers [][]Entry
	for _, name := range manifest[0].Layers {
		entries, err := describe(members[name])
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", name, err)
		}
		layers = append(layers, entries)
	}
	return layers, nil
}

// Lines are the entries as text.
func Lines(entries []Entry) []string {
	var lines []string
	for _, e := range entries {
		lines = append(lines, e.Name+" "+e.Text)
	}
	return lines
}

// Merge applies a layer to a tree, a map from names to what their entries say, as an engine
// does that unpacks it.
func Merge(tree map[string]string, layer []Entry) {
	remove := func(name string, itself bool) {
		maps.DeleteFunc(tree, func(k, _ string) bool { return itself && k == name || strings.HasPrefix(k, name+"/") })
	}
	for _, e := range layer {
		dir, base := path.Split(e.Name)
		if base == ".wh..wh..opq" {
			remove(path.Clean(dir), false)
		} else if hidden, ok := strings.CutPrefix(base, ".wh."); ok {
			remove(dir+hidden, true)
		}
	}
	for _, e := range layer {
		if strings.HasPrefix(path.Base(e.Name), ".wh.") {
			continue
		}
		if !strings.HasPrefix(e.Text, "5 ") { // whatever it was, it is no directory now
			remove(e.Name, true)
		}
		tree[e.Name] = e.Text
	}
}

func eachEntry(file string, f func(h *tar.Header, content []byte)) (err error) {
	r, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	return readTar(r, f)
}

func readTar(r io.Reader, f func(h *tar.Header, content []byte)) error {
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		content, err := io.ReadAll(tr)
		if err != nil {
			return err
		}
		f(h, content)
	}
}

// describe reads the entries of a layer.
func describe(layer []byte) (entries []Entry, err error) {
	err = readTar(bytes.NewReader(layer), func(h *tar.Header, content []byte) {
		var b strings.Builder
		when := fmt.Sprint(h.ModTime.Unix())
		if time.Since(h.ModTime) < 24*time.Hour {
			when = "now"
		}
		fmt.Fprintf(&b, "%c %o %d:%d %s", h.Typeflag, h.Mode&0o7777, h.Uid, h.Gid, when)
		switch h.Typeflag {
		case tar.TypeReg:
			fmt.Fprintf(&b, " %d %.4x", h.Size, sha256.Sum256(content))
		case tar.TypeSymlink, tar.TypeLink:
			fmt.Fprintf(&b, " -> %s", h.Linkname)
		case tar.TypeChar, tar.TypeBlock:
			fmt.Fprintf(&b, " %d,%d", h.Devmajor, h.Devminor)
		}
		for _, k := range slices.Sorted(maps.Keys(h.PAXRecords)) {
			if attr, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok && !strings.HasPrefix(attr, "user.overlay.") {
				fmt.Fprintf(&b, " %s=%q", attr, h.PAXRecords[k])
			}
		}
		entries = append(entries, Entry{strings.TrimSuffix(strings.TrimPrefix(h.Name, "./"), "/"), b.String()})
	})
	return entries, err
}
