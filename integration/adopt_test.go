package integration

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/engine"
	"github.com/plyfs/plyfs/integration/harness"
)

// adoption is a store that adopts another one, which must stay as it is.
type adoption struct {
	*store
	source string
	before string
}

func newAdoption(t *testing.T, source string) *adoption {
	t.Helper()
	// A daemon may still be writing what it has been told a moment ago.
	before := ""
	waitFor(t, "the store at rest", func() bool {
		was := before
		<-time.After(300 * time.Millisecond)
		before = fingerprint(t, source)
		return before == was
	})
	return &adoption{store: newStore(t), source: source, before: before}
}

// untouched fails if anything below the source has changed, its inodes' change times
// included.
func (a *adoption) untouched() {
	a.t.Helper()
	if after := fingerprint(a.t, a.source); after != a.before {
		a.t.Errorf("%s has changed", a.source)
	}
}

// fingerprint is a digest of everything that stat(2), xattrs and contents tell of a tree.
func fingerprint(t testing.TB, dir string) string {
	t.Helper()
	sum := sha256.New()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		fmt.Fprintln(sum, path, st.Mode, st.Uid, st.Gid, st.Size, st.Mtim, st.Ctim, st.Ino, st.Nlink, st.Rdev)
		if !d.Type().IsRegular() {
			return nil
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(sum, f)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", sum.Sum(nil))
}

// look mounts an image or container and describes its tree as engines' tests do.
func (a *adoption) look(name string) string {
	a.t.Helper()
	mnt := a.t.TempDir()
	a.run("mount", "--ro", name, mnt)
	defer a.run("umount", mnt)
	out, err := exec.Command("chroot", append([]string{mnt}, lookIn()...)...).Output()
	if err != nil {
		a.t.Fatal(err)
	}
	return string(out)
}

// check is a deep check without findings.
func (a *adoption) check() {
	a.t.Helper()
	if out, err := a.try("check", "--deep"); err != nil {
		a.t.Errorf("check: %v\n%s", err, out)
	}
}

// layerDigests are those of the layers of an archive, which plyfs or docker has saved.
func layerDigests(t testing.TB, file string) []string {
	t.Helper()
	var out []string
	cmd := exec.Command("tar", "-xf", file, "-C", t.TempDir(), "--wildcards", "*", "--to-command", `sh -c 'sha256sum | cut -c1-64'`)
	b, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		out = append(out, strings.TrimSpace(line))
	}
	slices.Sort(out)
	return out
}

// sameImages compares IDs, names and diffIDs with what an engine says.
func (a *adoption) sameImages(engine func(args ...string) string, names ...string) {
	a.t.Helper()
	for _, n := range names {
		var theirs struct {
			ID     string   `json:"id"`
			Layers []string `json:"layers"`
		}
		text := engine("inspect", "--type", "image", "--format", `{"id":"{{.Id}}","layers":{{json .RootFS.Layers}}}`, n)
		if err := json.Unmarshal([]byte(text), &theirs); err != nil {
			a.t.Fatalf("%v: %s", err, text)
		}
		var ours []struct {
			ID      string   `json:"id"`
			DiffIDs []string `json:"diffIDs"`
		}
		if err := json.Unmarshal([]byte(a.run("inspect", "--json", n)), &ours); err != nil {
			a.t.Fatal(err)
		}
		if id := "sha256:" + strings.TrimPrefix(theirs.ID, "sha256:"); len(ours) != 1 || ours[0].ID != id || !slices.Equal(ours[0].DiffIDs, theirs.Layers) {
			a.t.Errorf("image %s: %+v, the engine has %+v", n, ours, theirs)
		}
	}
}

