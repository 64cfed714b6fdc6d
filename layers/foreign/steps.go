package foreign

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// stepDocument is what has to be known of the JSON of an image from before content
// digests.
type stepDocument struct {
	ID              string    `json:"id"`
	Parent          string    `json:"parent"`
	ParentID        string    `json:"parent_id"` // Docker 1.9
	Comment         string    `json:"comment"`
	Created         time.Time `json:"created"`
	Author          string    `json:"author"`
	ContainerConfig struct {
		Cmd words `json:"Cmd"`
	} `json:"container_config"`
}

// words is a list of strings, or one string.
type words []string

// UnmarshalJSON implements json.Unmarshaler.
func (w *words) UnmarshalJSON(b []byte) error {
	if json.Unmarshal(b, (*[]string)(w)) == nil { // null, too
		return nil
	}
	var one string
	err := json.Unmarshal(b, &one)
	*w = words{one}
	return err
}

// step is one entry of the history of a config, with the field order of Docker.
type step struct {
	Created    time.Time `json:"created"`
	Author     string    `json:"author,omitempty"`
	CreatedBy  string    `json:"created_by,omitempty"`
	Comment    string    `json:"comment,omitempty"`
	EmptyLayer bool      `json:"empty_layer,omitempty"`
}

// ConfigFromSteps makes the config of an image from before content digests, given
// its documents and the diffIDs of its layers, base first. The rules are those of
// Docker's migration to 1.10: the document of the image without what is its place in
// the graph, the history from the documents, the layers; keys in order.
func ConfigFromSteps(steps []json.RawMessage, diffIDs []digest.Digest, depth int) ([]byte, error) {
	if len(steps) == 0 || len(steps) != len(diffIDs) {
		return nil, fmt.Errorf("%w: %d documents for %d layers", ErrDamaged, len(steps), len(diffIDs))
	}
	history := make([]step, 0, len(steps))
	for i, raw := range steps {
		var d stepDocument
		if err := decodeJSON(raw, depth, &d); err != nil {
			return nil, fmt.Errorf("document %d: %w", i+1, err)
		}
		history = append(history, step{Created: d.Created, Author: d.Author, CreatedBy: strings.Join(d.ContainerConfig.Cmd, " "), Comment: d.Comment})
	}
	last, err := renewed(steps[len(steps)-1])
	if err != nil {
		return nil, fmt.Errorf("%w: document %d: %w", ErrDamaged, len(steps), err)
	}
	var config map[string]json.RawMessage
	if err := decodeJSON(last, depth, &config); err != nil {
		return nil, err
	}
	for _, key := range []string{"id", "parent", "Size", "parent_id", "layer_id", "throwaway"} {
		delete(config, key)
	}
	if config == nil {
		return nil, fmt.Errorf("%w: the document of an image is no object", ErrDamaged)
	}
	ids, err := json.Marshal(diffIDs)
	if err != nil {
		return nil, err
	}
	config["rootfs"] = fmt.Appendf(nil, `{"type":"layers","diff_ids":%s}`, ids)
	if config["history"], err = json.Marshal(history); err != nil {
		return nil, err
	}
	return json.Marshal(config)
}
