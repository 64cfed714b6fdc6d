package trace

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestExactBytes: names of any bytes come out of JSON as they went in; what is valid UTF-8 is
// plain text.
func TestExactBytes(t *testing.T) {
	when := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	for _, name := range []string{"/plain", "/caf\xe9", "/\xff\n\"\\", "/日本\x00<&>", "/\ufffd"} {
		in := []any{
			&Event{Time: when, Op: "setxattr", Command: name, Path: name, To: name, Detail: name, Layer: "lower:1", Error: "EIO", Size: 7},
			&Copied{Time: when, Path: name, Op: "open", Detail: name, Command: name, From: "lower:1", Dirs: 2},
			&Filter{Path: name, Commands: []string{"sh", name}, Ops: []string{"open"}, Slower: time.Second},
		}
		out := []any{new(Event), new(Copied), new(Filter)}
		for i := range in {
			b, err := json.Marshal(in[i])
			if err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(b, out[i]); err != nil {
				t.Fatalf("%s: %v", b, err)
			}
			if d := cmp.Diff(in[i], out[i]); d != "" {
				t.Errorf("%s:\n%s", b, d)
			}
			if exact := strings.Contains(string(b), "pathB64"); exact == valid(name) {
				t.Errorf("%q: %s", name, b)
			}
		}
	}
	var e Event
	for _, bad := range []string{`{"path":{"pathB64":"?"}}`, `{"path":7}`, `[]`, `{"path":["a"]}`} {
		if err := json.Unmarshal([]byte(bad), &e); err == nil {
			t.Errorf("%s was taken", bad)
		}
	}
}

func BenchmarkEventJSON(b *testing.B) {
	e := Event{Time: time.Now(), Op: "lookup", Path: "/usr/lib/x86_64-linux-gnu/libc.so.6", Command: "python3", Pid: 4711, Thread: 4711, Layer: "lower:1"}
	for b.Loop() {
		if _, err := json.Marshal(&e); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEventJSONBack(b *testing.B) {
	j, _ := json.Marshal(Event{Time: time.Now(), Op: "lookup", Path: "/usr/lib/x86_64-linux-gnu/libc.so.6", Command: "python3", Pid: 4711, Layer: "lower:1"})
	for b.Loop() {
		var e Event
		if err := json.Unmarshal(j, &e); err != nil {
			b.Fatal(err)
		}
	}
}
