package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plyfs/plyfs/integration/engine"
)

// rootlessContainerd is what containerd's own script for users does, as far as we need it: both
// daemons in the namespaces of rootlesskit, and then $@ in there as well. Limits need a control group
// that belongs to the user, which a test cannot ask for.
const rootlessContainerd = `set -e
dir=$HOME/c; mkdir -p "$dir"
# What was copied up to the namespace's own /run are links to what belongs to root.
rm -f /run/containerd /run/runc; mkdir -p /run/containerd
cat > "$dir/conf" <<-end
	version = 2
	root = "$dir/root"
	state = "$dir/state"
	disabled_plugins = ["io.containerd.grpc.v1.cri"]
	[grpc]
	  address = "$dir/c.sock"
	[proxy_plugins.plyfs]
	  type = "snapshot"
	  address = "$dir/s.sock"
end
"$plyfs" snapshotter --root "$dir/snap" --address "$dir/s.sock" > "$dir/snapshotter.log" 2>&1 &
s=$!
containerd -c "$dir/conf" > "$dir/containerd.log" 2>&1 &
c=$!
trap 'kill $c $s; wait' EXIT
export CONTAINERD_ADDRESS="$dir/c.sock" CONTAINERD_SNAPSHOTTER=plyfs
i=0; until ctr version > /dev/null 2>&1; do i=$((i+1)); test $i -lt 100; sleep 0.1; done
`

// TestContainerdRootless: a user has containerd and the snapshotter under rootlesskit, and containers
// with the ids of the user's range.
func TestContainerdRootless(t *testing.T) {
	t.Parallel()
	engine.Need(t, "containerd", "ctr", "runc", "rootlesskit", "newuidmap")
	p := enginePlace(t, engine.Options{})
	if why := p.NeedSubIDs(); why != "" {
		t.Skip(why)
	}
	file := filepath.Join(p.User.Home, "base.tar")
	engine.Image(t, file)
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	u := p.User.With(map[string]string{"plyfs": program(t, "plyfs"), "file": file, "image": engine.BaseImage})
	inside := func(name, script string) string {
		t.Helper()
		return u.Run(t, "rootlesskit", "--state-dir="+filepath.Join(u.Home, "rk-"+name), "--copy-up=/etc", "--copy-up=/run", "sh", "-c", rootlessContainerd+script)
	}
	// --cgroup and --cpu-shares: see above.
	out := inside("one", `
ctr image import "$file" >&2
ctr run --rm --cgroup "" --cpu-shares 0 "$image" look sh -c 'mount; id -u; stat -c %u:%g /bin/busybox; echo kept > /data/new; cat /data/new' 2>&1
ctr run -d --cgroup "" --cpu-shares 0 "$image" work sleep 1000
ctr task exec --exec-id a work sh -c 'echo kept > /data/kept; chown 5:6 /data/kept'
ctr task kill -s KILL work; i=0; until ctr task rm work > /dev/null 2>&1; do i=$((i+1)); test $i -lt 100; sleep 0.1; done
`)
	for _, want := range []string{"plyfs on / type fuse.plyfs", "\n0\n0:0\nkept\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("the container does not say %q:\n%s", want, out)
		}
	}
	// Another day: the namespaces, both daemons and all mounts are new.
	out = inside("two", `
ctr task start -d work
ctr task exec --exec-id b work sh -c 'cat /data/kept; stat -c %u:%g /data/kept'
ctr task kill -s KILL work; i=0; until ctr task rm work > /dev/null 2>&1; do i=$((i+1)); test $i -lt 100; sleep 0.1; done
ctr container rm work; ctr image rm --sync "$image" >&2
ctr snapshot ls | tail -n +2
`)
	if out != "kept\n5:6\n" {
		t.Errorf("what was written the day before: %q", out)
	}
}
