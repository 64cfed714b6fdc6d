package mountd

import (
	"encoding/base64"
	"encoding/json"
	"unicode/utf8"
)

// Path is a path of any bytes. As JSON it is a string if it is valid UTF-8,
// else an object with both a readable and an exact form:
//
//	"/etc/hosts"
//	{"path": "/tmp/\ufffd", "pathB64": "L3RtcC//"}
//
// Members of type Path of a [Change] are flattened, see its MarshalJSON.
type Path string

type pathObject struct {
	Path    string `json:"path"`
	PathB64 string `json:"pathB64,omitempty"`
}

// MarshalJSON implements json.Marshaler.
func (p Path) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(p)) {
		return json.Marshal(string(p))
	}
	return json.Marshal(pathObject{Path: string(p), PathB64: base64.StdEncoding.EncodeToString([]byte(p))})
}

// UnmarshalJSON accepts both forms.
func (p *Path) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '"' {
		return json.Unmarshal(b, (*string)(p))
	}
	var o pathObject
	if err := json.Unmarshal(b, &o); err != nil {
		return err
	}
	return p.fromObject(o)
}

func (p *Path) fromObject(o pathObject) error {
	if o.PathB64 == "" {
		*p = Path(o.Path)
		return nil
	}
	raw, err := base64.StdEncoding.DecodeString(o.PathB64)
	if err != nil {
		return err
	}
	*p = Path(raw)
	return nil
}

type changeObject struct {
	Kind string `json:"kind"`
	pathObject
}

// MarshalJSON writes {"kind", "path"} and "pathB64" only where path is not
// valid UTF-8.
func (c Change) MarshalJSON() ([]byte, error) {
	o := changeObject{Kind: c.Kind, pathObject: pathObject{Path: string(c.Path)}}
	if !utf8.ValidString(o.Path) {
		o.PathB64 = base64.StdEncoding.EncodeToString([]byte(c.Path))
	}
	return json.Marshal(o)
}

// UnmarshalJSON is the inverse of MarshalJSON.
func (c *Change) UnmarshalJSON(b []byte) error {
	var o changeObject
	if err := json.Unmarshal(b, &o); err != nil {
		return err
	}
	c.Kind = o.Kind
	return c.Path.fromObject(o.pathObject)
}
