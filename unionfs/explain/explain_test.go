package explain

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/merge"
)

// stack makes layers, topmost first, of lines: "dir/", "file", "link -> target"; in the
// aufs dialect, which needs no privilege. With upper, the first is one.
func stack(t *testing.T, upper bool, layers ...[]string) *Stack {
	t.Helper()
	var o Options
	for i, lines := range layers {
		dir := filepath.Join(t.TempDir(), "layer")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, line := range lines {
			put(t, dir, line, i)
		}
		l := Layer{Label: Label{Name: fmt.Sprintf("layer %d", len(layers)-i), CreatedBy: fmt.Sprintf("RUN step %d", len(layers)-i)}}
		l.Path, l.Dialect = dir, whiteout.AUFS
		if i == 0 && upper {
			l.Name, l.CreatedBy = "upper", ""
			o.Upper = &l
		} else {
			o.Lowers = append(o.Lowers, l)
		}
	}
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func put(t *testing.T, dir, line string, layer int) {
	t.Helper()
	path, target, isLink := strings.Cut(line, " -> ")
	p := filepath.Join(dir, path)
	err := os.MkdirAll(filepath.Dir(p), 0o755)
	switch {
	case err != nil:
	case isLink:
		err = os.Symlink(target, p)
	case strings.HasSuffix(path, "/"):
		err = os.MkdirAll(p, 0o755)
	default:
		err = os.WriteFile(p, fmt.Appendf(nil, "%d", layer), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// brief is a report in a line: exists, errno, rule, and each entry as layer:role(rule).
func brief(r *Report) string {
	parts := []string{fmt.Sprint(r.Exists)}
	if !r.Exists {
		parts = append(parts, r.Errno, r.Rule)
	}
	for _, e := range r.Entries {
		s := fmt.Sprintf("%d:%s", e.Layer, e.Role)
		if e.Role == RoleHidden {
			s += "(" + e.Rule + ")"
		}
		parts = append(parts, s)
	}
	return strings.Join(parts, " ")
}

func TestExplain(t *testing.T) {
	layers := [][]string{
		{"etc/.wh.gone", "etc/hosts", "opt/.wh..wh..opq", "opt/new", ".wh.srv", "bin -> usr/bin", "up -> ../../usr", "loop -> loop", "file", "mix/", "late/.wh.x"},
		{"etc/hosts", "opt/old", "srv/data", "usr/bin/sh", "file/inside", "mix", "late/x"},
		{"etc/gone", "etc/", "opt/older/deep", "bin/sh", "mix/below", "only"},
	}
	for _, c := range []struct{ path, want, answer string }{
		{"/only", "true 2:serves", `"/only" is a file from layer 1 (RUN step 1).`},
		{"/etc/hosts", "true 0:serves 1:hidden(shadowed)", `"/etc/hosts" is a file from layer 3 (RUN step 3); it hides 1 entry below.`},
		{"etc", "true 0:serves 1:merged 2:merged", `"/etc" is a directory from layer 3 (RUN step 3), merged with those of layer 2 and layer 1.`},
		{"/", "true 0:serves 1:merged 2:merged", ""},
		{"/etc/gone", "false ENOENT whiteout 0:deletes 2:hidden(whiteout)", `"/etc/gone" does not exist: layer 1 has it, but layer 3 (RUN step 3) deletes it (whiteout: file .wh.gone).`},
		{"/none", "false ENOENT absent", `"/none" does not exist: no layer has anything of this name there.`},
		{"/none/x", "false ENOENT absent", `"/none/x" does not exist: there is no "/none", and no layer has anything at this path.`},
		{"/opt", "true 0:serves 1:hidden(opaque) 2:hidden(opaque)", ""},
		{"/opt/old", "false ENOENT parent-opaque 1:hidden(parent-opaque)", `"/opt/old" does not exist: layer 2 has it, but the directory "/opt" is opaque (file .wh..wh..opq) in layer 3 (RUN step 3), which hides what layers below have in it.`},
		{"/opt/older/deep", "false ENOENT parent-opaque 2:hidden(parent-opaque)", ""},
		{"/srv/data", "false ENOENT parent-whiteout 1:hidden(parent-whiteout)", `"/srv/data" does not exist: layer 2 has it, but layer 3 (RUN step 3) deletes "/srv" (whiteout: file .wh.srv).`},
		{"/bin/sh", "true 1:serves", `"/usr/bin/sh" is a file from layer 2 (RUN step 2).`},
		{"/bin", "true 0:serves 2:hidden(shadowed)", ""},
		{"/up/bin/../bin/sh", "true 1:serves", ""},
		{"/loop/x", "false ELOOP refused", ""},
		{"/file/inside", "false ENOTDIR parent-shadowed 1:hidden(parent-shadowed)", `"/file/inside" does not exist: layer 2 has it, but "/file" is a file in layer 3 (RUN step 3), so no directory of that name below it shows.`},
		{"/mix", "true 0:serves 1:hidden(not-a-directory) 2:hidden(merge-ended)", ""},
		{"/mix/below", "false ENOENT parent-merge-ended 2:hidden(parent-merge-ended)", ""},
		{"/only/x", "false ENOTDIR parent-shadowed", `"/only/x" does not exist: "/only" is a file, from layer 1 (RUN step 1).`},
		{"/etc/.wh.gone", "false ENOENT absent", ""},
		{"/" + strings.Repeat("x", 256), "false ENAMETOOLONG name-too-long", ""},
	} {
		r, err := stack(t, false, layers...).Explain(c.path)
		if err != nil {
			t.Errorf("%s: %v", c.path, err)
			continue
		}
		if got := brief(r); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.path, got, c.want)
		}
		if c.answer != "" && r.Answer != c.answer {
			t.Errorf("%s:\n got %s\nwant %s", c.path, r.Answer, c.answer)
		}
	}
}

func TestLinksAndComponents(t *testing.T) {
	s := stack(t, true, []string{"a/"}, []string{"bin -> /usr/bin", "usr/bin/sh -> dash"}, []string{"bin/", "a/x"})
	r, err := s.Explain("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	if r.Path != "/usr/bin/sh" || len(r.Links) != 1 || r.Links[0].At != "/bin" || r.Links[0].Hides != 1 || r.Attr.Kind != "symlink" || r.Attr.Target != "dash" {
		t.Errorf("%+v", r)
	}
	if r, err = s.Explain("/a/x"); err != nil || len(r.Components) != 2 || !slices.Equal(r.Components[1].Layers, []int{0, 2}) || r.CopyUp != CopyNone {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err = s.Explain("/a"); err != nil || r.CopyUp != CopyMerged {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestTree(t *testing.T) {
	s := stack(t, false, []string{"d/.wh.b", "d/c", "o/.wh..wh..opq", "\xff"}, []string{"d/a", "d/b", "d/c", "o/x"})
	var got []string
	walk := func(o TreeOptions) bool {
		got = nil
		more, err := s.Tree(t.Context(), "/", o, func(l Line) error {
			text := fmt.Sprintf("%s %v %d %v %d %s", l.At, l.Exists, *l.Layer, l.Merged, l.Hidden, l.Rule)
			got = append(got, strings.TrimSpace(text))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return more
	}
	s2 := []string{"/d true 0 [1] 0", "/d/a true 1 [] 0", "/d/b false 0 [] 1 whiteout", "/d/c true 0 [] 1", "/o true 0 [] 1", "/o/x false 0 [] 1 parent-opaque", "/\xff true 0 [] 0"}
	if walk(TreeOptions{}) || !slices.Equal(got, s2) {
		t.Errorf("%q", got)
	}
	if !walk(TreeOptions{Limit: 2}) || !slices.Equal(got, s2[:2]) {
		t.Errorf("%q", got)
	}
	if walk(TreeOptions{Depth: 1}) || len(got) != 3 {
		t.Errorf("%q", got)
	}
	if _, err := s.Tree(t.Context(), "/d/a", TreeOptions{}, nil); err == nil {
		t.Error("a file has a tree")
	}
}

// TestStepIsMerge: what shows, and of which layers, is what package merge says.
func TestStepIsMerge(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var layers [][]string
		var listings []merge.Listing
		for range 1 + rng.IntN(5) {
			var lines []string
			var l merge.Listing
			if rng.IntN(8) == 0 {
				lines, l.Opaque = append(lines, "d/.wh..wh..opq"), true
			}
			lines = append(lines, "d/")
			for _, n := range []string{"a", "b", "c"} {
				switch rng.IntN(4) {
				case 0:
					lines, l.Entries = append(lines, "d/"+n), append(l.Entries, merge.Entry{Name: n})
				case 1, 2:
					lines, l.Entries = append(lines, "d/"+n+"/"), append(l.Entries, merge.Entry{Name: n, Kind: merge.Dir})
				}
				if rng.IntN(5) == 0 {
					lines, l.Entries = append(lines, "d/.wh."+n), append(l.Entries, merge.Entry{Name: n, Kind: merge.Whiteout})
				}
			}
			layers, listings = append(layers, lines), append(listings, l)
		}
		want := map[string][]int{}
		for _, m := range merge.Merge(listings) {
			for _, r := range m.Refs {
				want[m.Name] = append(want[m.Name], int(r.Listing))
			}
		}
		s := stack(t, false, layers...)
		for _, n := range []string{"a", "b", "c"} {
			r, err := s.Explain("/d/" + n)
			if err != nil {
				t.Fatal(err)
			}
			var have []int
			for _, e := range r.Entries {
				if e.Role == RoleServes || e.Role == RoleMerged {
					have = append(have, e.Layer)
				}
			}
			if !slices.Equal(have, want[n]) {
				t.Fatalf("%q of %q: %v, package merge says %v", n, layers, have, want[n])
			}
		}
		s.Close()
	}
}

func TestHostileLayer(t *testing.T) {
	s := stack(t, false, []string{"evil -> /etc", "d/f"}, []string{"evil/passwd", "d -> /"})
	r, err := s.Explain("/evil/passwd")
	if err != nil || r.Path != "/etc/passwd" || r.Exists {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err = s.Explain("/d/f"); err != nil || brief(r) != "true 0:serves" {
		t.Errorf("%v, %v", r, err)
	}
}

func TestStep(t *testing.T) {
	for in, want := range map[string]string{
		"RUN /bin/sh -c apt-get\tinstall x # buildkit": "RUN apt-get install x",
		"COPY a /b # buildkit":                         "COPY a /b",
		"/bin/sh -c #(nop)  CMD [\"sh\"]":              "CMD [\"sh\"]",
		"/bin/sh -c make\n install":                    "RUN make install",
		"":                                             "",
	} {
		if got := Step(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestPathJSON(t *testing.T) {
	for _, p := range []Path{"/plain", "/\xff\n", ""} {
		b, err := json.Marshal(p)
		var back Path
		if err == nil {
			err = json.Unmarshal(b, &back)
		}
		if err != nil || back != p {
			t.Errorf("%q: %s, %q, %v", p, b, back, err)
		}
	}
	var m Mode
	if b, err := json.Marshal(Mode(0o4755)); err != nil || string(b) != `"4755"` || json.Unmarshal(b, &m) != nil || m != 0o4755 {
		t.Errorf("%s, %o, %v", b, m, err)
	}
}
