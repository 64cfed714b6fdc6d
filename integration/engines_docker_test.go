package integration

import (
	"archive/tar"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/plyfs/plyfs/integration/engine"
	"github.com/plyfs/plyfs/integration/harness"
)

// dockerfile is built by docker's old builder, which commits a container for each step.
const dockerfile = `FROM localhost/base:1
COPY file /data/copied
RUN chown 51:52 /data/copied && chmod 4750 /data/copied && rm -r /full /kinds && mkdir /full && mv /data/hard /full/hard
RUN rm /data/keep && chmod 4710 /data/suid && ln /data/suid /full/suid
`

// TestDocker runs docker's daemon with the storage driver that calls fuse-overlayfs, and
// plyfs first in its PATH.
func TestDocker(t *testing.T) {
	engine.Need(t, "dockerd", "docker")
	harness.NeedRoot(t)
	w := enginePlace(t, engine.Options{}).Root
	d := w.Docker(t, "d", "fuse-overlayfs", filepath.Dir(program(t, "fuse-overlayfs")))
	run := func(args ...string) string { t.Helper(); return d.Run(t, append([]string{d.DockerCLI()}, args...)...) }

	run("load", "-q", "-i", baseImage(t, w))
	sameText(t, "image", imageTree, run(lookIn("run", "--rm", "--network", "none", engine.BaseImage)...))
	if m := run("run", "--rm", "--network", "none", engine.BaseImage, "mount"); !strings.Contains(m, "on / type fuse.fuse-overlayfs") {
		t.Errorf("the root of a container is not a union of plyfs:\n%s", m)
	}

	run("run", "-d", "--name", "work", "--network", "none", engine.BaseImage, "sleep", "1000")
	run("exec", "work", "sh", "-c", change)
	sameText(t, "container", changedTree, run(lookIn("exec", "work")...))
	sameText(t, "diff", changedNames, sortedLines(run("diff", "work")))
	run("restart", "--time", "0", "work")
	sameText(t, "container after a restart", changedTree, run(lookIn("exec", "work")...))

	file := filepath.Join(w.Home, "in")
	if err := os.WriteFile(file, []byte("copied in\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	run("cp", file, "work:/data/in")
	if got := run("exec", "work", "sh", "-c", "stat -c '%a %u:%g' /data/in; cat /data/in; rm /data/in"); got != "640 0:0\ncopied in\n" {
		t.Errorf("copied in: %q", got)
	}
	tr := tar.NewReader(strings.NewReader(run("cp", "work:/made/file", "-")))
	if h, err := tr.Next(); err != nil || h.Mode&0o7777 != 0o4555 || h.Uid != 13 || h.Gid != 14 {
		t.Errorf("copied out: %+v %v", h, err)
	} else if b, err := io.ReadAll(tr); err != nil || string(b) != "made\n" {
		t.Errorf("copied out: %q %v", b, err)
	}

	run("commit", "work", "localhost/committed:1")
	run("rm", "-f", "work")
	sameText(t, "committed image", committed(changedTree), run(lookIn("run", "--rm", "--network", "none", "localhost/committed:1")...))

	dir := filepath.Join(w.Home, "context")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"Dockerfile": dockerfile, "file": "from the context\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	layers := dockerLayers(t, d, dir)
	// The daemon, too, compares trees to find out what a container has changed; see TestImageIdentity.
	other := w.Docker(t, "o", "overlay2", "")
	other.Run(t, d.DockerCLI(), "load", "-q", "-i", baseImage(t, w))
	tree, otherTree := map[string]string{}, map[string]string{}
	for i, l := range dockerLayers(t, other, dir) {
		engine.Merge(tree, layers[i])
		engine.Merge(otherTree, l)
		if d := cmp.Diff(otherTree, tree); d != "" {
			t.Errorf("tree of layer %d (- kernel, + plyfs):\n%s", i, d)
		}
	}
}

// dockerLayers builds an image and describes its layers.
func dockerLayers(t *testing.T, w engine.Person, context string) [][]engine.Entry {
	t.Helper()
	w.Run(t, w.DockerCLI(), "build", "-q", "--network", "none", "-t", "localhost/built:1", context)
	file := filepath.Join(w.Home, "built.tar")
	w.Run(t, w.DockerCLI(), "save", "-o", file, "localhost/built:1")
	layers, err := engine.Layers(file)
	if err != nil {
		t.Fatal(err)
	}
	return layers
}
