package trace

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"unicode/utf8"
)

// Text is a path, or another text, of any bytes. As JSON it is a string if it is valid UTF-8,
// else an object with a readable and an exact form, as everywhere in plyfs.
type Text string

type textObject struct {
	Path    string `json:"path"`
	PathB64 string `json:"pathB64"`
}

// MarshalJSON implements json.Marshaler.
func (t Text) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(t)) {
		return encode(string(t))
	}
	return encode(textObject{Path: string(t), PathB64: base64.StdEncoding.EncodeToString([]byte(t))})
}

// UnmarshalJSON accepts both forms.
func (t *Text) UnmarshalJSON(b []byte) error {
	if len(b) == 0 || b[0] != '{' {
		return json.Unmarshal(b, (*string)(t))
	}
	var o textObject
	if err := json.Unmarshal(b, &o); err != nil {
		return err
	}
	raw, err := base64.StdEncoding.DecodeString(o.PathB64)
	*t = Text(raw)
	return err
}

// The types below have no methods; the members named here take the place of those with the
// same names in them. What is valid UTF-8 throughout, as nearly all is, goes without.

type plainEvent Event

type exactEvent struct {
	plainEvent

	Command Text `json:"command,omitempty"`
	Path    Text `json:"path,omitempty"`
	To      Text `json:"to,omitempty"`
	Detail  Text `json:"detail,omitempty"`
}

// MarshalJSON keeps each byte of what is not valid UTF-8.
func (e Event) MarshalJSON() ([]byte, error) {
	if valid(e.Command, e.Path, e.To, e.Detail) {
		return encode(plainEvent(e))
	}
	return encode(exactEvent{plainEvent(e), Text(e.Command), Text(e.Path), Text(e.To), Text(e.Detail)})
}

// UnmarshalJSON is the inverse of MarshalJSON.
func (e *Event) UnmarshalJSON(b []byte) error {
	var x exactEvent
	if err := json.Unmarshal(b, &x); err != nil {
		return err
	}
	*e = Event(x.plainEvent)
	e.Command, e.Path, e.To, e.Detail = string(x.Command), string(x.Path), string(x.To), string(x.Detail)
	return nil
}

type plainCopied Copied

type exactCopied struct {
	plainCopied

	Path    Text `json:"path"`
	Detail  Text `json:"detail,omitempty"`
	Command Text `json:"command,omitempty"`
}

// MarshalJSON keeps each byte of what is not valid UTF-8.
func (c Copied) MarshalJSON() ([]byte, error) {
	if valid(c.Path, c.Detail, c.Command) {
		return encode(plainCopied(c))
	}
	return encode(exactCopied{plainCopied(c), Text(c.Path), Text(c.Detail), Text(c.Command)})
}

// UnmarshalJSON is the inverse of MarshalJSON.
func (c *Copied) UnmarshalJSON(b []byte) error {
	var x exactCopied
	if err := json.Unmarshal(b, &x); err != nil {
		return err
	}
	*c = Copied(x.plainCopied)
	c.Path, c.Detail, c.Command = string(x.Path), string(x.Detail), string(x.Command)
	return nil
}

type plainFilter Filter

type exactFilter struct {
	plainFilter

	Path     Text   `json:"path,omitempty"`
	Commands []Text `json:"commands,omitempty"`
}

// MarshalJSON keeps each byte of what is not valid UTF-8.
func (f Filter) MarshalJSON() ([]byte, error) {
	x := exactFilter{plainFilter: plainFilter(f), Path: Text(f.Path)}
	for _, c := range f.Commands {
		x.Commands = append(x.Commands, Text(c))
	}
	return encode(x)
}

// UnmarshalJSON is the inverse of MarshalJSON.
func (f *Filter) UnmarshalJSON(b []byte) error {
	var x exactFilter
	if err := json.Unmarshal(b, &x); err != nil {
		return err
	}
	*f = Filter(x.plainFilter)
	f.Path = string(x.Path)
	for _, c := range x.Commands {
		f.Commands = append(f.Commands, string(c))
	}
	return nil
}

// encode leaves "<" and the like as they are: whoever wants them escaped does it to the whole.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return b.Bytes(), err
}

func valid(all ...string) bool {
	for _, s := range all {
		if !utf8.ValidString(s) {
			return false
		}
	}
	return true
}
