package integration

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/archive"
	"github.com/plyfs/plyfs/integration/engine"
	"github.com/plyfs/plyfs/integration/harness"
)

// saved are the forms that an image is saved in, and how skopeo calls them.
var saved = map[string]string{"docker": "docker-archive:", "docker-old": "docker-archive:", "oci": "oci-archive:", "oci-dir": "oci:"}

// tool runs a program that must succeed, with a time limit.
func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		harness.Skip(t, "%s is not installed", name)
	}
	cmd := exec.Command(name, args...)
	cmd.WaitDelay = time.Second
	timer := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// manyLayers is an image in which a layer is there twice, and one is empty.
func manyLayers(t *testing.T) archive.Image {
	t.Helper()
	base := ownedLayer(t)
	return archive.Image{Ref: "localhost/forms:1", Layers: [][]byte{base, make([]byte, 1024), base}}
}

// idOf is the ID of the only image of a store.
func idOf(t testing.TB, s *store) string {
	t.Helper()
	var list []struct {
		ID string `json:"id"`
	}
	if err := json.Unmarshal([]byte(s.run("images", "--json")), &list); err != nil || len(list) != 1 {
		t.Fatal("not one image:", list, err)
	}
	return list[0].ID
}

// TestSavedForOthers gives each form that we write to other programs, which must see the
// same image.
func TestSavedForOthers(t *testing.T) {
	s := newStore(t)
	dir := t.TempDir()
	in := filepath.Join(dir, "in.tar")
	if err := manyLayers(t).Write(in, archive.Options{}); err != nil {
		t.Fatal(err)
	}
	s.run("load", "-q", "-i", in)
	id := idOf(t, s)
	for form, transport := range saved {
		t.Run(form, func(t *testing.T) {
			out := filepath.Join(dir, form)
			s.run("save", "-q", "--format", form, "-o", out, "localhost/forms:1")
			if _, err := s.try("save", "-q", "--format", "oci-dir", "-o", dir, "localhost/forms:1"); err == nil {
				t.Error("a layout was written into a directory that is not empty")
			}
			again := newStore(t)
			again.run("load", "-q", "-i", out)
			if got := idOf(t, again); got != id {
				t.Errorf("plyfs: image %s, expected %s", got, id)
			}
			// A copy has the config as a file, whose name is the image's ID.
			copied := filepath.Join(t.TempDir(), "copy")
			tool(t, "skopeo", "--insecure-policy", "copy", "-q", transport+out, "dir:"+copied)
			if _, err := os.Stat(filepath.Join(copied, strings.TrimPrefix(id, "sha256:"))); err != nil {
				t.Errorf("skopeo: the image has another ID: %v", err)
			}
			again.run("rmi", id)
			again.run("load", "-q", "-i", copied, "--ref", "localhost/copied:1")
			if got := idOf(t, again); got != id {
				t.Errorf("plyfs: image of skopeo's directory %s, expected %s", got, id)
			}
			if form == "oci-dir" {
				rootfs := filepath.Join(t.TempDir(), "bundle")
				tool(t, "umoci", append([]string{"unpack", "--image", out + ":1"}, append(umociFlags(), rootfs)...)...)
				if _, err := os.Stat(filepath.Join(rootfs, "rootfs/etc/shadow")); err != nil {
					t.Error("umoci:", err)
				}
			}
		})
	}
}

func umociFlags() []string {
	if os.Geteuid() != 0 {
		return []string{"--rootless"}
	}
	return nil
}

// TestEnginesLoad: podman and docker load what we save, and have the same image.
func TestEnginesLoad(t *testing.T) {
	engine.Need(t, "podman")
	eachPerson(t, func(t *testing.T, w engine.Person) {
		s := newStore(t)
		in := filepath.Join(w.Home, "in.tar")
		if err := manyLayers(t).Write(in, archive.Options{}); err != nil {
			t.Fatal(err)
		}
		s.run("load", "-q", "-i", in)
		id := strings.TrimPrefix(idOf(t, s), "sha256:")
		w = w.Store(t, "l", "")
		for form := range saved {
			out := filepath.Join(w.Home, form)
			s.run("save", "-q", "--format", form, "-o", out, "localhost/forms:1")
			if err := os.Chmod(out, 0o755); err != nil {
				t.Fatal(err)
			}
			w.Run(t, "podman", "load", "-q", "-i", out)
			if got := strings.TrimSpace(w.Run(t, "podman", "images", "-q", "--no-trunc")); got != "sha256:"+id {
				t.Errorf("podman, %s: image %s, expected %s", form, got, id)
			}
			// What podman writes comes back. A config of one kind in a form of the other is
			// another config.
			formats := []string{"docker-archive", "docker-dir"}
			if strings.HasPrefix(form, "oci") {
				formats = []string{"oci-archive", "oci-dir"}
			}
			for _, format := range formats {
				back := filepath.Join(w.Home, form+"-"+format)
				w.Run(t, "podman", "save", "-q", "--format", format, "-o", back, id)
				again := newStore(t)
				again.run("load", "-q", "-i", back)
				if got := idOf(t, again); got != "sha256:"+id {
					t.Errorf("podman save --format %s: image %s, expected %s", format, got, id)
				}
			}
			w.Run(t, "podman", "rmi", "-f", id)
		}
	})
}

