package oracle

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
)

// Name is a path or file name: any bytes. In JSON and in text it is written
// as the inside of a Go string literal, so that every byte survives.
type Name string

// String quotes what is not plain ASCII.
func (n Name) String() string {
	q := strconv.QuoteToASCII(string(n))
	return nameEscapes.Replace(q[1 : len(q)-1])
}

// nameEscapes makes a name one word of the text form.
var nameEscapes = strings.NewReplacer(" ", `\x20`, `\"`, `\x22`, "=", `\x3d`)

// MarshalJSON implements json.Marshaler.
func (n Name) MarshalJSON() ([]byte, error) { return json.Marshal(n.String()) }

// UnmarshalJSON implements json.Unmarshaler.
func (n *Name) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("name: %w", err)
	}
	u, err := unquoteName(s)
	*n = u
	return err
}

func unquoteName(s string) (Name, error) {
	u, err := strconv.Unquote(`"` + s + `"`)
	if err != nil {
		return "", fmt.Errorf("name %q: %w", s, err)
	}
	return Name(u), nil
}
