package layers

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/whiteout"
)

func create(t testing.TB, s *Store, image, name string) *Container {
	t.Helper()
	c, err := s.CreateContainer(t.Context(), image, name)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func TestInitLayer(t *testing.T) {
	needRoot(t)
	s := openStore(t)
	l := layerTar(t, ent{name: "./", typ: tar.TypeDir, mode: 0o711, gid: 9}, ent{name: "etc/", typ: tar.TypeDir, mode: 0o750}, file("etc/hosts", "mine"),
		sym("dev", "/real/dev"), ent{name: "real/dev/", typ: tar.TypeDir, mode: 0o700}, sym("proc", "../../../../outside"), file("sys", "a file"))
	load(t, s, outerTar(t, oldDocker(t, img{refs: []string{"a"}, layers: [][]byte{l}})))
	create(t, s, "a", "one")
	st := upperOf(t, s, "one")
	want := `"." 711 dir owner 0:9
".dockerenv" 755 file "" links 1
"etc" 750 dir
"etc/hostname" 755 file "" links 1
"etc/mtab" 777 symlink "/proc/mounts"
"etc/resolv.conf" 755 file "" links 1
"real" 755 dir
"real/dev" 700 dir
"real/dev/console" 755 file "" links 1
"real/dev/pts" 755 dir
"real/dev/shm" 755 dir
`
	if d := cmp.Diff(want, dump(t, st.Lowers[0].Path)); d != "" {
		t.Error(d)
	}
	if got := dump(t, st.Upper); got != "\".\" 711 dir owner 0:9\n" {
		t.Errorf("upper: %s", got)
	}
	if fi, err := os.Stat(st.Upper); err != nil || !fi.ModTime().Equal(epoch) {
		t.Errorf("upper's time: %v %v", fi.ModTime(), err)
	}
	before := len(listLayers(t, s))
	create(t, s, "a", "two")
	if n := len(listLayers(t, s)); n != before {
		t.Errorf("the second container made %d layer directories", n-before)
	}
	clean(t, s)
}

func TestContainerNames(t *testing.T) {
	s := openStore(t)
	load(t, s, outerTar(t, oldDocker(t, img{refs: []string{"a"}, layers: [][]byte{layerTar(t, dir("d"))}}, img{refs: []string{"scratch"}})))
	c := create(t, s, "a", "")
	if c.Name == "" || c.State != StateReady {
		t.Errorf("%+v", c)
	}
	create(t, s, "scratch", "none")
	for _, id := range []string{c.Name, c.ID, c.ID[:12]} {
		if got, err := s.Container(t.Context(), id); err != nil || got.ID != c.ID {
			t.Errorf("%s: %v %v", id, got, err)
		}
	}
	for name, want := range map[string]error{c.Name: ErrExists, "../x": ErrInvalid, "-x": ErrInvalid} {
		if _, err := s.CreateContainer(t.Context(), "a", name); !errors.Is(err, want) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := s.CreateContainer(t.Context(), "nothere", "x"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	clean(t, s)
	for _, n := range []string{c.Name, "none"} {
		must(t, s.RemoveContainer(t.Context(), n))
	}
	if err := s.RemoveContainer(t.Context(), "none"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	names, err := os.ReadDir(filepath.Join(s.root, rwName))
	if err != nil || len(names) > 0 {
		t.Error(names, err)
	}
	clean(t, s)
	if n := len(listLayers(t, s)); n != 1 {
		t.Errorf("%d layer directories, expected the image's", n)
	}
}

// changeUpper does to an upper what a union file system would.
func changeUpper(t testing.TB, st Stack) {
	t.Helper()
	u := func(p string) string { return filepath.Join(st.Upper, p) }
	opaque := func(p string) {
		fd, err := unix.Open(u(p), unix.O_PATH, 0)
		must(t, err, st.Dialect.SetOpaque(fd), unix.Close(fd))
	}
	fd, err := unix.Open(st.Upper, unix.O_PATH, 0)
	must(t, err)
	must(t, os.Mkdir(u("d"), 0o755), os.WriteFile(u("d/f"), []byte("changed"), 0o600), os.WriteFile(u("d/new"), []byte("n"), 0o644),
		os.Link(u("d/new"), u("d/newer")), os.Symlink("new", u("d/link")),
		os.Mkdir(u("hidden"), 0o700), os.WriteFile(u("hidden/only"), []byte("o"), 0o644), whiteout.CreateDevice(fd, "gone"), unix.Close(fd))
	opaque("hidden")
	must(t, unix.Setxattr(u("d"), st.Dialect.Attr("origin"), []byte("x"), 0), unix.Setxattr(u("d"), st.Dialect.Attr("impure"), []byte("y"), 0),
		unix.Setxattr(u("d/f"), "user.kept", []byte("1"), 0))
	must(t, unix.Setxattr(u("d/f"), st.Dialect.ToDisk(st.Dialect.Attr("opaque")), []byte("y"), 0))
}

func baseImage(t testing.TB, s *Store) {
	t.Helper()
	load(t, s, outerTar(t, oldDocker(t, img{refs: []string{"base"}, layers: [][]byte{
		layerTar(t, dir("."), dir("d"), file("d/f", "1"), file("d/g", "2"), file("gone", "3"), dir("hidden"), file("hidden/a", "4")),
	}, config: func(i *ocispec.Image) { i.Config.Env = []string{"A=1"} }})))
}

func TestDiff(t *testing.T) {
	s := openStore(t)
	baseImage(t, s)
	create(t, s, "base", "c")
	if got, err := s.Diff(t.Context(), "c"); err != nil || len(got) != 0 {
		t.Fatal(got, err)
	}
	changeUpper(t, upperOf(t, s, "c"))
	got, err := s.Diff(t.Context(), "c")
	must(t, err)
	want := []Change{
		{"C", "/d"},
		{"C", "/d/f"},
		{"A", "/d/link"},
		{"A", "/d/new"},
		{"A", "/d/newer"},
		{"D", "/gone"},
		{"C", "/hidden"},
		{"D", "/hidden/a"},
		{"A", "/hidden/only"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	detailed, err := s.DiffContainer(t.Context(), "c", true)
	must(t, err)
	var why []string
	for _, c := range detailed {
		why = append(why, fmt.Sprint(c.Kind, " ", c.Path, " ", c.Type, " ", c.OldSize, " ", c.Size, " ", c.Why, " ", c.LinkTo))
	}
	if d := cmp.Diff([]string{
		"C /d directory 0 0 [] ",
		"C /d/f file 1 7 [mode size content xattr time] ",
		"A /d/link symlink 0 0 [] ",
		"A /d/new file 0 1 [] ",
		"A /d/newer file 0 1 [] /d/new",
		"D /gone file 1 0 [] ",
		"C /hidden directory 0 0 [mode] ",
		"D /hidden/a file 1 0 [] ",
		"A /hidden/only file 0 1 [] ",
	}, why); d != "" {
		t.Error(d)
	}
	_, err = s.Commit(t.Context(), "c", "next", CommitOptions{})
	must(t, err)
	got = imageChanges(t, s, "base", "next")
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestCommit(t *testing.T) {
	s := openStore(t)
	baseImage(t, s)
	create(t, s, "base", "c")
	// Nothing changed: a step, but no layer.
	same, err := s.Commit(t.Context(), "c", "same", CommitOptions{Message: "m", Author: "me"})
	must(t, err)
	if n := len(same.Config.History); len(same.DiffIDs) != 1 || n != 2 || !same.Config.History[n-1].EmptyLayer {
		t.Errorf("%+v", same)
	}
	st := upperOf(t, s, "c")
	changeUpper(t, st)
	img1, err := s.Commit(t.Context(), "c", "next:1", CommitOptions{Changes: []string{`CMD ["/bin/x"]`, "ENV A=2 B=\"x y\"", "LABEL k=v", "EXPOSE 80", "WORKDIR /d"}})
	must(t, err)
	img2, err := s.Commit(t.Context(), "c", "next:2", CommitOptions{})
	must(t, err)
	if img1.DiffIDs[1] != img2.DiffIDs[1] {
		t.Error("two commits of one upper differ")
	}
	cfg := img1.Config.Config
	if d := cmp.Diff([]any{[]string{"/bin/x"}, []string{"A=2", "B=x y"}, map[string]string{"k": "v"}, "/d"}, []any{cfg.Cmd, cfg.Env, cfg.Labels, cfg.WorkingDir}); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{"A=1"}, img2.Config.Config.Env); d != "" {
		t.Error(d)
	}
	next, err := s.ImageStack(t.Context(), "next:1")
	must(t, err)
	var buf bytes.Buffer
	must(t, s.Save(t.Context(), &buf, []string{"next:1"}, SaveOptions{}))
	var names []string
	tr := tar.NewReader(bytes.NewReader(blobsOf(t, buf.Bytes())[blobPath(img1.DiffIDs[1])]))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		n := h.Name
		if h.Typeflag == tar.TypeLink {
			n += " -> " + h.Linkname
		}
		for k, v := range h.PAXRecords {
			if strings.HasPrefix(k, paxXattr) {
				n += " " + strings.TrimPrefix(k, paxXattr) + "=" + v
			}
		}
		names = append(names, n)
	}
	priv := st.Dialect.Attr("opaque") + "=y"
	for i, n := range names { // two attributes come in any order
		if strings.HasPrefix(n, "d/f ") && strings.Contains(n, priv) && strings.Contains(n, "user.kept=1") {
			names[i] = "d/f both"
		}
	}
	want := []string{"./", ".wh.gone", "d/", "d/f both", "d/link", "d/new", "d/newer -> d/new", "hidden/", "hidden/.wh..wh..opq", "hidden/only"}
	if d := cmp.Diff(want, names); d != "" {
		t.Error(d)
	}
	// The committed layer says the same as the upper.
	strip := func(s string) string {
		for _, a := range []string{"origin=\"x\"", "impure=\"y\""} {
			s = strings.ReplaceAll(s, " "+st.Dialect.Prefix()+a, "")
		}
		return s
	}
	if d := cmp.Diff(strip(dump(t, st.Upper)), dump(t, next.Lowers[0].Path)); d != "" {
		t.Error(d)
	}
	clean(t, s)
}

func TestCommitRefuses(t *testing.T) {
	s := openStore(t)
	baseImage(t, s)
	for _, tc := range []struct {
		name, says string
		do         func(st Stack) error
	}{
		{"a name that is a marker", ".wh.x", func(st Stack) error { return os.WriteFile(filepath.Join(st.Upper, ".wh.x"), nil, 0o600) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := create(t, s, "base", "")
			must(t, tc.do(upperOf(t, s, c.ID)))
			_, err := s.Commit(t.Context(), c.ID, "x", CommitOptions{})
			if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), tc.says) {
				t.Error(err)
			}
			clean(t, s)
		})
	}
	create(t, s, "base", "c")
	for _, bad := range []string{"RUN x", "", "ENV x", `LABEL "a=b`} {
		if _, err := s.Commit(t.Context(), "c", "x", CommitOptions{Changes: []string{bad}}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestExportImport(t *testing.T) {
	s := openStore(t)
	baseImage(t, s)
	create(t, s, "base", "c")
	changeUpper(t, upperOf(t, s, "c"))
	var flat, again bytes.Buffer
	must(t, s.Export(t.Context(), "c", &flat))
	img, err := s.Import(t.Context(), bytes.NewReader(gz(t, flat.Bytes())), "flat:1", ImportOptions{Message: "hi"})
	must(t, err)
	if len(img.DiffIDs) != 1 {
		t.Error(img)
	}
	must(t, s.Export(t.Context(), "flat:1", &again))
	if !bytes.Equal(flat.Bytes(), again.Bytes()) {
		t.Error("export of the import differs")
	}
	clean(t, s)
	for name, data := range map[string][]byte{"empty": nil, "no tar": bytes.Repeat([]byte("x"), 2000), "truncated": flat.Bytes()[:700]} {
		if _, err := s.Import(t.Context(), bytes.NewReader(data), "x", ImportOptions{}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	clean(t, s)
}

func TestLive(t *testing.T) {
	s := openStore(t)
	baseImage(t, s)
	c := create(t, s, "base", "c")
	me := os.Getpid()
	start, err := StartTime(me)
	must(t, err)
	must(t, s.AddLive(t.Context(), Live{Target: "/mnt", ContainerID: c.ID, Pid: me, StartTime: start}))
	other := Live{Target: "/mnt", ContainerID: c.ID, Pid: 1, StartTime: mustStart(t, 1)}
	if err := s.AddLive(t.Context(), other); !errors.Is(err, ErrInUse) {
		t.Error(err)
	}
	other.Target = "/mnt2"
	if err := s.AddLive(t.Context(), other); !errors.Is(err, ErrInUse) {
		t.Error("second writable mount:", err)
	}
	got, err := s.Container(t.Context(), "c")
	must(t, err)
	if len(got.Live) != 1 || got.Live[0].Target != "/mnt" {
		t.Errorf("%+v", got.Live)
	}
	if err := s.RemoveContainer(t.Context(), "c"); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "/mnt") {
		t.Error(err)
	}
	must(t, s.RemoveLive(t.Context(), "/mnt"), s.RemoveLive(t.Context(), "/never"))
	// The process of this one is gone: it is in nobody's way.
	must(t, s.AddLive(t.Context(), Live{Target: "/dead", ContainerID: c.ID, Pid: me, StartTime: start + 1}))
	live, err := s.LiveMounts(t.Context())
	if err != nil || len(live) != 1 || live[0].Alive() {
		t.Errorf("%+v %v", live, err)
	}
	rep, err := s.Check(t.Context(), CheckOptions{Repair: true})
	if err != nil || len(rep.Findings) != 1 || rep.Findings[0].Invariant != "K15" || !rep.Findings[0].Fixed {
		t.Errorf("%+v %v", rep, err)
	}
	must(t, s.AddLive(t.Context(), Live{Target: "/dead", ContainerID: c.ID, Pid: me, StartTime: start + 1}))
	must(t, s.RemoveContainer(t.Context(), "c"))
	clean(t, s)
}

// TestDeadMountsAreNotInTheWay: a mount row keeps an image only as long as its
// process lives, and no longer than the boot.
func TestDeadMountsAreNotInTheWay(t *testing.T) {
	s := openStore(t)
	baseImage(t, s)
	base, err := s.ResolveImage(t.Context(), "base")
	must(t, err)
	me := os.Getpid()
	start := mustStart(t, me)
	must(t, s.AddLive(t.Context(), Live{Target: "/m", ImageID: base.ID, Pid: me, StartTime: start}))
	if _, err := s.RemoveImage(t.Context(), "base", RemoveOptions{}); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "/m") {
		t.Error(err)
	}
	must(t, s.AddLive(t.Context(), Live{Target: "/m", ImageID: base.ID, Pid: me, StartTime: start}), s.RemoveLive(t.Context(), "/m"))
	must(t, s.AddLive(t.Context(), Live{Target: "/m", ImageID: base.ID, Pid: me, StartTime: start + 1}))
	must(t, s.AddLive(t.Context(), Live{Target: "/old", ImageID: base.ID, Pid: me, StartTime: start, BootID: "another"}))
	must(t, s.sweep(t.Context()))
	if live, err := s.LiveMounts(t.Context()); err != nil || len(live) != 1 {
		t.Error(live, err)
	}
	_, err = s.RemoveImage(t.Context(), "base", RemoveOptions{})
	must(t, err)
	clean(t, s)
}

func mustStart(t testing.TB, pid int) uint64 {
	t.Helper()
	n, err := StartTime(pid)
	must(t, err)
	return n
}

func TestRemoveImage(t *testing.T) {
	s := openStore(t)
	baseImage(t, s)
	base, err := s.ResolveImage(t.Context(), "base")
	must(t, err)
	id := base.ID.String()
	must(t, s.Tag(t.Context(), "base", "base:2"), s.Tag(t.Context(), id[:19], "other"))
	rm := func(name string, o RemoveOptions) ([]RemoveAction, error) { return s.RemoveImage(t.Context(), name, o) }
	if _, err := rm(id, RemoveOptions{}); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "other:latest") {
		t.Error("by ID with several repositories:", err)
	}
	create(t, s, "base", "c")
	changeUpper(t, upperOf(t, s, "c"))
	child, err := s.Commit(t.Context(), "c", "child", CommitOptions{})
	must(t, err)
	got, err := rm("other", RemoveOptions{})
	must(t, err)
	if d := cmp.Diff([]RemoveAction{{"Untagged", "other:latest"}}, got); d != "" {
		t.Error(d)
	}
	_, err = rm("base", RemoveOptions{})
	must(t, err)
	if _, err := rm("base:2", RemoveOptions{}); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "c") {
		t.Error("with a container:", err)
	}
	must(t, s.RemoveContainer(t.Context(), "c"))
	for _, force := range []bool{false, true} {
		if _, err := rm(id, RemoveOptions{Force: force}); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "child") {
			t.Errorf("by ID with a child and a name, force %t: %v", force, err)
		}
	}
	// The child keeps it, without a name.
	got, err = rm("base:2", RemoveOptions{})
	must(t, err)
	if d := cmp.Diff([]RemoveAction{{"Untagged", "base:2"}}, got); d != "" {
		t.Error(d)
	}
	if _, err := rm(id, RemoveOptions{}); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "child") {
		t.Error("with a child:", err)
	}
	clean(t, s)
	got, err = rm("child", RemoveOptions{})
	must(t, err)
	want := []RemoveAction{{"Untagged", "child:latest"}, {"Deleted", child.ID.String()}, {"Deleted", child.ChainID.String()}, {"Deleted", id}, {"Deleted", base.ChainID.String()}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for _, name := range []string{"child", "nothere:1", "sha256:" + strings.Repeat("0", 64)} {
		if _, err := rm(name, RemoveOptions{}); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	clean(t, s)
	if n := len(listLayers(t, s)); n != 0 {
		t.Errorf("%d layers left", n)
	}
}

// TestRemoveImageByID removes an image that has several names.
func TestRemoveImageByID(t *testing.T) {
	s := openStore(t)
	for _, tc := range []struct {
		refs []string
		ok   bool
	}{
		{[]string{"app:1"}, true},
		{nil, true},
		{[]string{"app:1", "app:2"}, false}, // as with docker
		{[]string{"app:1", "other:1"}, false},
	} {
		load(t, s, outerTar(t, oldDocker(t, img{refs: tc.refs, layers: [][]byte{layerTar(t, file("f", "1"))}})))
		all, err := s.Images(t.Context(), "")
		must(t, err)
		id := all[0].ID.String()
		if _, err := s.RemoveImage(t.Context(), id, RemoveOptions{}); tc.ok != (err == nil) || err != nil && !errors.Is(err, ErrInUse) {
			t.Errorf("%q: %v", tc.refs, err)
		}
		if tc.ok {
			continue
		}
		got, err := s.RemoveImage(t.Context(), id, RemoveOptions{Force: true})
		must(t, err)
		if len(got) != len(tc.refs)+2 {
			t.Errorf("%q: %v", tc.refs, got)
		}
	}
	clean(t, s)
}

func TestQueries(t *testing.T) {
	s := openStore(t)
	baseImage(t, s)
	create(t, s, "base", "c")
	changeUpper(t, upperOf(t, s, "c"))
	_, err := s.Commit(t.Context(), "c", "example.com:5000/x/y:v1", CommitOptions{})
	must(t, err)
	for filter, n := range map[string]int{"": 2, "base": 1, "base:latest": 1, "base:2": 0, "example.com:5000/x/y": 1, "*:v1": 0, "ex*/*/*:v1": 1, "nothere": 0} {
		if got, err := s.Images(t.Context(), filter); err != nil || len(got) != n {
			t.Errorf("%q: %v %v", filter, got, err)
		}
	}
	h, err := s.History(t.Context(), "example.com:5000/x/y:v1")
	must(t, err)
	base, err := s.ResolveImage(t.Context(), "docker.io/library/base:latest")
	must(t, err)
	if len(h) != 2 || h[1].ID != base.ID.String() || h[1].CreatedBy != "step 0" || h[0].Size == 0 {
		t.Errorf("%+v", h)
	}
	d, err := s.Inspect(t.Context(), "base")
	must(t, err)
	if len(d.LayerDetails) != 1 || d.Size != 4 || !json.Valid(d.RawConfig) || len(d.Containers) != 1 {
		t.Errorf("%+v", d)
	}
	all, err := s.Layers(t.Context(), "")
	must(t, err)
	if len(all) != 3 {
		t.Errorf("%d layers", len(all))
	}
	u, err := s.DiskUsage(t.Context())
	must(t, err)
	if u.Images.Count != 2 || u.Containers.Count != 1 || u.Total <= 0 {
		t.Errorf("%+v", u)
	}
	if _, err := s.ResolveImage(t.Context(), "sha256:"); err == nil {
		t.Error("an empty prefix resolves")
	}
}

func TestGC(t *testing.T) {
	s := openStore(t)
	a := img{refs: []string{"x"}, layers: [][]byte{layerTar(t, file("f", "1"))}}
	b := img{refs: []string{"x"}, layers: [][]byte{layerTar(t, file("f", "2"))}}
	never := img{layers: [][]byte{layerTar(t, file("f", "3"))}}
	for _, i := range []img{a, b, never} {
		load(t, s, outerTar(t, oldDocker(t, i)))
	}
	must(t, os.MkdirAll(filepath.Join(s.root, layersName, newID(), diffName), 0o700), os.MkdirAll(filepath.Join(s.root, stageName, newID()), 0o700))
	for _, dry := range []bool{true, false} {
		rep, err := s.GC(t.Context(), dry)
		must(t, err)
		if len(rep.Images) != 1 || len(rep.Layers) != 1 || len(rep.Paths) != 1 || len(rep.Stages) != 1 || rep.Reclaimed <= 0 {
			t.Errorf("dry %v: %+v", dry, rep)
		}
	}
	clean(t, s)
	if list, err := s.Images(t.Context(), ""); err != nil || len(list) != 2 {
		t.Error(list, err)
	}
}