// TestAdoptDocker adopts real roots of docker, by reference where the driver keeps
// layers, and by copy.
func TestAdoptDocker(t *testing.T) {
	engine.Need(t, "dockerd", "docker", "fuse-overlayfs")
	harness.NeedRoot(t)
	for _, driver := range []string{"overlay2", "fuse-overlayfs", "vfs", "overlay"} {
		t.Run(driver, func(t *testing.T) {
			t.Parallel()
			if strings.HasPrefix(driver, "overlay") {
				harness.NeedKernelOverlay(t)
			}
			if out, err := exec.Command("dockerd", "--version").Output(); driver == "overlay" && (err != nil || !strings.Contains(string(out), "version 20.")) {
				harness.Skip(t, "the driver overlay is one of older dockers than %s", out)
			}
			w := enginePlace(t, engine.Options{}).Root
			d := w.Docker(t, "d", driver, "")
			run := func(args ...string) string { t.Helper(); return d.Run(t, append([]string{d.DockerCLI()}, args...)...) }
			run("load", "-q", "-i", baseImage(t, w))
			run("tag", engine.BaseImage, "second/name:tag")
			run("run", "--name", "work", "--network", "none", engine.BaseImage, "sh", "-c", change)
			run("commit", "work", "localhost/committed:1")
			run("create", "--name", "idle", "--network", "none", engine.BaseImage, "true")
			saved := filepath.Join(w.Home, "saved.tar")
			run("save", "-o", saved, "localhost/committed:1")
			images := []string{engine.BaseImage, "second/name:tag", "localhost/committed:1"}
			source := filepath.Join(w.Home, "d", "root")

			if driver == "overlay2" {
				// Beside a daemon: a warning, and all that is at rest.
				run("run", "-d", "--name", "busy", "--network", "none", engine.BaseImage, "sleep", "1000")
				busy := &adoption{store: newStore(t), source: source}
				cmd, done := busy.cmd("adopt", source)
				out, err := cmd.CombinedOutput()
				done()
				if err != nil || !strings.Contains(string(out), "dockerd") || !strings.Contains(string(out), "Skipped container busy: in use: it is running") {
					t.Errorf("adopt beside the daemon: %v\n%s", err, out)
				}
				run("rm", "-f", "busy")
				busy.sameImages(run, images...)
				sameText(t, "container, beside the daemon", committed(changedTree), busy.look("work"))
			}

			a := newAdoption(t, source)
			modes := []string{"--reference", "--copy"}
			if driver == "vfs" || driver == "overlay" {
				if out, err := a.try("adopt", source); err == nil || !strings.Contains(out, "--copy") {
					t.Errorf("whole trees adopted by reference: %v\n%s", err, out)
				}
				modes = modes[1:]
			}
			for _, mode := range modes {
				a := &adoption{store: newStore(t), source: a.source, before: a.before}
				a.run("adopt", mode, "--verify", source)
				a.sameImages(run, images...)
				sameText(t, mode+" image", imageTree, a.look(engine.BaseImage))
				sameText(t, mode+" container", committed(changedTree), a.look("work"))
				sameText(t, mode+" committed image", committed(changedTree), a.look("localhost/committed:1"))
				sameText(t, mode+" idle container", imageTree, a.look("idle"))
				a.check()
				ours := filepath.Join(t.TempDir(), "ours.tar")
				a.run("save", "-o", ours, "localhost/committed:1")
				have := layerDigests(t, ours)
				for _, l := range theirLayers(t, saved) {
					if !slices.Contains(have, l) {
						t.Errorf("%s: layer %s is not saved as docker saves it", mode, l)
					}
				}
				// A container of an adopted one, changed and thrown away.
				mnt := t.TempDir()
				a.run("mount", "work", mnt)
				if err := os.WriteFile(mnt+"/data/keep", []byte("again"), 0o644); err != nil {
					t.Error(err)
				}
				a.run("umount", mnt)
				a.run("commit", "work", "localhost/more:1")
				a.run("rm", "work", "idle")
				a.run("rmi", "localhost/more:1", "localhost/committed:1")
				a.run("rmi", "--force", engine.BaseImage, "second/name:tag")
				a.run("gc")
				a.check()
			}
			a.untouched()
		})
	}
}

// TestAdoptContainerd adopts what containerd has pulled and unpacked.
func TestAdoptContainerd(t *testing.T) {
	t.Parallel()
	engine.Need(t, "containerd", "ctr", "runc")
	harness.NeedRoot(t)
	harness.NeedKernelOverlay(t)
	w := enginePlace(t, engine.Options{}).Root
	dir := filepath.Join(w.Home, "c")
	conf := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = %q\n",
		dir+"/root", dir+"/state", dir+"/s")
	if err := errors.Join(os.Mkdir(dir, 0o711), os.WriteFile(dir+"/conf", []byte(conf), 0o644)); err != nil {
		t.Fatal(err)
	}
	w = w.With(map[string]string{"CONTAINERD_ADDRESS": dir + "/s"})
	w.Run(t, "sh", "-c", `set -e
containerd -c "$1/conf" > "$1/log" 2>&1 < /dev/null & echo $! > "$1/pid"
i=0; until ctr version > /dev/null 2>&1; do i=$((i+1)); test $i -lt 300; sleep 0.1; done`, "start", dir)
	stopped := false
	stop := func() {
		if !stopped {
			w.Run(t, "sh", "-c", `p=$(cat "$1"); kill "$p"; i=0; while kill -0 "$p" 2>/dev/null; do i=$((i+1)); test $i -lt 300; sleep 0.1; done`, "stop", dir+"/pid")
		}
		stopped = true
	}
	t.Cleanup(stop)
	w.Run(t, "ctr", "image", "import", "--snapshotter", "overlayfs", baseImage(t, w))
	w.Run(t, "ctr", "image", "tag", engine.BaseImage, "localhost/second:tag")
	w.Run(t, "ctr", "run", "--snapshotter", "overlayfs", engine.BaseImage, "work", "sh", "-c", change)
	stop()
	source := dir + "/root"
	for _, mode := range []string{"--reference", "--copy"} {
		a := newAdoption(t, source)
		a.run("adopt", mode, "--verify", source)
		sameText(t, mode+" image", imageTree, a.look(engine.BaseImage))
		sameText(t, mode+" second name", imageTree, a.look("localhost/second:tag"))
		sameText(t, mode+" container", committed(changedTree), a.look("work"))
		a.check()
		a.run("save", "-o", filepath.Join(t.TempDir(), "saved.tar"), engine.BaseImage)
		a.untouched()
	}
}

