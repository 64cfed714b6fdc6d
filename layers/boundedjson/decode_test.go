package boundedjson

import (
	"errors"
	"strings"
	"testing"
)

func TestDecode(t *testing.T) {
	for _, c := range []struct {
		raw  string
		ok   bool
		deep bool
	}{
		{`{"a": [1, {"b": "]}[{\"["}]}`, true, false},
		{`[[[[]]]]`, false, true},
		{`[[[]]]`, true, false},
		{strings.Repeat(`[`, 1<<20), false, true},
		{`{} {}`, false, false},
		{`"`, false, false},
	} {
		var v any
		err := Decode([]byte(c.raw), 3, &v)
		if (err == nil) != c.ok || errors.Is(err, ErrDepth) != c.deep {
			t.Errorf("%.40s: %v", c.raw, err)
		}
	}
}
