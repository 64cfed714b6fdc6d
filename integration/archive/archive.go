package archive

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"

	"github.com/klauspost/compress/zstd"
)

// Image is what gets written. Layers[0] is the bottom; each is an
// uncompressed tar.
type Image struct {
	Ref    string
	Layers [][]byte
	// Config is the "config" of the image's configuration; nil: one with a shell as Cmd.
	Config map[string]any
}

// Options say how it is written, and what is made wrong.
type Options struct {
	Format   string // "docker" (default) or "oci"
	Compress string // "", "gzip" or "zstd"; of layers
	// Break is one of "", "truncated" (cut in the middle), "digest" (a layer
	// whose content has another digest than the config says), "missing-layer",
	// "no-manifest".
	Break string
	// LayersLast writes manifest and config before the layers, and not after.
	LayersLast bool
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

func digest(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

// Write writes the image to a file.
func (im Image) Write(file string, o Options) error {
	var diffIDs []string
	var blobs [][]byte
	for i, l := range im.Layers {
		diffIDs = append(diffIDs, digest(l))
		if o.Break == "digest" && i == len(im.Layers)-1 {
			l = append([]byte(nil), l...)
			l[600] ^= 1 // inside of the first entry's content or the second header
		}
		b, err := compress(l, o.Compress)
		if err != nil {
			return err
		}
		blobs = append(blobs, b)
	}
	run := im.Config
	if run == nil {
		run = map[string]any{"Cmd": []string{"/bin/sh"}}
	}
	config, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux", "created": "2024-01-02T03:04:05Z",
		"config":  run,
		"rootfs":  map[string]any{"type": "layers", "diff_ids": diffIDs},
		"history": history(len(im.Layers)),
	})
	if err != nil {
		return err
	}
	var files []member
	if o.Format == "oci" {
		files, err = im.oci(config, blobs, o)
	} else {
		files, err = im.docker(config, blobs, o)
	}
	if err != nil {
		return err
	}
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, f := range files {
		if err := tw.WriteHeader(&tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.data)), Typeflag: tar.TypeReg}); err != nil {
			return err
		}
		if _, err := tw.Write(f.data); err != nil {
			return err
		}
	}
	if err := tw.Close(); err != nil {
		return err
	}
	out := buf.Bytes()
	if o.Break == "truncated" {
		out = out[:len(out)/2]
	}
	return os.WriteFile(file, out, 0o644)
}

type member struct {
	name string
	data []byte
}

func history(n int) []map[string]any {
	var h []map[string]any
	for i := range n {
		h = append(h, map[string]any{"created": "2024-01-02T03:04:05Z", "created_by": fmt.Sprintf("step %d", i+1)})
	}
	return h
}

func (im Image) docker(config []byte, blobs [][]byte, o Options) ([]member, error) {
	configName := digest(config)[7:] + ".json"
	var names []string
	var layers []member
	for i, b := range blobs {
		name := fmt.Sprintf("%x/layer.tar", sha256.Sum256(im.Layers[i]))
		names = append(names, name)
		if o.Break == "missing-layer" && i == len(blobs)-1 {
			continue
		}
		layers = append(layers, member{name, b})
	}
	manifest, err := json.Marshal([]map[string]any{{"Config": configName, "RepoTags": []string{im.Ref}, "Layers": names}})
	if err != nil {
		return nil, err
	}
	head := []member{{configName, config}}
	if o.Break != "no-manifest" {
		head = append(head, member{"manifest.json", manifest})
	}
	if o.LayersLast {
		return append(head, layers...), nil
	}
	return append(layers, head...), nil
}

func (im Image) oci(config []byte, blobs [][]byte, o Options) ([]member, error) {
	const blobDir = "blobs/sha256/"
	mediaType := "application/vnd.oci.image.layer.v1.tar"
	if o.Compress != "" {
		mediaType += "+" + o.Compress
	}
	var descs []descriptor
	var layers []member
	for i, b := range blobs {
		descs = append(descs, descriptor{MediaType: mediaType, Digest: digest(b), Size: len(b)})
		if o.Break == "missing-layer" && i == len(blobs)-1 {
			continue
		}
		layers = append(layers, member{blobDir + digest(b)[7:], b})
	}
	manifest, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": descriptor{MediaType: "application/vnd.oci.image.config.v1+json", Digest: digest(config), Size: len(config)},
		"layers": descs,
	})
	if err != nil {
		return nil, err
	}
	index, err := json.Marshal(map[string]any{
		"schemaVersion": 2,
		"manifests": []descriptor{{
			MediaType: "application/vnd.oci.image.manifest.v1+json", Digest: digest(manifest), Size: len(manifest),
			Annotations: map[string]string{"org.opencontainers.image.ref.name": im.Ref, "io.containerd.image.name": im.Ref},
		}},
	})
	if err != nil {
		return nil, err
	}
	head := []member{
		{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)},
		{blobDir + digest(config)[7:], config},
		{blobDir + digest(manifest)[7:], manifest},
	}
	if o.Break != "no-manifest" {
		head = append(head, member{"index.json", index})
	}
	if o.LayersLast {
		return append(head, layers...), nil
	}
	return append(layers, head...), nil
}

func compress(b []byte, how string) ([]byte, error) {
	var buf bytes.Buffer
	switch how {
	case "":
		return b, nil
	case "gzip":
		w := gzip.NewWriter(&buf)
		if _, err := w.Write(b); err != nil {
			return nil, err
		}
		if err := w.Close(); err != nil {
			return nil, err
		}
	case "zstd":
		w, err := zstd.NewWriter(&buf)
		if err != nil {
			return nil, err
		}
		if _, err := w.Write(b); err != nil {
			return nil, err
		}
		if err := w.Close(); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("unknown compression %q", how)
	}
	return buf.Bytes(), nil
}

// DiffIDs are the digests of the uncompressed layers, bottom first.
func (im Image) DiffIDs() []string {
	var out []string
	for _, l := range im.Layers {
		out = append(out, digest(l))
	}
	return out
}