// oldArchive writes an archive as Docker wrote it before 1.10. The documents have fields
// that its later versions leave out, or keep, depending on what wrote them.
func oldArchive(t *testing.T, file string) {
	t.Helper()
	docs := []struct{ parent, version, more string }{
		{"", "1.6.2", `,"container":"c","container_config":{"Hostname":"h","Cmd":["/bin/sh","-c","#(nop) ADD file:1 in /"],"PortSpecs":null,"CpuShares":0,"Entrypoint":null},"config":{"Hostname":"h","Memory":0,"Env":["A=<&>"],"Cmd":"sh","ExposedPorts":{"80/tcp":{}},"Volumes":null},"Unknown":1`},
		{"1", "1.9.1", `,"container_config":{"Cmd":["/bin/sh","-c","touch <a> && b"],"PortSpecs":null},"config":{"Memory":0,"Env":["A=<&>"],"Labels":{"x":"y"}},"Unknown":{"a": 1},"author":"somebody","comment":"what"`},
		{"2", "", `,"config":null,"os":"linux"`},
		{"1", "1.8.3", `,"config":{"Cmd":["sh"]},"throwaway":true,"parent_id":"sha256:x","layer_id":"sha256:y"`},
		{"1", "1.8.2-dev", `,"config":{"OnBuild":["RUN x"],"Image":"sha256:z","MacAddress":"","NetworkDisabled":false}`},
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	put := func(name string, data []byte) {
		t.Helper()
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	repos := map[string]map[string]string{}
	layer := ownedLayer(t)
	for i, d := range docs {
		id := fmt.Sprintf("%064x", i+1)
		doc := fmt.Sprintf(`{"id":%q,"created":"2014-10-01T20:46:08.91421Z","docker_version":%q,"architecture":"amd64","Size":%d%s`, id, d.version, i, d.more)
		if d.parent != "" {
			doc += fmt.Sprintf(`,"parent":"%064s"`, d.parent)
		}
		put(id+"/VERSION", []byte("1.0"))
		put(id+"/json", []byte(doc+"}"))
		put(id+"/layer.tar", layer)
		layer = make([]byte, 1024*(i+1)) // empty, and each another digest
		repos["localhost/old"+fmt.Sprint(i)] = map[string]string{"1": id}
	}
	raw, err := json.Marshal(repos)
	if err != nil {
		t.Fatal(err)
	}
	put("repositories", raw)
	if err := errors.Join(w.Close(), os.WriteFile(file, out.Bytes(), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// TestDockerLoads is the same with a docker daemon.
func TestDockerLoads(t *testing.T) {
	engine.Need(t, "dockerd")
	eachPerson(t, func(t *testing.T, w engine.Person) {
		if w.UID != 0 {
			harness.Skip(t, "dockerd wants root")
		}
		s := newStore(t)
		in := filepath.Join(w.Home, "in.tar")
		if err := manyLayers(t).Write(in, archive.Options{}); err != nil {
			t.Fatal(err)
		}
		s.run("load", "-q", "-i", in)
		id := idOf(t, s)
		d := w.Docker(t, "d", "vfs", "")
		docker := d.DockerCLI()
		for _, form := range []string{"docker", "docker-old"} {
			out := filepath.Join(w.Home, form)
			s.run("save", "-q", "--format", form, "-o", out, "localhost/forms:1")
			d.Run(t, docker, "load", "-q", "-i", out)
			if got := strings.Fields(d.Run(t, docker, "images", "-q", "--no-trunc")); !slices.Equal(got, []string{id}) {
				t.Errorf("docker, %s: image %s, expected %s", form, got, id)
			}
			back := filepath.Join(w.Home, form+"-back")
			d.Run(t, docker, "save", "-o", back, "localhost/forms:1")
			again := newStore(t)
			again.run("load", "-q", "-i", back)
			if got := idOf(t, again); got != id {
				t.Errorf("docker save: image %s, expected %s", got, id)
			}
			d.Run(t, docker, "rmi", "-f", id)
		}
		// Docker reads the oldest archives until 24.
		old := filepath.Join(w.Home, "old.tar")
		oldArchive(t, old)
		mine := newStore(t)
		mine.run("load", "-q", "-i", old)
		if res := d.Do("", docker, "load", "-q", "-i", old); res.Code != 0 {
			harness.Skip(t, "this docker does not read archives without a manifest: %s", res.Stderr)
		}
		for i := range 5 {
			name := fmt.Sprintf("localhost/old%d:1", i)
			want := strings.TrimSpace(d.Run(t, docker, "inspect", "--format", "{{.Id}}", name))
			var got []struct{ ID string }
			if err := json.Unmarshal([]byte(mine.run("inspect", name)), &got); err != nil || got[0].ID != want {
				t.Errorf("%s: image %v %v, docker has %s", name, got, err, want)
			}
		}
	})
}
