package integration

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/plyfs/plyfs/integration/engine"
)

// podmanStore returns w with a store of podman that holds the image. Root's podman calls the
// binary as fuse-overlayfs and a user's by its own name: both must work the same way.
func podmanStore(t *testing.T, w engine.Person, options ...string) engine.Person {
	t.Helper()
	name := "fuse-overlayfs"
	if w.UID != 0 {
		name = "plyfs"
	}
	w = w.Store(t, "s", program(t, name), options...)
	w.Run(t, "podman", "load", "-q", "-i", baseImage(t, w))
	return w
}

// lookIn describes the directories that all tests of engines work in.
func lookIn(prefix ...string) []string {
	return append(prefix, "sh", "-c", engine.Look, "look", "/data", "/full", "/kinds", "/made")
}

// change is what tests do in a container: every kind of change of what the layers have.
const change = `set -eu
mkdir /made /made/dir; echo made > /made/file; ln /made/file /made/link; ln -s file /made/sym; mkfifo /made/fifo
chown 11:12 /made/dir; chmod 2750 /made/dir; chown 13:14 /made/file; chmod 4555 /made/file
echo more >> /data/keep; rm /data/changed; chmod 600 /data/added; chown 1:2 /data/attr; mv /data/hard /data/moved
rm -r /full; mkdir /full; echo only > /full/only
rm -r /kinds/file; echo file > /kinds/file; rm /kinds/dir; mkdir /kinds/dir; rm /kinds/fifo`

// changedTree is what engine.Look says after change.
const changedTree = `/data directory 755 0:0
/data/added regular file 600 1000:5 1 6 3428719b
/data/attr regular file 644 1:2 1 5 b6545831
/data/hard2 regular file 644 1000:1000 2 5 87e434e0
/data/keep regular file 644 5:6 1 10 d5b56c0b
/data/moved regular file 644 1000:1000 2 5 87e434e0
/data/suid regular file 4711 7:8 1 5 3efa6038
/full directory 755 0:0
/full/only regular file 644 0:0 1 5 321b4285
/kinds directory 755 0:0
/kinds/dir directory 755 0:0
/kinds/file regular file 644 0:0 1 5 8b911a87
'/kinds/link' -> 'file' 0:0
/made directory 755 0:0
/made/dir directory 2750 11:12
/made/fifo fifo 644 0:0
/made/file regular file 4555 13:14 2 5 9ccbd3f1
/made/link regular file 4555 13:14 2 5 9ccbd3f1
'/made/sym' -> 'file' 0:0
`

// changedNames is what diff says of it, sorted. Podman itself puts mount points into /etc.
const changedNames = `A /data/moved
A /full/only
A /made
A /made/dir
A /made/fifo
A /made/file
A /made/link
A /made/sym
C /data
C /data/attr
C /data/keep
C /full
C /kinds
C /kinds/dir
C /kinds/file
D /data/changed
D /data/hard
D /full/new
D /kinds/fifo
`

// committed is a tree as an image has it: a layer that holds one of two hard links cannot
// say that the other is in a layer below.
func committed(tree string) string {
	return strings.Replace(tree, "/data/moved regular file 644 1000:1000 2", "/data/moved regular file 644 1000:1000 1", 1)
}

