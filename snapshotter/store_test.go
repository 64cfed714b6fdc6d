package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/plyfs/plyfs/layers"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeUnions remembers what would be mounted.
type fakeUnions struct {
	mu      sync.Mutex
	mounted map[string]union // by target
	fail    error            // of the next calls
}

func (f *fakeUnions) mount(_ context.Context, u union) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return f.fail
	}
	f.mounted[u.target] = u
	return u.mkdirs()
}

func (f *fakeUnions) unmount(_ context.Context, u union, force bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil && !force {
		return f.fail
	}
	delete(f.mounted, u.target)
	return nil
}

// place is a root with the unions in it, which outlive a Store.
type place struct {
	t      *testing.T
	root   string
	unions *fakeUnions
	*Store
}

func newPlace(t *testing.T) *place {
	t.Helper()
	p := &place{t: t, root: filepath.Join(t.TempDir(), "root"), unions: &fakeUnions{mounted: map[string]union{}}}
	p.open()
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func (p *place) open() {
	p.t.Helper()
	s, err := open(p.root, zap.NewNop(), p.unions)
	if err != nil {
		p.t.Fatal(err)
	}
	p.Store = s
}

// again is what a new process finds.
func (p *place) again() {
	p.t.Helper()
	if err := p.Close(); err != nil {
		p.t.Fatal(err)
	}
	p.open()
}

func (p *place) prepare(name, parent string) []Mount {
	p.t.Helper()
	ms, err := p.Prepare(p.t.Context(), name, parent, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	return ms
}

// layer makes a committed snapshot.
func (p *place) layer(name, parent string) {
	p.t.Helper()
	p.prepare(name+"-active", parent)
	if err := p.Commit(p.t.Context(), name, name+"-active", "", nil); err != nil {
		p.t.Fatal(err)
	}
}

func (p *place) id(name string) string {
	p.t.Helper()
	r, _, err := p.find(name)
	if err != nil {
		p.t.Fatal(err)
	}
	return r.ID
}

// directories are the ids that have one.
func (p *place) directories() (ids []string) {
	p.t.Helper()
	entries, err := os.ReadDir(p.snapshots())
	if err != nil {
		p.t.Fatal(err)
	}
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return ids
}

func wantError(t *testing.T, what string, want, got error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: %v, want: %v", what, got, want)
	}
}

func bind(source, access string) []Mount {
	return []Mount{{Type: "bind", Source: source, Options: []string{"rbind", access}}}
}

func TestMountsByKind(t *testing.T) {
	p := newPlace(t)
	ctx := t.Context()
	check := func(what string, got []Mount, err error, want []Mount) {
		t.Helper()
		if d := cmp.Diff(want, got); d != "" || err != nil {
			t.Errorf("%s: %v (- expected, + found):\n%s", what, err, d)
		}
	}
	p.layer("one", "")
	p.layer("two", "one")
	if len(p.unions.mounted) != 0 {
		t.Errorf("unions of committed snapshots: %v", p.unions.mounted)
	}
	ms := p.prepare("first", "")
	check("active without parents", ms, nil, bind(p.fs(p.id("first")), "rw"))
	ms = p.prepare("top", "two")
	check("active", ms, nil, bind(p.mnt(p.id("top")), "rw"))
	u := p.unions.mounted[p.mnt(p.id("top"))]
	if want := []string{p.fs(p.id("two")), p.fs(p.id("one"))}; !slices.Equal(u.lowers, want) || u.upper != p.fs(p.id("top")) || u.work == "" {
		t.Errorf("union %+v, lowers want %v", u, want)
	}
	ms, err := p.View(ctx, "v0", "", nil)
	check("view without parents", ms, err, bind(p.fs(p.id("v0")), "ro"))
	ms, err = p.View(ctx, "v1", "one", nil)
	check("view of one", ms, err, bind(p.fs(p.id("one")), "ro"))
	ms, err = p.View(ctx, "v2", "two", nil)
	check("view of two", ms, err, bind(p.mnt(p.id("v2")), "ro"))
	if u := p.unions.mounted[p.mnt(p.id("v2"))]; u.upper != "" || len(u.lowers) != 2 {
		t.Errorf("union of a view: %+v", u)
	}
	ids := map[string]string{labelUIDs: "0:1000:1,1:2000:10", labelGIDs: "0:1000:65536"}
	ms, err = p.View(ctx, "v1-mapped", "one", ids)
	check("view with an id map", ms, err, bind(p.mnt(p.id("v1-mapped")), "ro"))
	if u := p.unions.mounted[p.mnt(p.id("v1-mapped"))]; len(u.owners.UIDs.Ranges) != 2 || len(u.owners.GIDs.Ranges) != 1 {
		t.Errorf("owners %+v", u.owners)
	}
	_, err = p.Prepare(ctx, "bad-map", "", map[string]string{labelUIDs: "0:1000"})
	wantError(t, "bad id map", layers.ErrInvalid, err)
	_, err = p.Mounts(ctx, "one")
	wantError(t, "mounts of a committed snapshot", layers.ErrInUse, err)
}

func TestTransitions(t *testing.T) {
	p := newPlace(t)
	ctx := t.Context()
	p.layer("base", "")
	p.prepare("work", "base")
	_, err := p.View(ctx, "view", "base", nil)
	wantError(t, "view", nil, err)
	prepare := func(name, parent string) error { _, err := p.Prepare(ctx, name, parent, nil); return err }
	for _, c := range []struct {
		what string
		want error
		got  error
	}{
		{"name in use", layers.ErrExists, prepare("work", "")},
		{"name of a committed one", layers.ErrExists, prepare("base", "")},
		{"no name", layers.ErrInvalid, prepare("", "")},
		{"no such parent", layers.ErrNotFound, prepare("x", "nobody")},
		{"active parent", layers.ErrInvalid, prepare("x", "work")},
		{"parent is a view", layers.ErrInvalid, prepare("x", "view")},
		{"commit to a name in use", layers.ErrExists, p.Commit(ctx, "base", "work", "", nil)},
		{"commit of nothing", layers.ErrNotFound, p.Commit(ctx, "x", "nobody", "", nil)},
		{"commit of a view", layers.ErrInUse, p.Commit(ctx, "x", "view", "", nil)},
		{"commit of a committed one", layers.ErrInUse, p.Commit(ctx, "x", "base", "", nil)},
		{"commit on another parent", layers.ErrInvalid, p.Commit(ctx, "x", "work", "other", nil)},
		{"remove with children", layers.ErrInUse, p.Remove(ctx, "base")},
		{"remove nothing", layers.ErrNotFound, p.Remove(ctx, "nobody")},
	} {
		wantError(t, c.what, c.want, c.got)
	}
	if n := len(p.directories()); n != 3 {
		t.Errorf("%d directories after refused calls, want 3", n)
	}
	if err := p.Commit(ctx, "next", "work", "base", map[string]string{"a": "b", "none": ""}); err != nil {
		t.Fatal(err)
	}
	_, err = p.Stat("work")
	wantError(t, "the old name", layers.ErrNotFound, err)
	in, err := p.Stat("next")
	if err != nil || in.Kind != Committed || in.Parent != "base" || !cmp.Equal(in.Labels, map[string]string{"a": "b"}) {
		t.Errorf("committed: %+v %v", in, err)
	}
	for _, name := range []string{"next", "view", "base"} {
		wantError(t, "remove "+name, nil, p.Remove(ctx, name))
	}
	wantError(t, "cleanup", nil, p.Cleanup(ctx))
	if d := p.directories(); len(d) != 0 || len(p.unions.mounted) != 0 {
		t.Errorf("left: %v %v", d, p.unions.mounted)
	}
}

func TestFailedMountsLeaveNothing(t *testing.T) {
	p := newPlace(t)
	ctx := t.Context()
	p.layer("base", "")
	p.unions.fail = errors.New("no mount")
	_, err := p.Prepare(ctx, "work", "base", nil)
	wantError(t, "prepare", p.unions.fail, err)
	_, err = p.Stat("work")
	wantError(t, "row", layers.ErrNotFound, err)
	wantError(t, "parent", nil, p.Remove(ctx, "base"))

	p.unions.fail = nil
	p.layer("base", "")
	p.prepare("work", "base")
	p.unions.fail = errors.New("busy")
	wantError(t, "commit", p.unions.fail, p.Commit(ctx, "done", "work", "", nil))
	if in, err := p.Stat("work"); err != nil || in.Kind != Active {
		t.Errorf("after a failed commit: %+v %v", in, err)
	}
	wantError(t, "remove by force", nil, p.Remove(ctx, "work"))
}

func TestRootOfParent(t *testing.T) {
	p := newPlace(t)
	p.prepare("a", "")
	fs := p.fs(p.id("a"))
	if st, err := os.Stat(fs); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("root of a first layer: %v %v", st.Mode(), err)
	}
	if err := os.Chmod(fs, 0o700|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	wantError(t, "commit", nil, p.Commit(t.Context(), "layer", "a", "", nil))
	p.prepare("b", "layer")
	if st, err := os.Stat(p.fs(p.id("b"))); err != nil || st.Mode() != os.ModeDir|os.ModeSticky|0o700 {
		t.Errorf("root with a parent: %v %v", st.Mode(), err)
	}
}

func TestLabels(t *testing.T) {
	p := newPlace(t)
	_, err := p.Prepare(t.Context(), "a", "", map[string]string{"one": "1", "two": "2"})
	wantError(t, "prepare", nil, err)
	for _, c := range []struct {
		fields []string
		given  map[string]string
		want   map[string]string
	}{
		{[]string{"labels.one"}, map[string]string{"one": "new", "two": "ignored"}, map[string]string{"one": "new", "two": "2"}},
		{[]string{"labels.two", "labels.x.y/z"}, map[string]string{"x.y/z": "3"}, map[string]string{"one": "new", "x.y/z": "3"}},
		{[]string{"labels"}, map[string]string{"only": "1"}, map[string]string{"only": "1"}},
		{nil, map[string]string{"all": "1"}, map[string]string{"all": "1"}},
	} {
		in, err := p.Update("a", c.given, c.fields)
		if d := cmp.Diff(c.want, in.Labels); d != "" || err != nil {
			t.Errorf("%v: %v (- expected, + found):\n%s", c.fields, err, d)
		}
		if kept, err := p.Stat("a"); err != nil || !cmp.Equal(kept, in) {
			t.Errorf("%v: %+v is kept, not %+v: %v", c.fields, kept, in, err)
		}
	}
	_, err = p.Update("a", nil, []string{"parent"})
	wantError(t, "parent", layers.ErrInvalid, err)
	_, err = p.Update("b", nil, nil)
	wantError(t, "no such snapshot", layers.ErrNotFound, err)
}

func TestUsage(t *testing.T) {
	p := newPlace(t)
	p.prepare("a", "")
	dir := p.fs(p.id("a"))
	before, err := p.Usage("a")
	if err != nil || before.Inodes != 1 {
		t.Errorf("empty: %+v %v", before, err)
	}
	if err := errors.Join(os.WriteFile(dir+"/f", make([]byte, 100_000), 0o644), os.Link(dir+"/f", dir+"/g"), os.Symlink("f", dir+"/s")); err != nil {
		t.Fatal(err)
	}
	wantError(t, "commit", nil, p.Commit(t.Context(), "layer", "a", "", nil))
	u, err := p.Usage("layer")
	if grown := u.Size - before.Size; err != nil || u.Inodes != 3 || grown < 100_000 || grown > 130_000 {
		t.Errorf("with a file of two names: %+v, before %+v, %v", u, before, err)
	}
}

// TestParallel: of many that want one name, one gets it; others do not wait for each other.
func TestParallel(t *testing.T) {
	p := newPlace(t)
	p.layer("base", "")
	var all sync.WaitGroup
	var mu sync.Mutex
	got := 0
	for i := range 16 {
		all.Go(func() {
			_, err := p.Prepare(t.Context(), "same", "base", nil)
			if mu.Lock(); err == nil {
				got++
			}
			mu.Unlock()
			name := fmt.Sprintf("own%d", i)
			if _, err := p.Prepare(t.Context(), name, "base", nil); err != nil {
				t.Error(err)
			}
			if err := errors.Join(p.tidy(), p.Commit(t.Context(), name+"-done", name, "", nil)); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := len(p.directories()); got != 1 || n != 18 {
		t.Errorf("%d calls got the name, %d directories", got, n)
	}
}

func TestLockEndsWithContext(t *testing.T) {
	var l locks
	release, err := l.take(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	_, err = l.take(ctx, "a")
	wantError(t, "taken", context.DeadlineExceeded, err)
	release()
	release, err = l.take(t.Context(), "a")
	wantError(t, "free again", nil, err)
	if release(); len(l.held) != 0 {
		t.Errorf("locks are left: %v", l.held)
	}
}
