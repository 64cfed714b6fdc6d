package layers

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/plyfs/plyfs/metadata"
)

// What an image config has in common with the image JSON of Docker before 1.10.
var v1Keys = []string{"architecture", "author", "comment", "config", "container", "container_config", "created", "docker_version", "os", "variant"}

// oldID names a layer in an archive that Docker before 1.10 can read: there a
// layer is an image, whose name is the digest of its JSON, layer and parent
// (github.com/moby/moby, image/v1/imagev1.go, CreateID).
func oldID(image map[string]json.RawMessage, chain digest.Digest, parent string) (string, error) {
	with := map[string]any{"layer_id": chain}
	for k, v := range image {
		with[k] = v
	}
	if parent != "" {
		with["parent"] = digest.NewDigestFromEncoded(digest.SHA256, parent)
	}
	raw, err := json.Marshal(with) // keys in order
	return digest.FromBytes(raw).Encoded(), err
}

// describeOld makes the files of an archive as Docker 1.10 to 24 wrote it, and
// says under which names the layers go: a directory for each layer, with a JSON
// that makes it an image. Only the topmost is one that somebody has made.
func describeOld(images []*saved) ([]namedFile, error) {
	a := archiveIndex{has: map[string]bool{}}
	for _, img := range images {
		var config map[string]json.RawMessage
		if err := json.Unmarshal(img.config, &config); err != nil {
			return nil, fmt.Errorf("image %s: config: %w: %w", img.id, ErrCorrupt, err)
		}
		var chain digest.Digest
		parent := ""
		for i := range img.layers {
			l := &img.layers[i]
			created, err := json.Marshal(time.Unix(0, 0).UTC())
			if err != nil {
				return nil, err
			}
			image := map[string]json.RawMessage{"created": created}
			if i == len(img.layers)-1 {
				for _, k := range v1Keys {
					if v, ok := config[k]; ok {
						image[k] = v
					}
				}
			}
			chain = metadata.ChainID(chain, l.diffID)
			id, err := oldID(image, chain, parent)
			if err != nil {
				return nil, err
			}
			image["id"] = json.RawMessage(`"` + id + `"`)
			if parent != "" {
				image["parent"] = json.RawMessage(`"` + parent + `"`)
			}
			if image["os"] = config["os"]; image["os"] == nil {
				image["os"] = json.RawMessage(`"linux"`)
			}
			raw, err := json.Marshal(image)
			if err != nil {
				return nil, err
			}
			l.dir = id
			a.once(namedFile{id + "/VERSION", []byte("1.0")})
			a.once(namedFile{id + "/json", raw})
			parent = id
		}
		a.once(namedFile{img.id.Encoded() + ".json", img.config})
	}
	if err := a.docker(images); err != nil {
		return nil, err
	}
	return a.files, nil
}
