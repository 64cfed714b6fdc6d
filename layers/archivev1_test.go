package layers

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// v1Member are the members of one image of an archive from before Docker 1.10.
func v1Member(n, parent int, layer []byte, more string) []memberFile {
	id := fmt.Sprintf("%064x", n)
	doc := fmt.Sprintf(`{"id":%q,"created":"2014-0%d-01T00:00:00Z","container_config":{"Cmd":["/bin/sh","-c","step %d"],"Image":""},"docker_version":"1.6.0"%s`, id, n, n, more)
	if parent > 0 {
		doc += fmt.Sprintf(`,"parent":"%064x"`, parent)
	}
	return []memberFile{{name: id + "/VERSION", data: []byte("1.0")}, {name: id + "/json", data: []byte(doc + `,"Size":1}`)}, {name: id + "/layer.tar", data: layer}}
}

func v1Files(t testing.TB, repositories string, images ...[]memberFile) []memberFile {
	t.Helper()
	var out []memberFile
	for _, i := range images {
		out = append(out, i...)
	}
	if repositories != "" {
		out = append(out, memberFile{name: "repositories", data: []byte(repositories)})
	}
	return out
}

// TestLoadV1 loads archives without a manifest. That their images have the same IDs as
// in Docker is tested with Docker.
func TestLoadV1(t *testing.T) {
	base := layerTar(t, dir("."), file("a", "1"))
	empty := make([]byte, 1024)
	top := layerTar(t, dir("."), wh("a"), file("b", "2"))
	all := func(repositories string) []memberFile {
		return v1Files(t, repositories, v1Member(3, 2, top, `,"config":{"Cmd":["sh"],"Env":["A=1"]},"architecture":"amd64","os":"linux"`),
			v1Member(1, 0, base, ""), v1Member(2, 1, empty, `,"throwaway":true`), v1Member(4, 1, top, ""))
	}
	top3, top4 := fmt.Sprintf("%064x", 3), fmt.Sprintf("%064x", 4)
	s := openStore(t)
	got := load(t, s, outerTar(t, all(fmt.Sprintf(`{"localhost/a":{"1":%q,"2":%q},"b":{"latest":"%064x"}}`, top3, top3, 1))))
	if len(got) != 3 { // two with names, and one that nothing is made from
		t.Fatal(got)
	}
	clean(t, s)
	img, err := s.ResolveImage(t.Context(), "localhost/a:2")
	must(t, err)
	if len(img.DiffIDs) != 3 || len(img.Config.History) != 3 || img.Config.History[1].CreatedBy != "/bin/sh -c step 2" || img.Config.Config.Env[0] != "A=1" ||
		strings.Join(img.Refs, " ") != "localhost/a:1 localhost/a:2" {
		t.Errorf("%+v", img)
	}
	var tree bytes.Buffer
	must(t, s.Export(t.Context(), "localhost/a:1", &tree))
	if lines := entryLines(t, tree.Bytes()); len(lines) != 2 || !strings.Contains(lines[1], `"b"`) {
		t.Errorf("%q", lines)
	}
	// Saved as old Dockers do, it is an archive of this kind if the manifest is lost.
	var saved bytes.Buffer
	must(t, s.Save(t.Context(), &saved, []string{"localhost/a:1"}, SaveOptions{Format: FormatOldDocker}))
	var files []memberFile
	for name, data := range blobsOf(t, saved.Bytes()) {
		if name != "manifest.json" && !strings.HasSuffix(name, "/") {
			files = append(files, memberFile{name: name, data: data})
		}
	}
	old := openStore(t)
	if again := load(t, old, outerTar(t, files)); len(again) != 1 || again[0].Refs[0] != "localhost/a:1" {
		t.Error(again)
	}
	clean(t, old)
	// Without names, from a directory, and under a name of the caller's.
	if got := load(t, openStore(t), outerTar(t, all(""))); len(got) != 2 || len(got[0].Refs) != 0 {
		t.Error(got)
	}
	root := t.TempDir()
	for _, f := range all(fmt.Sprintf(`{"c":{"1":%q}}`, top4)) {
		must(t, os.MkdirAll(filepath.Join(root, filepath.Dir(f.name)), 0o755), os.WriteFile(filepath.Join(root, f.name), f.data, 0o644))
	}
	d := openStore(t)
	if got, err := d.Load(t.Context(), Source{Dir: root}, LoadOptions{}); err != nil || len(got) != 1 || got[0].Refs[0] != "c:1" {
		t.Error(got, err)
	}

	edit := func(files []memberFile, name, from, to string) []memberFile {
		for i := range files {
			if strings.HasSuffix(files[i].name, name) {
				files[i].data = bytes.Replace(files[i].data, []byte(from), []byte(to), 1)
			}
		}
		return files
	}
	var deep [][]memberFile
	for n := 1; n < 10; n++ {
		deep = append(deep, v1Member(n, n%9+1, empty, ""))
	}
	for _, tc := range []struct {
		what  string
		files []memberFile
		is    error
		says  string
	}{
		{"no parent", v1Files(t, "", v1Member(2, 1, top, "")), ErrCorrupt, "no \"" + fmt.Sprintf("%064x", 1) + "/json"},
		{"no layer", all("")[:2], ErrCorrupt, "layer.tar"},
		{"circle", v1Files(t, "", deep...), ErrUnsupported, "circle"},
		{"a tag of nothing", all(`{"a":{"b":"` + fmt.Sprintf("%064x", 9) + `"}}`), ErrCorrupt, "json"},
		{"a tag of a path", all(`{"a":{"b":"../../etc"}}`), ErrCorrupt, "not the ID"},
		{"a parent that is a path", edit(all(""), top4+"/json", fmt.Sprintf(`"parent":"%064x"`, 1), `"parent":"../x"`), ErrCorrupt, "not the ID"},
		{"the document of another", edit(all(""), top4+"/json", fmt.Sprintf(`"id":"%064x"`, 4), fmt.Sprintf(`"id":"%064x"`, 5)), ErrCorrupt, "document of"},
		{"a layer that is none", edit(all(""), top4+"/layer.tar", string(top), strings.Repeat("x", 1024)), ErrCorrupt, "layer.tar"},
		{"a bad name", all(`{"UPPER":{"b":"` + top4 + `"}}`), ErrInvalid, "UPPER"},
	} {
		s := openStore(t)
		_, err := s.Load(t.Context(), Source{Reader: bytes.NewReader(outerTar(t, tc.files))}, LoadOptions{})
		if !errors.Is(err, tc.is) || !strings.Contains(fmt.Sprint(err), tc.says) {
			t.Errorf("%s: %v", tc.what, err)
		}
		if n := len(listLayers(t, s)); n != 0 {
			t.Errorf("%s: %d layers are left", tc.what, n)
		}
		clean(t, s)
	}
}