// theirLayers are the digests of the layers in an archive of docker save.
func theirLayers(t testing.TB, file string) []string {
	t.Helper()
	b, err := exec.Command("sh", "-c", `d=$(mktemp -d) && tar -xf "$1" -C "$d" && sha256sum "$d"/*/layer.tar | cut -c1-64; rm -rf "$d"`, "layers", file).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(b))
}

// TestAdoptPodman adopts the stores of root's podman, with and without a mount program,
// and of a user's.
func TestAdoptPodman(t *testing.T) {
	engine.Need(t, "podman")
	harness.NeedRoot(t)
	fill := func(t *testing.T, w engine.Person, program string) (p engine.Person, run func(args ...string) string, source string) {
		t.Helper()
		w = w.Store(t, "s", program)
		run = func(args ...string) string { t.Helper(); return w.Run(t, append([]string{"podman"}, args...)...) }
		run("load", "-q", "-i", baseImage(t, w))
		run("tag", engine.BaseImage, "second/name:tag")
		run("run", "--name", "work", "--network", "none", engine.BaseImage, "sh", "-c", change)
		run("commit", "-q", "work", "localhost/committed:1")
		return w, run, filepath.Dir(w.Graph())
	}
	for name, program := range map[string]string{"kernel": "", "program": program(t, "fuse-overlayfs")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.NeedKernelOverlay(t)
			_, run, source := fill(t, enginePlace(t, engine.Options{}).Root, program)
			want := run(lookIn("run", "--rm", "--network", "none", "localhost/committed:1")...)
			for _, mode := range []string{"--reference", "--copy"} {
				a := newAdoption(t, source)
				a.run("adopt", mode, "--verify", source)
				sameText(t, mode+" image", imageTree, a.look(engine.BaseImage))
				container := want
				if program != "" { // which has kept hard links together
					container = changedTree
				}
				sameText(t, mode+" container", container, a.look("work"))
				sameText(t, mode+" committed image", want, a.look("localhost/committed:1"))
				a.check()
				a.untouched()
				a.sameImages(run, engine.BaseImage, "localhost/second/name:tag", "localhost/committed:1")
			}
		})
	}
	t.Run("user", func(t *testing.T) {
		t.Parallel()
		engine.Need(t, "newuidmap")
		p := enginePlace(t, engine.Options{})
		if why := p.NeedUser(); why != "" {
			harness.Skip(t, "%s", why)
		}
		w, _, source := fill(t, p.User, program(t, "plyfs"))
		// Root may not use a user's files where they lie.
		a := newAdoption(t, source)
		if out, err := a.try("adopt", source); err == nil || !strings.Contains(out, "--copy") {
			t.Errorf("a user's store adopted by reference: %v\n%s", err, out)
		}
		plyfs := program(t, "plyfs")
		a.untouched()
		out := w.Run(t, "podman", "unshare", plyfs, "--root", filepath.Join(w.Home, "adopted"), "adopt", "--copy", source)
		if !strings.Contains(out, "2 images, 1 containers") || !strings.Contains(out, "0 skipped") {
			t.Errorf("adopted in the user's namespace: %s", out)
		}
		if out := w.Run(t, "podman", "unshare", plyfs, "--root", filepath.Join(w.Home, "adopted"), "check", "--deep"); !strings.Contains(out, "no problems") {
			t.Error(out)
		}
		tree := w.Run(t, append([]string{"podman", "unshare", plyfs, "--root", filepath.Join(w.Home, "adopted"), "shell", "--ro", "work", "--"}, lookIn()...)...)
		sameText(t, "container in the user's store", changedTree, tree)

		// Root copies it: the user's ids are found out.
		b := newAdoption(t, source)
		p.Root.Run(t, plyfs, "--root", b.root, "adopt", "--copy", source)
		b.untouched()
		sameText(t, "container of a user, copied by root", changedTree, b.look("work"))
		sameText(t, "image of a user, copied by root", imageTree, b.look(engine.BaseImage))
		b.check()
	})
}
