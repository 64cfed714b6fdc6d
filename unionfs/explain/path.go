package explain

import (
	"encoding/base64"
	"encoding/json"
	"unicode/utf8"
)

// Path is a path, or another text, of any bytes. As JSON it is a string if it is valid
// UTF-8, else an object with a readable and an exact form, as everywhere in plyfs.
type Path string

type pathObject struct {
	Path    string `json:"path"`
	PathB64 string `json:"pathB64"`
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
	raw, err := base64.StdEncoding.DecodeString(o.PathB64)
	*p = Path(raw)
	return err
}
