package mountd

import (
	"encoding/json"

	"github.com/plyfs/plyfs/layers"
)

// Path is a path of any bytes, see [layers.Path]. Members of this type of a [Change]
// are flattened, see its MarshalJSON.
type Path = layers.Path

type changeObject struct {
	Kind string `json:"kind"`
	layers.PathObject
	ChangeDetail
}

// MarshalJSON writes {"kind", "path"} and "pathB64" only where path is not
// valid UTF-8.
func (c Change) MarshalJSON() ([]byte, error) {
	return json.Marshal(changeObject{Kind: c.Kind, PathObject: c.Path.Object(), ChangeDetail: c.ChangeDetail})
}

// UnmarshalJSON is the inverse of MarshalJSON.
func (c *Change) UnmarshalJSON(b []byte) (err error) {
	var o changeObject
	if err := json.Unmarshal(b, &o); err != nil {
		return err
	}
	c.Kind, c.ChangeDetail = o.Kind, o.ChangeDetail
	c.Path, err = o.PathObject.Exact()
	return err
}
