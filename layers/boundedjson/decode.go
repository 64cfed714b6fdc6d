package boundedjson

import (
	"encoding/json"
	"errors"
	"fmt"
)

// ErrDepth says that a document is nested deeper than it may be.
var ErrDepth = errors.New("JSON is nested deeper than it may be")

type depthError int

func (d depthError) Error() string {
	return fmt.Sprintf("JSON is nested deeper than %d levels", int(d))
}

func (d depthError) Is(err error) bool { return err == ErrDepth }

// Decode decodes one value of at most depth levels, and nothing after it.
func Decode(raw []byte, depth int, v any) error {
	level := 0
	inString, escaped := false, false
	for _, c := range raw {
		switch {
		case escaped:
			escaped = false
		case inString:
			escaped = c == '\\'
			inString = c != '"'
		case c == '"':
			inString = true
		case c == '{' || c == '[':
			if level++; level > depth {
				return depthError(depth)
			}
		case c == '}' || c == ']':
			level--
		}
	}
	return json.Unmarshal(raw, v)
}
