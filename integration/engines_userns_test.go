package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plyfs/plyfs/integration/engine"
)

// inUserns changes files in a container with shifted ids, and shows what it sees.
const inUserns = `set -eu
cat /proc/self/uid_map | tr -s ' '
echo more >> /data/keep; touch /made; chown 21:22 /made; chmod 4711 /made; chown 5:5 /data/added
stat -c '%n %a %u:%g' /data/keep /data/suid /data/added /data/hard /full /made`

const inUsernsSays = `/data/keep 644 5:6
/data/suid 4711 7:8
/data/added 600 5:5
/data/hard 644 1000:1000
/full 750 2:3
/made 4711 21:22
`

// TestPodmanUserNamespace runs containers whose ids are shifted. Nobody may copy or chown
// the image for it: no layer is added but the container's own, and the files of the
// layers keep their owners.
func TestPodmanUserNamespace(t *testing.T) {
	engine.Need(t, "podman")
	eachPerson(t, func(t *testing.T, w engine.Person) {
		w = podmanStore(t, w)
		before := layerDirs(t, w)
		type trial struct {
			name  string
			args  []string
			idMap string // as the container sees it
		}
		trials := []trial{
			{"map", []string{"--uidmap=0:100000:65536", "--gidmap=0:100000:65536"}, " 0 100000 65536\n"},
			{"auto", []string{"--userns=auto:size=4096"}, " 0 2000000 4096\n"},
			// Where the file system of the layers has no idmapped mounts, the union shifts alone.
			{"shift", []string{"--uidmap=0:100000:65536", "--gidmap=0:100000:65536"}, " 0 100000 65536\n"},
		}
		if w.UID != 0 {
			trials = []trial{
				{"map", []string{"--uidmap=0:1:5000", "--gidmap=0:1:5000"}, " 0 1 5000\n"},
				{"keep-id", []string{"--userns=keep-id", "--user=0"}, ""},
				{"auto", []string{"--userns=auto:size=4096"}, " 0 1 4096\n"},
			}
		}
		for _, tr := range trials {
			t.Run(tr.name, func(t *testing.T) {
				w := w
				if tr.name == "shift" {
					w = w.With(map[string]string{"_CONTAINERS_OVERLAY_DISABLE_IDMAP": "yes"})
				}
				args := append(append([]string{"podman", "run", "--name", tr.name}, tr.args...), engine.BaseImage, "sh", "-c", inUserns)
				got := w.Run(t, args...)
				if !strings.HasSuffix(got, inUsernsSays) || !strings.HasPrefix(got, tr.idMap) {
					t.Errorf("%q shows:\n%s", args, got)
				}
				if dirs := layerDirs(t, w); len(dirs) != len(before)+1 {
					t.Errorf("%d layers were added to %d, and not the container's only", len(dirs)-len(before), len(before))
				}
				// What the container wrote has the owners it saw, whatever they are on the disk.
				w.Run(t, "podman", "commit", "-q", tr.name, "localhost/"+tr.name+":1")
				w.Remove(t, tr.name)
				got = w.Run(t, "podman", "run", "--rm", "localhost/"+tr.name+":1", "stat", "-c", "%n %a %u:%g", "/data/keep", "/data/suid", "/data/added", "/data/hard", "/full", "/made")
				sameText(t, "committed", inUsernsSays, got)
				w.Run(t, "podman", "rmi", "localhost/"+tr.name+":1")
			})
		}
		if dirs := layerDirs(t, w); len(dirs) != len(before) {
			t.Errorf("layers at the end: %q, at the start: %q", dirs, before)
		}
	})
}

// layerDirs lists the directories of layers in a store.
func layerDirs(t *testing.T, w engine.Person) []string {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(w.Graph(), "*", "diff"))
	if err != nil || len(dirs) == 0 {
		t.Fatalf("no layers: %v", err)
	}
	for _, d := range dirs {
		if _, err := os.Stat(d); err != nil {
			t.Fatal(err)
		}
	}
	return dirs
}

// TestPodmanForceMask keeps owners and modes in attributes, as on file systems that cannot
// hold them, and gives all files of the layers one mode.
func TestPodmanForceMask(t *testing.T) {
	engine.Need(t, "podman")
	eachPerson(t, func(t *testing.T, w engine.Person) {
		// Podman 4.3 cannot load a pipe then, since only files and directories can have the
		// attribute, and writes down modes without set-user-id bits.
		file := filepath.Join(w.Home, "nofifo.tar")
		engine.Image(t, file, "kinds/fifo")
		loaded := strings.NewReplacer("/kinds/fifo fifo 644 0:0\n", "", "/data/suid regular file 4711", "/data/suid regular file 711").Replace

		w = w.Store(t, "s", program(t, "fuse-overlayfs"), `force_mask = "700"`)
		w.Run(t, "podman", "load", "-q", "-i", file)
		sameText(t, "image", loaded(imageTree), w.Run(t, lookIn("podman", "run", "--rm", engine.BaseImage)...))
		w.Run(t, "podman", "run", "-d", "--name", "c", engine.BaseImage, "sleep", "1000")
		w.Run(t, "podman", "exec", "c", "sh", "-c", strings.Replace(change, "; rm /kinds/fifo", "", 1))
		sameText(t, "container", loaded(changedTree), w.Run(t, lookIn("podman", "exec", "c")...))
	})
}
