package snapshotter

import (
	"testing"

	"github.com/plyfs/plyfs/layers"
)

func TestFilters(t *testing.T) {
	in := Info{Name: "sha256:abc", Parent: "sha256:def", Kind: Committed, Labels: map[string]string{
		"plain": "v", "containerd.io/gc.root": "2026", "empty,comma": `a"b`,
	}}
	for _, c := range []struct {
		text string
		want bool
	}{
		{"", true},
		{"kind==committed", true},
		{"kind==active", false},
		{"kind!=active", true},
		{"name==sha256:abc", true},
		{`name=="sha256:abc"`, true},
		{" name == sha256:abc , kind==committed", true},
		{"name==sha256:abc,kind==view", false},
		{"parent~=^sha256:d", true},
		{"parent~=/^sha256:[a-z]+$/", true},
		{"parent~=|c$|", false},
		{`parent~=/sha\/256/`, false},
		{`name~="\\w+:\\w"`, true},
		{"labels.plain", true},
		{"labels.nothing", false},
		{"labels.nothing!=v", true},
		{"labels.nothing==v", false},
		{`labels."containerd.io/gc.root"`, true},
		{`labels."containerd.io/gc.root"==2026`, true},
		{`labels.plain=="v",labels."empty,comma"=="a\"b"`, true},
		{"unknown==x", false},
		{"unknown!=x", true},
	} {
		match, err := parseFilters([]string{c.text})
		if err != nil {
			t.Errorf("%q: %v", c.text, err)
		} else if got := match(in); got != c.want {
			t.Errorf("%q: %v", c.text, got)
		}
	}
	for _, bad := range []string{"name=", "name==", "=x", "name==x,", "name=x", `"name`, "a b", "name==a b", "labels.", "name~=/(/", `name=="\q"`} {
		if _, err := parseFilters([]string{bad}); err == nil {
			t.Errorf("%q is taken for a filter", bad)
		} else {
			wantError(t, bad, layers.ErrInvalid, err)
		}
	}
	match, err := parseFilters([]string{"kind==view", "labels.plain"})
	if err != nil || !match(in) {
		t.Errorf("one of two: %v", err)
	}
	if match, err := parseFilters(nil); err != nil || !match(in) {
		t.Errorf("no filters: %v", err)
	}
}