func sortedLines(s string, skip ...string) string {
	lines := strings.SplitAfter(s, "\n")
	lines = slices.DeleteFunc(lines, func(l string) bool {
		return slices.ContainsFunc(skip, func(s string) bool { return strings.Contains(l, s) })
	})
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// TestPodman runs, changes, copies, commits and mounts.
func TestPodman(t *testing.T) {
	engine.Need(t, "podman")
	eachPerson(t, func(t *testing.T, w engine.Person) {
		w = podmanStore(t, w)
		run := func(args ...string) string { t.Helper(); return w.Run(t, append([]string{"podman"}, args...)...) }

		sameText(t, "image", imageTree, run(lookIn("run", "--rm", engine.BaseImage)...))
		if version := run("info", "--format", "{{index .Store.GraphOptions \"overlay.mount_program\"}}"); !strings.Contains(version, "plyfs") {
			t.Errorf("podman info does not say what mounts: %s", version)
		}

		run("run", "-d", "--name", "c", engine.BaseImage, "sleep", "1000")
		run("exec", "c", "sh", "-c", change)
		sameText(t, "container", changedTree, run(lookIn("exec", "c")...))
		sameText(t, "diff of the container", changedNames, sortedLines(run("diff", "c"), "/etc"))

		// Mounted again, with the upper as it is.
		run("stop", "--time", "0", "c")
		run("start", "c")
		sameText(t, "container after a restart", changedTree, run(lookIn("exec", "c")...))

		t.Run("cp", func(t *testing.T) { podmanCopy(t, w, "c") })

		run("commit", "-q", "c", "localhost/committed:1")
		w.Remove(t, "c")
		sameText(t, "committed image", committed(changedTree), run(lookIn("run", "--rm", "localhost/committed:1")...))
		sameText(t, "diff of the image", changedNames, sortedLines(run("diff", "localhost/committed:1"), "/etc"))

		t.Run("image mount", func(t *testing.T) { podmanImageMount(t, w, "localhost/committed:1") })
		t.Run("image volume", func(t *testing.T) {
			const look = `cat /im/made/file; find /im/full; touch /im/new && echo writable`
			out := w.Do("", "podman", "run", "--rm", "--mount", "type=image,source=localhost/committed:1,destination=/im", engine.BaseImage, "sh", "-c", look)
			sameText(t, "read-only", "made\n/im/full\n/im/full/only\n", out.Stdout)
			if !strings.Contains(out.Stderr, "Read-only file system") {
				t.Errorf("a volume that is read-only says: %s", out.Stderr)
			}
			got := run("run", "--rm", "--mount", "type=image,source=localhost/committed:1,destination=/im,rw=true", engine.BaseImage, "sh", "-c", look)
			sameText(t, "writable", "made\n/im/full\n/im/full/only\nwritable\n", got)
		})
		t.Run("read-only", func(t *testing.T) {
			out := w.Do("", "podman", "run", "--rm", "--read-only", "--read-only-tmpfs=false", engine.BaseImage, "sh", "-c", "cat /data/keep; touch /data/new")
			if out.Stdout != "keep\n" || !strings.Contains(out.Stderr, "Read-only file system") {
				t.Errorf("--read-only: %+v", out)
			}
		})
		t.Run("volumes", func(t *testing.T) { podmanVolumes(t, w) })
		t.Run("at once", func(t *testing.T) {
			var all sync.WaitGroup
			for i := range 6 {
				all.Go(func() {
					res := w.Do("", "podman", "run", "--rm", engine.BaseImage, "sh", "-c",
						fmt.Sprintf("echo %d >> /data/keep; rm -r /kinds; cat /data/keep; ls -d /kinds 2>&1", i))
					if want := fmt.Sprintf("keep\n%d\nls: /kinds: No such file or directory\n", i); res.Stdout != want || res.Held {
						t.Errorf("container %d: %+v", i, res)
					}
				})
			}
			all.Wait()
		})
	})
}

// TestPodmanChangesProgram: a container that was written with fuse-overlayfs is the same with
// plyfs, and the reverse.
func TestPodmanChangesProgram(t *testing.T) {
	engine.Need(t, "podman", "fuse-overlayfs")
	peer, err := exec.LookPath("fuse-overlayfs")
	if err != nil {
		t.Fatal(err)
	}
	eachPerson(t, func(t *testing.T, w engine.Person) {
		w = w.Store(t, "s", peer)
		w.Run(t, "podman", "load", "-q", "-i", baseImage(t, w))
		w.Run(t, "podman", "run", "-d", "--name", "c", engine.BaseImage, "sleep", "1000")
		w.Run(t, "podman", "exec", "c", "sh", "-c", change)
		// Neither knows of the other's links between copies and files of the image.
		links := regexp.MustCompile(`(?m)^(/data/.* )\d+ (\d+ [0-9a-f]{8})$`)
		look := func() string {
			t.Helper()
			return links.ReplaceAllString(w.Run(t, lookIn("podman", "exec", "c")...), "$1 $2")
		}
		want := look()
		for i, to := range []string{program(t, "plyfs"), peer} {
			w.Run(t, "podman", "stop", "--time", "0", "c")
			w.SetProgram(t, to)
			w.Run(t, "podman", "start", "c")
			sameText(t, "with "+to, want, look())
			if i == 0 {
				w.Run(t, "podman", "exec", "c", "sh", "-c", "rm -r /made /data/keep /data/added; mkdir /made; echo again > /made/again; mv /full/only /made/only; echo x >> /data/attr")
				want = look()
			}
		}
	})
}

// podmanCopy copies into and out of a running container.
func podmanCopy(t *testing.T, w engine.Person, name string) {
	file := filepath.Join(w.Home, "in")
	if err := errors.Join(os.WriteFile(file, []byte("copied in\n"), 0o640), os.Chown(file, w.UID, w.GID)); err != nil {
		t.Fatal(err)
	}
	w.Run(t, "podman", "cp", file, name+":/data/in")
	if got := w.Run(t, "podman", "exec", name, "sh", "-c", "stat -c '%a %u:%g' /data/in; cat /data/in; rm /data/in"); got != "640 0:0\ncopied in\n" {
		t.Errorf("copied in: %q", got)
	}
	out := w.Run(t, "podman", "cp", name+":/made/file", "-")
	tr := tar.NewReader(strings.NewReader(out))
	h, err := tr.Next()
	if err != nil {
		t.Fatal(err)
	}
	content, err := io.ReadAll(tr)
	if err != nil || string(content) != "made\n" || h.Mode&0o7777 != 0o4555 {
		t.Errorf("copied out: %+v %q %v", h, content, err)
	}
}

// podmanImageMount looks at an image from outside: read-only, and gone afterwards.
func podmanImageMount(t *testing.T, w engine.Person, image string) {
	script := `set -eu
m=$(podman image mount "$1")
cat "$m/made/file"; find "$m/full" | sed "s|$m||"; stat -c '%a %u:%g' "$m/made/dir"
touch "$m/new" 2>&1 | sed 's/.*: //'
podman image umount "$1" > /dev/null; test ! -e "$m/made"`
	args := []string{"sh", "-c", script, "mount", image}
	if w.UID != 0 {
		args = append([]string{"podman", "unshare"}, args...)
	}
	sameText(t, "mounted image", "made\n/full\n/full/only\n2750 11:12\nRead-only file system\n", w.Run(t, args...))
}

// podmanVolumes mounts directories of the host in a container with a layer of its own: :O.
func podmanVolumes(t *testing.T, w engine.Person) {
	dir := filepath.Join(w.Home, "volume dir")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "old"), []byte("old\n"), 0o644),
		os.Chown(dir, w.UID, w.GID), os.Chown(filepath.Join(dir, "old"), w.UID, w.GID)); err != nil {
		t.Fatal(err)
	}
	got := w.Run(t, "podman", "run", "--rm", "-v", dir+":/v:O", engine.BaseImage, "sh", "-c",
		"cat /v/old; echo more >> /v/old; touch /v/new; cat /v/old; rm /v/old; find /v | sort")
	sameText(t, "volume", "old\nold\nmore\n/v\n/v/new\n", got)
	if b, err := os.ReadFile(filepath.Join(dir, "old")); err != nil || string(b) != "old\n" {
		t.Errorf("the directory of the volume has changed: %q %v", b, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "new")); err == nil {
		t.Error("a new file is in the directory of the volume")
	}
}
