package integration

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/engine"
)

// containerfile makes layers with every kind of change that a layer can hold.
const containerfile = `FROM localhost/base:1
COPY --chown=21:22 files /copied
RUN echo more >> /data/keep && rm /data/changed && chmod 4750 /data/added && chown 1:2 /data/attr
RUN rm -r /full && mkdir -m 700 /full && echo only > /full/only && rm -r /kinds/file && echo file > /kinds/file && rm /kinds/dir && mkdir /kinds/dir
RUN chmod 4710 /data/suid && ln /data/suid /data/suid2 && echo one > /data/one && ln /data/one /data/two && ln -s suid /data/sym && mkfifo /data/fifo && echo a > "/data/a b" && echo b > /data/été && chown 2001:2002 /data/fifo
RUN cp -a /copied /moved && rm -r /copied && mkdir -p /copied/deep/deeper && touch /copied/deep/deeper/file && chmod 2775 /copied/deep
RUN mv /moved/dir /moved/dir2 && mv /data/hard /data/hard3 && echo AAAA > /moved/same && truncate -s 100000 /moved/sparse
RUN touch /data/keep && cp /data/keep /data/keep.new && mv /data/keep.new /data/keep && rm -r /moved/dir2 && rm /data/suid2
`

// buildContext fills the directory that the build copies from.
func buildContext(t *testing.T, w engine.Person) string {
	t.Helper()
	dir := filepath.Join(w.Home, "context")
	files := filepath.Join(dir, "files")
	path := func(name string) string { return filepath.Join(files, name) }
	if err := errors.Join(
		os.MkdirAll(path("dir"), 0o755),
		os.WriteFile(filepath.Join(dir, "Containerfile"), []byte(containerfile), 0o644),
		os.WriteFile(path("dir/file"), []byte("file\n"), 0o644),
		os.WriteFile(path("same"), []byte("aaaa\n"), 0o600),
		os.WriteFile(path("sparse"), []byte("start"), 0o640),
		os.WriteFile(path("labelled"), []byte("with attributes\n"), 0o755),
		os.Symlink("dir/file", path("link")),
		os.Chmod(path("labelled"), unix.S_ISUID|0o755),
		unix.Setxattr(path("labelled"), "user.sample", []byte("value"), 0),
	); err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("setcap"); err == nil && w.UID == 0 {
		w.Run(t, "setcap", "cap_net_raw+ep", path("labelled"))
	}
	if err := filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(p, w.UID, w.GID))
	}); err != nil {
		t.Fatal(err)
	}
	return dir
}

// ownWays are entries in which fuse-overlayfs (1.10) differs from kernel overlayfs, and the
// reason. plyfs must be as the kernel there.
var ownWays = map[string]string{
	"full/.wh.new": "a directory that is removed and made anew shows its old names to podman's diff again, in the layer and the image",
	"data/suid":    "a file loses its set-user-id bit when another name of it is removed, and so is in that layer, too",
}

// TestImageIdentity builds the same image with every kind of storage. Through a mount
// program podman finds out what to put into a layer by comparing two trees, so the layers of
// plyfs and fuse-overlayfs must be the same, entry for entry. On kernel overlayfs it takes
// what is in the upper, which has directories that nothing was changed in, and opaque
// directories instead of many whiteouts. There the trees must be the same after each layer.
// No layer here has a link to a file that it does not change: a comparison of trees does not
// see that there is a second name, and makes it a file of its own.
func TestImageIdentity(t *testing.T) {
	engine.Need(t, "podman")
	eachPerson(t, func(t *testing.T, w engine.Person) {
		context := buildContext(t, w)
		plyfs := builtLayers(t, w, "p", program(t, "fuse-overlayfs"), context)
		if len(plyfs) != 10 {
			t.Errorf("%d layers: 3 of the image and 7 of the build expected", len(plyfs))
		}
		if prog, err := exec.LookPath("fuse-overlayfs"); err == nil {
			for i, l := range builtLayers(t, w, "f", prog, context) {
				if d := cmp.Diff(linesBut(l, ownWays), linesBut(plyfs[i], ownWays)); d != "" {
					t.Errorf("layer %d (- fuse-overlayfs, + plyfs):\n%s", i, d)
				}
			}
		}
		got, want := map[string]string{}, map[string]string{}
		for i, l := range builtLayers(t, w, "k", "", context) {
			engine.Merge(want, l)
			engine.Merge(got, plyfs[i])
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("tree of layer %d (- kernel, + plyfs):\n%s", i, d)
			}
		}
	})
}

// linesBut are the entries of a layer as text, without some.
func linesBut(layer []engine.Entry, but map[string]string) []string {
	return engine.Lines(slices.DeleteFunc(slices.Clone(layer), func(e engine.Entry) bool {
		_, ok := but[e.Name]
		return ok
	}))
}

// builtLayers builds in a store of its own and describes the layers of the image.
func builtLayers(t *testing.T, w engine.Person, name, program, context string) [][]engine.Entry {
	t.Helper()
	w = w.Store(t, name, program)
	w.Run(t, "podman", "load", "-q", "-i", baseImage(t, w))
	w.Run(t, "podman", "build", "-q", "--layers", "--timestamp", "1000000000", "-t", "localhost/built:1", context)
	file := filepath.Join(w.Home, name, "built.tar")
	w.Run(t, "podman", "save", "-q", "--format", "docker-archive", "-o", file, "localhost/built:1")
	layers, err := engine.Layers(file)
	if err != nil {
		t.Fatal(err)
	}
	return layers
}
