package containerdsuite

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/containerd/v2/pkg/testutil"
)

// TestFilters: plyfs and containerd's own parser choose the same snapshots, and refuse the
// same texts.
func TestFilters(t *testing.T) {
	testutil.RequiresRoot(t)
	bin := os.Getenv(binaryEnv)
	if bin == "" {
		t.Skipf("%s does not say which plyfs to test", binaryEnv)
	}
	ctx := t.Context()
	s, stop, err := start(ctx, bin, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}()
	labels := snapshots.WithLabels(map[string]string{"plain": "value", "containerd.io/gc.root": "2026-01-01", "a,b": `q"q`})
	if _, err := s.Prepare(ctx, "one-active", "", labels); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(ctx, "sha256:one", "one-active", labels); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prepare(ctx, "two", "sha256:one", snapshots.WithLabels(map[string]string{"plain": "other"})); err != nil {
		t.Fatal(err)
	}
	if _, err := s.View(ctx, "three", "sha256:one"); err != nil {
		t.Fatal(err)
	}
	var all []snapshots.Info
	if err := s.Walk(ctx, func(_ context.Context, in snapshots.Info) error { all = append(all, in); return nil }); err != nil || len(all) != 3 {
		t.Fatalf("%v %v", all, err)
	}
	for _, texts := range [][]string{
		{""},
		{"kind==active"},
		{"kind!=active"},
		{"kind==active", "kind==view"},
		{"name==sha256:one"},
		{`name=="sha256:one"`, `name~=/^t/`},
		{"name~=^t,kind==view"},
		{"name ~= |o|,parent"},
		{"parent==sha256:one"},
		{"parent!=sha256:one"},
		{`parent~="^sha\\d+:"`},
		{"labels.plain"},
		{"labels.plain==value"},
		{"labels.plain!=value"},
		{"labels.plain~=^(value|x)$"},
		{`labels."containerd.io/gc.root"`},
		{`labels."containerd.io/gc.root"==2026-01-01,kind==committed`},
		{`labels."a,b"=="q\"q"`},
		{"unknown"},
		{"unknown==x"},
		{"unknown!=x"},
		// Nobody understands these.
		{"name="},
		{"name=="},
		{"name==a b"},
		{"name=x"},
		{"name==x,"},
		{"==x"},
		{`name=="x`},
		{`name=="\q"`},
		{"labels."},
		{"kind==view", "name=x"},
	} {
		what := strings.Join(texts, " or ")
		theirs, terr := filters.ParseAll(texts...)
		var want, got []string
		if terr == nil {
			for _, in := range all {
				if theirs.Match(adapt(in)) {
					want = append(want, in.Name)
				}
			}
		}
		err := s.Walk(ctx, func(_ context.Context, in snapshots.Info) error { got = append(got, in.Name); return nil }, texts...)
		if (err != nil) != (terr != nil) || !slices.Equal(got, want) {
			t.Errorf("%s: plyfs says %v %v, containerd %v %v", what, got, err, want, terr)
		}
	}
}

// adapt is how containerd's snapshotters show a snapshot to filters.
func adapt(in snapshots.Info) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		switch path[0] {
		case "kind":
			return strings.ToLower(in.Kind.String()), true
		case "name":
			return in.Name, true
		case "parent":
			return in.Parent, true
		case "labels":
			v, ok := in.Labels[strings.Join(path[1:], ".")]
			return v, ok
		}
		return "", false
	})
}
