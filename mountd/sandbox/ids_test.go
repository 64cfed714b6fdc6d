package sandbox

import (
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestParseSubIDs(t *testing.T) {
	const own = 1000
	for name, c := range map[string]struct {
		text string
		want []idRange
		err  string
	}{
		"by name":       {text: "other:1:2\nuser:100000:65536\n", want: []idRange{{100000, 65536}}},
		"by number":     {text: "1000:100000:65536\n", want: []idRange{{100000, 65536}}},
		"both":          {text: "user:100000:5\n1000:200000:6\n", want: []idRange{{100000, 5}, {200000, 6}}},
		"blanks":        {text: "  user:100000:5 \n\n", want: []idRange{{100000, 5}}},
		"other forms":   {text: "user\nuser:1\nuser:a:b\nuser:5:0\nuser:5:-1\nuser:9999999999:1\n:5:5\nuser:100000:5:6\nuser:7:1\n", want: []idRange{{7, 1}}},
		"nobody":        {text: "users:100000:65536\n10000:1:1\n", err: "no ids for user or 1000"},
		"empty":         {text: "", err: "no ids"},
		"root":          {text: "user:0:5\n", err: "contains root"},
		"own id":        {text: "user:990:20\n", err: "own id"},
		"own id, first": {text: "user:1000:1\n", err: "own id"},
		"overlap":       {text: "user:100000:10\nuser:100009:10\n", err: "overlap"},
		"overlap, back": {text: "user:100009:10\nuser:100000:10\n", err: "overlap"},
		"the last id":   {text: "user:4294967295:1\n", err: "last id"},
		"beyond":        {text: "user:4294967290:10\n", err: "last id"},
		"up to it":      {text: "user:4294967290:5\n", want: []idRange{{4294967290, 5}}},
		"very many":     {text: manyRanges(maxRanges + 1), err: "more than"},
	} {
		got, err := parseSubIDs([]byte(c.text), "user", own, own)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: error %v, want %q", name, err, c.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if d := cmp.Diff(c.want, got, cmp.AllowUnexported(idRange{})); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

func manyRanges(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "user:%d:1\n", 100000+i)
	}
	return b.String()
}

func TestMappings(t *testing.T) {
	got := mappings(1000, []idRange{{100000, 10}, {200000, 5}})
	want := []specs.LinuxIDMapping{
		{ContainerID: 0, HostID: 1000, Size: 1},
		{ContainerID: 1, HostID: 100000, Size: 10},
		{ContainerID: 11, HostID: 200000, Size: 5},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if text := mapText(got); text != "0 1000 1\n1 100000 10\n11 200000 5\n" {
		t.Errorf("text %q", text)
	}
	// Two ranges of half of all ids: the ids inside end first.
	var end uint64
	for _, m := range mappings(5, []idRange{{10, math.MaxUint32 / 2}, {math.MaxUint32/2 + 100, math.MaxUint32/2 - 200}, {6, 2}}) {
		if uint64(m.ContainerID) != end {
			t.Errorf("%+v does not follow %d", m, end)
		}
		end += uint64(m.Size)
	}
	if end > math.MaxUint32 {
		t.Errorf("%d ids inside", end)
	}
}
