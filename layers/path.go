package layers

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
type Path string

// PathObject is what a path that is not valid UTF-8 is as JSON, and what objects embed
// that have a path among other members.
type PathObject struct {
	Path    string `json:"path"`
	PathB64 string `json:"pathB64,omitempty"`
}

// Object is p with its exact bytes, where it is not valid UTF-8.
func (p Path) Object() PathObject {
	o := PathObject{Path: string(p)}
	if !utf8.ValidString(o.Path) {
		o.PathB64 = base64.StdEncoding.EncodeToString([]byte(p))
	}
	return o
}

// Exact is the inverse of [Path.Object].
func (o PathObject) Exact() (Path, error) {
	if o.PathB64 == "" {
		return Path(o.Path), nil
	}
	raw, err := base64.StdEncoding.DecodeString(o.PathB64)
	return Path(raw), err
}

// MarshalJSON implements json.Marshaler.
func (p Path) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(p)) {
		return json.Marshal(string(p))
	}
	return json.Marshal(p.Object())
}

// UnmarshalJSON accepts both forms.
func (p *Path) UnmarshalJSON(b []byte) (err error) {
	if len(b) > 0 && b[0] == '"' {
		return json.Unmarshal(b, (*string)(p))
	}
	var o PathObject
	if err := json.Unmarshal(b, &o); err != nil {
		return err
	}
	*p, err = o.Exact()
	return err
}
