package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/engine"
	"github.com/plyfs/plyfs/integration/harness"
)

// containerdPlace is a containerd with plyfs snapshotter as its plugin, both in a place.
type containerdPlace struct {
	engine.Person
	dir string
}

// newContainerd starts both. They end with the test.
func newContainerd(t *testing.T) containerdPlace {
	t.Helper()
	engine.Need(t, "containerd", "ctr", "runc")
	harness.NeedRoot(t)
	c := containerdPlace{Person: enginePlace(t, engine.Options{}).Root}
	c.dir = filepath.Join(c.Home, "c")
	// Containers with shifted ids go along the whole path.
	if err := errors.Join(os.Mkdir(c.dir, 0o711), os.Chmod(c.Home, 0o711)); err != nil {
		t.Fatal(err)
	}
	conf := fmt.Sprintf(`version = 2
root = "%[1]s/root"
state = "%[1]s/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "%[1]s/c.sock"
[proxy_plugins.plyfs]
  type = "snapshot"
  address = "%[1]s/s.sock"
  capabilities = ["remap-ids"] # this, and all below, is for 2.x
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/%[2]s"
  snapshotter = "plyfs"
`, c.dir, runtime.GOARCH)
	if err := os.WriteFile(filepath.Join(c.dir, "conf"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	space := fmt.Sprintf("plyfs-%d-%s", os.Getpid(), filepath.Base(c.Place().Dir)) // runtimes have one directory for all daemons
	c.Person = c.With(map[string]string{
		"CONTAINERD_ADDRESS": c.dir + "/c.sock", "CONTAINERD_SNAPSHOTTER": "plyfs", "CONTAINERD_NAMESPACE": space,
	})
	t.Cleanup(func() { // runc leaves it there, empty
		if err := os.Remove("/run/containerd/runc/" + space); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	})
	c.startSnapshotter(t)
	t.Cleanup(func() { c.stop(t, "snapshotter") })
	c.start(t, "containerd", "containerd", "-c", c.dir+"/conf")
	t.Cleanup(func() { c.stop(t, "containerd") })
	c.wait(t, "containerd", func() bool { return c.Do("", "ctr", "version").Code == 0 })
	return c
}

func (c containerdPlace) startSnapshotter(t *testing.T) {
	t.Helper()
	c.start(t, "snapshotter", program(t, "plyfs"), "snapshotter", "--root", c.dir+"/snap", "--address", c.dir+"/s.sock")
	c.wait(t, "snapshotter", func() bool {
		log, err := os.ReadFile(c.dir + "/snapshotter.log")
		return err == nil && strings.Contains(string(log), "snapshotter is ready")
	})
}

// start runs a daemon in the background, as a service manager has it.
func (c containerdPlace) start(t *testing.T, name string, args ...string) {
	t.Helper()
	c.Run(t, append([]string{"sh", "-c", `cd "$1"; n=$2; shift 2; "$@" > "$n.log" 2>&1 < /dev/null & echo $! > "$n.pid"`, "start", c.dir, name}, args...)...)
}

func (c containerdPlace) wait(t *testing.T, name string, ready func() bool) {
	t.Helper()
	for deadline := time.Now().Add(40 * time.Second); !ready(); {
		if time.Now().After(deadline) {
			log, err := os.ReadFile(filepath.Join(c.dir, name+".log"))
			t.Fatalf("%s: what was waited for does not happen: %v\n%s", name, err, log)
		}
		<-time.After(100 * time.Millisecond) // polling: nothing tells
	}
}

func (c containerdPlace) stop(t *testing.T, name string) {
	t.Helper()
	res := c.Do("", "sh", "-c", `set -e; p=$(cat "$1"); kill "$p"; i=0; while kill -0 "$p" 2>/dev/null; do i=$((i+1)); test $i -lt 300; sleep 0.1; done`,
		"stop", filepath.Join(c.dir, name+".pid"))
	if res.Code != 0 || res.Err != "" {
		t.Errorf("%s does not stop: %s%s", name, res.Err, res.Stderr)
	}
	if t.Failed() {
		log, err := os.ReadFile(filepath.Join(c.dir, name+".log"))
		t.Logf("%s says: %v\n%s", name, err, log)
	}
}

// exec runs a program in a container that runs.
func (c containerdPlace) exec(t *testing.T, container string, args ...string) string {
	t.Helper()
	id := fmt.Sprintf("e%d", time.Now().UnixNano())
	return c.Run(t, append([]string{"ctr", "task", "exec", "--exec-id", id, container}, args...)...)
}

// TestContainerd runs containers on snapshots of ours, while the snapshotter comes and goes.
func TestContainerd(t *testing.T) {
	t.Parallel()
	c := newContainerd(t)
	run := func(args ...string) string { t.Helper(); return c.Run(t, append([]string{"ctr"}, args...)...) }

	run("image", "import", "--snapshotter", "plyfs", baseImage(t, c.Person))
	sameText(t, "image", imageTree, run(lookIn("run", "--rm", engine.BaseImage, "once")...))

	run("run", "-d", engine.BaseImage, "work", "sleep", "1000")
	if m := c.exec(t, "work", "mount"); !strings.Contains(m, "on / type fuse.plyfs") {
		t.Errorf("the root of a container is not a union of plyfs:\n%s", m)
	}
	c.exec(t, "work", "sh", "-c", change)
	sameText(t, "container", changedTree, c.exec(t, "work", lookIn()...))
	if u := run("snapshot", "usage", "work"); !strings.Contains(u, "KiB") {
		t.Errorf("usage of the container's snapshot:\n%s", u)
	}

	// The container goes on without the snapshotter, and with the next one.
	c.stop(t, "snapshotter")
	c.exec(t, "work", "sh", "-c", "echo alone > /data/alone; cat /data/alone")
	c.startSnapshotter(t)
	c.exec(t, "work", "rm", "/data/alone")
	run("task", "kill", "-s", "KILL", "work")
	c.wait(t, "containerd", func() bool { return c.Do("", "ctr", "task", "rm", "work").Code == 0 })
	run("task", "start", "-d", "work") // asks for the mounts again
	sameText(t, "container that was started again", changedTree, c.exec(t, "work", lookIn()...))
	run("task", "kill", "-s", "KILL", "work")
	c.wait(t, "containerd", func() bool { return c.Do("", "ctr", "task", "rm", "work").Code == 0 })

	// A commit makes a layer of what has changed, which others can be put on.
	run("snapshot", "commit", "changed", "work")
	run("snapshot", "prepare", "next", "changed")
	dir := filepath.Join(c.Home, "next")
	c.Run(t, "sh", "-c", `mkdir "$1" && $(ctr snapshot mounts "$1" next) && cat "$1/data/keep" && rm "$1/data/keep" && umount "$1"`, "look", dir)
	run("snapshot", "rm", "next")
	run("snapshot", "rm", "changed")

	// Shifted ids, by labels: the layers keep theirs.
	const ids = "0:100000:65536"
	owners := run("run", "--rm", "--uidmap", ids, "--gidmap", ids, "--remap-labels", engine.BaseImage, "mapped",
		"sh", "-c", "stat -c %u:%g /bin/busybox /data/keep && echo x > /data/mine && stat -c %u:%g /data/mine")
	sameText(t, "owners with shifted ids", "0:0\n5:6\n0:0\n", owners)

	run("container", "rm", "work")
	run("image", "rm", "--sync", engine.BaseImage)
	if left := strings.Count(run("snapshot", "ls"), "\n"); left != 1 { // the head of the table
		t.Errorf("snapshots are left:\n%s", run("snapshot", "ls"))
	}
	c.empty(t)
}

// empty waits until nothing is left of any snapshot: containerd has them removed when it
// collects garbage, and their directories are deleted in the background. A collection is
// asked for: containerd 1.6 forgets about what is removed while one is running, and starts
// no other until more is removed.
func (c containerdPlace) empty(t *testing.T) {
	t.Helper()
	c.wait(t, "snapshotter", func() bool {
		c.Run(t, "sh", "-c", `l=$(ctr leases create) && ctr leases rm --sync "$l"`)
		snapshots, err := os.ReadDir(c.dir + "/snap/snapshots")
		trash, terr := os.ReadDir(c.dir + "/snap/trash")
		return err == nil && terr == nil && len(snapshots)+len(trash) == 0
	})
	for _, m := range c.Place().Mounts() {
		t.Errorf("still mounted: %s", m)
	}
}

// unionOf mounts a snapshot on a new directory, and returns that and the mount point of the union.
func (c containerdPlace) unionOf(t *testing.T, name string) (dir, union string) {
	t.Helper()
	dir = filepath.Join(c.Home, name)
	c.Run(t, "sh", "-c", `mkdir -p "$1" && $(ctr snapshot mounts "$1" "$2")`, "mount", dir, name)
	for _, m := range c.Place().Mounts() {
		if strings.HasSuffix(m, "/mnt") {
			union = m
		}
	}
	return dir, union
}

// TestSnapshotterUnions: what becomes of unions that are in use, or have lost their processes.
func TestSnapshotterUnions(t *testing.T) {
	t.Parallel()
	c := newContainerd(t)
	run := func(args ...string) string {
		t.Helper()
		return c.Run(t, append([]string{"ctr", "snapshot"}, args...)...)
	}
	run("prepare", "a", "")
	run("commit", "base", "a")
	run("prepare", "work", "base")
	dir, union := c.unionOf(t, "work")

	// Nobody is left to serve it: the next call of Mounts mounts it anew.
	c.Run(t, "sh", "-c", `echo kept > "$1/file"; sync "$1/file"
for p in /proc/[0-9]*; do
if tr '\0' ' ' < $p/cmdline 2>/dev/null | grep -q "mount-[hs][a-z]* $2 "; then kill -KILL ${p#/proc/}; fi; done
umount "$1" 2>/dev/null || :`, "kill", dir, union) // the holder, if it was the second, has detached all
	c.wait(t, "snapshotter", func() bool { // the kernel ends a connection in its own time
		return c.Do("", "sh", "-c", `$(ctr snapshot mounts "$1" work) && cat "$1/file"`, "mount", dir).Stdout == "kept\n"
	})

	// A commit that ended halfway has left it read-only.
	c.Run(t, "sh", "-c", `mount -i -o remount,ro "$2" && umount "$1" && $(ctr snapshot mounts "$1" work) && echo again > "$1/again" && rm "$1/again"`, "thaw", dir, union)

	// Open for writing: not committed. Merely bound: committed, and not changed any more.
	script := `exec 3> "$1/open"; ctr snapshot commit done work; test $? = 1; exec 3>&-; echo more >> "$1/file"
ctr snapshot commit done work; ! echo late >> "$1/file"; cat "$1/file"; umount "$1"`
	if got := c.Run(t, "sh", "-c", script+" 2>/dev/null", "commit", dir); got != "kept\nmore\n" {
		t.Errorf("a union in use was committed: %q", got)
	}
	run("prepare", "next", "done")
	dir, _ = c.unionOf(t, "next")
	if got := c.Run(t, "sh", "-c", `cat "$1/file"; cd "$1"; ctr snapshot rm next; umount "$1" 2>/dev/null || umount -l "$1"`, "rm", dir); got != "kept\nmore\n" {
		t.Errorf("the committed layer has %q", got)
	}
	run("rm", "done")
	run("rm", "base")
	c.empty(t)
}

// TestSnapshotterKilled: an image is right although the snapshotter was killed while it was
// unpacked.
func TestSnapshotterKilled(t *testing.T) {
	t.Parallel()
	c := newContainerd(t)
	file := baseImage(t, c.Person)
	for i := range 3 {
		c.Run(t, "sh", "-c", `cd "$1"; ctr image import "$2" > import.log 2>&1 < /dev/null & sleep 0.$3; kill -KILL "$(cat "$1/snapshotter.pid")"; wait`,
			"kill", c.dir, file, fmt.Sprint(i+1))
		c.startSnapshotter(t)
		c.wait(t, "snapshotter", func() bool { // containerd takes its time to connect again
			return c.Do("", "ctr", "image", "import", file).Code == 0
		})
		sameText(t, "image", imageTree, c.Run(t, lookIn("ctr", "run", "--rm", engine.BaseImage, fmt.Sprintf("look%d", i))...))
		c.Run(t, "ctr", "image", "rm", "--sync", engine.BaseImage)
		c.empty(t)
	}
}

// TestSnapshotterAlone: a root and a socket belong to one snapshotter.
func TestSnapshotterAlone(t *testing.T) {
	t.Parallel()
	harness.NeedRoot(t)
	c := containerdPlace{Person: enginePlace(t, engine.Options{}).Root}
	c.dir = c.Home
	c.startSnapshotter(t)
	plyfs := program(t, "plyfs")
	if says := c.Fail(t, 4, plyfs, "snapshotter", "--root", c.dir+"/snap", "--address", c.dir+"/other.sock"); !strings.Contains(says, "another process has it open") {
		t.Errorf("a second snapshotter of the same root says %q", says)
	}
	if says := c.Fail(t, 4, plyfs, "snapshotter", "--root", c.dir+"/other", "--address", c.dir+"/s.sock"); !strings.Contains(says, "in use") {
		t.Errorf("a second snapshotter on the same socket says %q", says)
	}
	if st, err := os.Stat(c.dir + "/s.sock"); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v %v", st.Mode(), err)
	}
	c.stop(t, "snapshotter")
}
