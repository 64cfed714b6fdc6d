package integration

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plyfs/plyfs/integration/engine"
)

// TestBuildah makes images step by step and from a file, with and without a runtime.
func TestBuildah(t *testing.T) {
	engine.Need(t, "buildah", "podman")
	eachPerson(t, func(t *testing.T, w engine.Person) {
		w = podmanStore(t, w)
		run := func(t *testing.T, args ...string) string {
			t.Helper()
			return strings.TrimSuffix(w.Run(t, append([]string{"buildah"}, args...)...), "\n")
		}
		t.Run("steps", func(t *testing.T) {
			c := run(t, "from", "--quiet", engine.BaseImage)
			file := filepath.Join(w.Home, "added")
			if err := errors.Join(os.WriteFile(file, []byte("added by copy\n"), 0o644), os.Chown(file, w.UID, w.GID)); err != nil {
				t.Fatal(err)
			}
			run(t, "copy", "--chown", "31:32", "--chmod", "4750", c, file, "/data/copied")
			run(t, "run", c, "--", "sh", "-c", change)
			const copied = "/data/copied regular file 4750 31:32 1 14 7b0c92e0\n"
			want := strings.Replace(changedTree, "/data/hard2", copied+"/data/hard2", 1)
			sameText(t, "container", want, run(t, lookIn("run", c, "--")...)+"\n")
			run(t, "run", "--volume", w.Home+"/.config:/config:O", c, "--", "sh", "-c", "touch /config/new && rm -r /config/containers")
			if _, err := os.Stat(filepath.Join(w.Home, ".config/containers/policy.json")); err != nil {
				t.Errorf("the directory of the volume has changed: %v", err)
			}
			run(t, "commit", "--quiet", c, "localhost/steps:1")
			run(t, "rm", c)
			got := w.Run(t, lookIn("podman", "run", "--rm", "localhost/steps:1")...)
			sameText(t, "image", committed(want), got)
		})
		t.Run("mount", func(t *testing.T) { buildahMount(t, w) })
		t.Run("build", func(t *testing.T) {
			// Two stages, a cache directory, and a step with a runtime instead of chroot.
			dir := filepath.Join(w.Home, "stages")
			const text = `FROM localhost/base:1 AS first
RUN mkdir /out && echo built > /out/file && chown 41:42 /out/file && chmod 4711 /out/file && ln /out/file /out/link
FROM localhost/base:1
COPY --from=first /out /out
RUN --mount=type=cache,target=/cache touch /cache/x && rm -r /kinds && cp -a /out/file /data/keep
`
			if err := errors.Join(os.Mkdir(dir, 0o755), os.Chown(dir, w.UID, w.GID), os.WriteFile(filepath.Join(dir, "Containerfile"), []byte(text), 0o644)); err != nil {
				t.Fatal(err)
			}
			runtime := "oci"
			if w.UID != 0 {
				runtime = "rootless"
			}
			for _, isolation := range []string{"chroot", runtime} {
				tag := "localhost/" + isolation + ":1"
				run(t, "build", "--quiet", "--no-cache", "--layers", "--network", "host", "--isolation", isolation, "--tag", tag, dir)
				got := w.Run(t, "podman", "run", "--rm", tag, "sh", "-c", "stat -c '%n %a %u:%g %s' /out/* /data/keep; test ! -e /kinds/file && test ! -e /cache/x")
				sameText(t, isolation, "/out/file 4711 41:42 6\n/out/link 4711 41:42 6\n/data/keep 4711 41:42 6\n", got)
			}
		})
	})
}

// buildahMount changes a container from outside, through its mount.
func buildahMount(t *testing.T, w engine.Person) {
	script := `set -eu
c=$(buildah from --quiet "$1"); m=$(buildah mount "$c")
cat "$m/data/keep"; echo outside > "$m/data/outside"; rm -r "$m/full"; mv "$m/data/hard" "$m/data/elsewhere"; chown 3:4 "$m/data/elsewhere"
buildah umount "$c" > /dev/null; test ! -e "$m/data"
buildah commit --quiet "$c" localhost/outside:1 > /dev/null; buildah rm "$c" > /dev/null`
	args := []string{"sh", "-c", script, "mount", engine.BaseImage}
	if w.UID != 0 {
		args = append([]string{"buildah", "unshare"}, args...)
	}
	sameText(t, "seen from outside", "keep\n", w.Run(t, args...))
	got := w.Run(t, "podman", "run", "--rm", "localhost/outside:1", "sh", "-c", "cat /data/outside; stat -c '%u:%g' /data/elsewhere; test ! -e /full && test ! -e /data/hard")
	sameText(t, "image", "outside\n3:4\n", got)
}
