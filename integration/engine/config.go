package engine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
)

// maxRunRoot bounds the path of podman's runtime directory: there are sockets below it.
const maxRunRoot = 50

// Store returns w with a store of images and containers of its own for podman and buildah,
// in the directory name. Layers are mounted by program, or by the kernel if it is empty.
// options are lines of storage.conf for the driver. At the end everything in it is stopped.
func (w Person) Store(t testing.TB, name, program string, options ...string) Person {
	t.Helper()
	dir := filepath.Join(w.Home, name)
	if l := max(len(filepath.Join(dir, "run")), len(filepath.Join(w.Home, runtimeDir, "containers"))); l > maxRunRoot {
		harness.Skip(t, "podman allows %d characters for its runtime directory, which would have %d", maxRunRoot, l)
	}
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Chown(dir, w.UID, w.GID)); err != nil {
		t.Fatal(err)
	}
	w = w.With(map[string]string{
		"CONTAINERS_STORAGE_CONF":    filepath.Join(dir, "storage.conf"),
		"CONTAINERS_CONF":            filepath.Join(dir, "containers.conf"),
		"CONTAINERS_REGISTRIES_CONF": filepath.Join(dir, "registries.conf"),
		"BUILDAH_ISOLATION":          "chroot", // needs no cgroups and no runtime
	})
	for key, text := range map[string]string{
		"CONTAINERS_STORAGE_CONF":    storageConf(dir, program, options),
		"CONTAINERS_CONF":            containersConf(dir),
		"CONTAINERS_REGISTRIES_CONF": "", // nothing is pulled from anywhere
	} {
		if err := os.WriteFile(w.Env[key], []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { w.stop(t) })
	return w
}

// SetProgram makes another program mount the layers of a store.
func (w Person) SetProgram(t testing.TB, program string) {
	t.Helper()
	conf := w.Env["CONTAINERS_STORAGE_CONF"]
	if err := os.WriteFile(conf, []byte(storageConf(filepath.Dir(conf), program, nil)), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Graph is the directory of the store's layers.
func (w Person) Graph() string {
	return filepath.Dir(w.Env["CONTAINERS_STORAGE_CONF"]) + privateGraph
}

// privateGraph is where, in the directory of a storage.conf, podman's layers are.
const privateGraph = "/root/overlay"

// Remove removes containers, whether they run or not. Podman's own cleaning up after a
// container can be under way, and makes it fail: it is then tried again.
func (w Person) Remove(t testing.TB, containers ...string) {
	t.Helper()
	args := append([]string{"podman", "rm", "--force", "--ignore", "--time", "0"}, containers...)
	deadline := time.Now().Add(10 * time.Second)
	for {
		res := w.Do("", args...)
		if res.Err == "" && res.Code == 0 && !res.Held {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("%q: exit code %d %s\n%s", args, res.Code, res.Err, res.Stderr)
			return
		}
		<-time.After(100 * time.Millisecond) // polling: nothing tells when it is done
	}
}

// stop ends everything that podman runs, and the process that keeps a user's namespaces.
// With its last container podman unmounts the directory of the layers itself.
func (w Person) stop(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath("podman"); err != nil {
		return
	}
	w.Remove(t, "--all")
	w.Run(t, "podman", "image", "umount", "--all", "--force")
	if w.UID != 0 {
		if os.Geteuid() != 0 { // nobody else could remove what belongs to subordinate ids
			w.Run(t, "podman", "unshare", "sh", "-c", `umount -l "$1/overlay" 2>/dev/null; rm -rf "$1"`, "remove", filepath.Dir(w.Graph()))
		}
		w.Run(t, "podman", "system", "migrate")
		return
	}
	// Made private by the first mount, and left so by commands without containers.
	for _, m := range w.place.Mounts() {
		if m == w.Graph() {
			w.Run(t, "umount", m)
		}
	}
}

// storageConf has graphroot twice: a user's podman obeys the second. The process that cleans
// up after a container is told its value, and where it finds no database podman waits
// in vain for the end of the container.
func storageConf(dir, program string, options []string) string {
	if program != "" {
		options = append([]string{fmt.Sprintf("mount_program = %q", program)}, options...)
	}
	return fmt.Sprintf(`[storage]
driver = "overlay"
graphroot = %[1]q
rootless_storage_path = %[1]q
runroot = %[2]q
[storage.options.overlay]
%[3]s
`, filepath.Join(dir, "root"), filepath.Join(dir, "run"), strings.Join(options, "\n"))
}

// containersConf asks for what works in most places: limits that the process has anyway,
// cgroups without systemd, runc, which takes every arrangement of cgroups.
func containersConf(dir string) string {
	runtime := "runc"
	if _, err := exec.LookPath(runtime); err != nil {
		runtime = "crun"
	}
	return fmt.Sprintf(`[containers]
default_ulimits = ["nofile=%[1]d:%[1]d", "nproc=%[2]d:%[2]d"]
netns = "none"
[engine]
runtime = %[3]q
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = %[4]q
volume_path = %[5]q
`, hardLimit(unix.RLIMIT_NOFILE, 16384), hardLimit(unix.RLIMIT_NPROC, 32768), runtime, filepath.Join(dir, "tmp"), filepath.Join(dir, "volumes"))
}

// hardLimit is a limit that nobody needs a privilege to set.
func hardLimit(what int, most uint64) uint64 {
	var l unix.Rlimit
	if err := unix.Getrlimit(what, &l); err != nil {
		return most
	}
	return min(l.Max, most)
}

// Need skips unless the programs are installed.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			harness.Skip(t, "%s is not installed", p)
		}
	}
}
