package integration

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// ownersCase mounts a small stack with options about owners and looks at both sides.
type ownersCase struct {
	name    string
	options string
	// script runs in the mount; want is what it prints. upper is what the upper then
	// has, as `stat -c '%n %u:%g %a'` tells.
	script, want, upper string
	// peer says that fuse-overlayfs does the same.
	peer bool
}

var ownersCases = []ownersCase{
	{
		name: "ids are mapped both ways", peer: true,
		options: "uidmapping=:0:100000:65536,gidmapping=0:100000:65536",
		script:  `stat -c '%n %u:%g' . a b d; touch new; chown 100003:100004 new; chown 100001 a; stat -c '%n %u:%g' a new`,
		want: `. 100000:100000
a 100005:100006
b 65534:65534
d 101000:101000
a 100001:100006
new 100003:100004
`,
		upper: "a 1:6 644\nnew 3:4 644\n",
	},
	{
		name: "several ranges, and users who are none of them", peer: true,
		options: "uidmapping=0:200:1:5:300:2:1000:0:1,gidmapping=0:0:2000",
		script:  `stat -c '%n %u:%g' a d; umask 0; chown 299 a; stat -c '%n %u' a; touch r; stat -c '%n %u:%g' r`,
		want:    "a 300:6\nd 0:1000\na 65534\nr 0:0\n",
		upper:   "a 65534:6 644\nr 1000:0 666\n",
	},
	{
		name:    "ids in ACLs are mapped",
		options: "uidmapping=0:100000:65536,gidmapping=0:100000:65536",
		script: `setfacl -m u:100009:r,g:100010:rw a; getfacl -cn a | grep -v '^$'; getfacl -cn acl | grep :7:
setfacl -d -m u:100011:rwx d; mkdir d/sub; getfacl -cn d/sub | grep 100011`,
		want: `user::rw-
user:100009:r--
group::r--
group:100010:rw-
mask::rw-
other::r--
default:user:100011:rwx
user:100011:rwx
`,
	},
	{
		name: "squashed to ids", peer: true,
		options: "squash_to_uid=42,squash_to_gid=43",
		script:  `stat -c '%n %u:%g' . a b; chown 9:9 a; stat -c '%n %u:%g' a; touch new; stat -c '%n %u:%g' new`,
		want:    ". 42:43\na 42:43\nb 42:43\na 42:43\nnew 42:43\n",
		upper:   "a 9:9 644\nnew 0:0 644\n",
	},
	{
		name: "squashed to root, an id before that", peer: true,
		options: "squash_to_gid=7,squash_to_root",
		script:  `stat -c '%n %u:%g' a b`,
		want:    "a 0:7\nb 0:7\n",
	},
	{
		name:    "owners and modes in an attribute",
		options: "xattr_permissions=2",
		script: `chown 3:4 a; chmod 2755 d; chmod 4711 b; touch new; chown 1:2 new; chmod 0 new; mkfifo p; chown 5:5 p; mknod c c 1 3
stat -c '%n %F %u:%g %a %t:%T' a b c d new p; getfattr -d -m 'user.containers' a 2>&1; setfattr -n user.containers.override_stat -v 0:0:4777 a; stat -c '%n %u:%g %a' a
rm b; ln p p2; mv p q; stat -c '%n %F %h' q p2; cp -a c c2; stat -c '%n %F %t:%T' c2`,
		want: `a regular file 3:4 644 0:0
b regular file 100001:100002 4711 0:0
c character special file 0:0 644 1:3
d directory 1000:1000 2755 0:0
new regular empty file 1:2 0 0:0
p fifo 5:5 644 0:0
a 3:4 644
q fifo 2
p2 fifo 2
c2 character special file 1:3
`,
		upper: "a 0:0 644\nb 0:0 0\nc 0:0 644\nc2 0:0 644\nd 0:0 755\nnew 0:0 600\np2 0:0 644\nq 0:0 644\n",
	},
	{
		name:    "ACLs beside a mode in an attribute of root's",
		options: "xattr_permissions=1",
		script: `setfacl -m u:9:rwx a; stat -c %a a; setfacl -m m::r a; stat -c %a a; chmod 4650 a; stat -c %a a; getfacl -cn a | grep mask; setfacl -b a; stat -c %a a
setfacl -m u:9:rwx d; stat -c %a d`,
		want: "674\n644\n4650\nmask::r-x\n4640\n775\n",
	},
	{
		name:    "without ACLs",
		options: "noacl",
		script:  `setfacl -m u:9:r a 2>&1 | grep -o 'Operation not supported'; stat -c %a a`,
		want:    "Operation not supported\n644\n",
	},
	{
		name:    "without attributes",
		options: "noxattrs=1",
		script:  `setfattr -n user.x -v y a 2>&1 | grep -o 'Operation not supported'; getfattr -d -m - a`,
		want:    "Operation not supported\n",
	},
	{
		name:    "directories have one link",
		options: "static_nlink",
		script:  `mkdir n n/1 n/2; stat -c '%n %h' . d n; ln a a2; stat -c %h a2`,
		want:    ". 1\nd 1\nn 1\n2\n",
	},
	{
		name:    "short inode numbers",
		options: "ino32_t",
		script:  `for i in $(ls -i | awk '{print $1}') $(stat -c %i *); do [ "$i" -lt 4294967296 ] || echo "$i"; done; ls -i | awk '{print $1}' > /dev/null; [ "$(stat -c %i a)" = "$(ls -i a | cut -d' ' -f1)" ] && echo same`,
		want:    "same\n",
	},
}

// TestOwners looks at what the options about owners do, also with fuse-overlayfs where
// it does the same.
func TestOwners(t *testing.T) {
	needOracle(t)
	for _, c := range ownersCases {
		mounters := []string{"drop-in"}
		if c.peer {
			mounters = append(mounters, "fuse-overlayfs")
		}
		for _, name := range mounters {
			t.Run(c.name+"/"+name, func(t *testing.T) {
				if name == "fuse-overlayfs" {
					if _, err := exec.LookPath(name); err != nil {
						harness.Skip(t, "fuse-overlayfs is not installed")
					}
				}
				runOwners(t, c, name)
			})
		}
	}
}

func ownersStack(t *testing.T) (stack harness.Stack, target string) {
	stack, target = tempStack(t, fastTempDir(t), oracle.Layer{Entries: []oracle.Entry{
		{Path: "a", Kind: oracle.File, Text: "a", UID: 5, GID: 6},
		{Path: "acl", Kind: oracle.File, Text: "a"},
		{Path: "b", Kind: oracle.File, Text: "b", UID: 100001, GID: 100002},
		{Path: "d", Kind: oracle.Dir, UID: 1000, GID: 1000},
	}})
	return stack, target
}

func runOwners(t *testing.T, c ownersCase, name string) {
	stack, target := ownersStack(t)
	stack.Extra = strings.Split(c.options, ",")
	got := inMount(t, name, stack, target, c.script)
	if d := oracle.DiffLines(c.want, got); len(d) > 0 {
		t.Errorf("- expected, + mount with %s:\n%s", c.options, d)
	}
	if c.upper == "" {
		return
	}
	if d := oracle.DiffLines(c.upper, shellIn(t, stack.Upper, "stat -c '%n %u:%g %a' *")); len(d) > 0 {
		t.Errorf("upper: - expected, + found:\n%s", d)
	}
}

// inMount runs a script in a mount by the mounter of that name.
func inMount(t *testing.T, name string, stack harness.Stack, target, script string) string {
	t.Helper()
	m, err := harness.NewMounter(name)
	if err != nil {
		t.Fatal(err)
	}
	return inMountBy(t, m, stack, target, script)
}

func inMountBy(t *testing.T, m harness.Mounter, stack harness.Stack, target, script string) string {
	t.Helper()
	mount, err := m.Mount(stack, target)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := mount.Unmount(); err != nil {
			t.Error(err)
		}
	}()
	return shellIn(t, target, script)
}

func shellIn(t *testing.T, dir, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Logf("%v: %s", err, stderr.String())
	}
	return string(out)
}

// TestOwnersOfIdmappedLower: a lower in a mount that maps ids already, as podman makes
// them for containers with other ids, is not mapped once more.
func TestOwnersOfIdmappedLower(t *testing.T) {
	needOracle(t)
	stack, target := ownersStack(t)
	mapped := filepath.Join(filepath.Dir(target), "mapped")
	if err := os.Mkdir(mapped, 0o755); err != nil {
		t.Fatal(err)
	}
	acls := exec.Command("setfacl", "-m", "u:9:r,g:10:r,m::r", "a")
	acls.Dir = stack.Lowers[0]
	if out, err := acls.CombinedOutput(); err != nil {
		harness.Skip(t, "no ACLs: %v %s", err, out)
	}
	idmap(t, stack.Lowers[0], mapped, "0 100000 65536")
	stack.Lowers = []string{mapped}
	stack.Extra = []string{"uidmapping=:0:100000:65536", "gidmapping=:0:100000:65536"}
	got := inMount(t, "drop-in", stack, target, `ids() { getfacl -cn a | grep '[0-9]:'; }
stat -c '%n %u:%g' . a d; ids; chmod 640 a; chmod 600 d; stat -c '%n %u:%g' a d; ids`)
	const acl = "user:100009:r--\ngroup:100010:r--\n"
	want := ". 100000:100000\na 100005:100006\nd 101000:101000\n" + acl + "a 100005:100006\nd 101000:101000\n" + acl
	if d := oracle.DiffLines(want, got); len(d) > 0 {
		t.Errorf("- expected, + mount:\n%s", d)
	}
	if got := shellIn(t, stack.Upper, "stat -c '%n %u:%g' *; getfacl -cn a | grep '[0-9]:'"); got != "a 5:6\nd 1000:1000\nuser:9:r--\ngroup:10:r--\n" {
		t.Errorf("the upper has\n%s", got)
	}
}

// idmap shows dir on target with other ids, until the test has ended.
func idmap(t *testing.T, dir, target, ids string) {
	t.Helper()
	ns := exec.Command("unshare", "-U", "sh", "-c", "echo made; exec sleep 60")
	made, err := ns.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := ns.Start(); err != nil {
		harness.Skip(t, "no user namespace: %v", err)
	}
	t.Cleanup(func() { _, _ = ns.Process.Kill(), ns.Wait() })
	proc := fmt.Sprintf("/proc/%d/", ns.Process.Pid)
	if _, err := bufio.NewReader(made).ReadString('\n'); err != nil {
		harness.Skip(t, "no user namespace: %v", err)
	}
	for _, f := range []string{"uid_map", "gid_map"} {
		if err := os.WriteFile(proc+f, []byte(ids), 0); err != nil {
			t.Fatal(err)
		}
	}
	user, err := os.Open(proc + "ns/user")
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(user.Fd())})
	if err != nil {
		harness.Skip(t, "%s cannot be mounted with other ids: %v", dir, err)
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// TestOwnersOfPeer: plyfs reads the owners and modes that fuse-overlayfs has written into
// attributes, and goes on in their form.
func TestOwnersOfPeer(t *testing.T) {
	needOracle(t)
	if _, err := exec.LookPath("fuse-overlayfs"); err != nil {
		harness.Skip(t, "fuse-overlayfs is not installed")
	}
	stack, target := ownersStack(t)
	stack.Extra = []string{"xattr_permissions=2"}
	in := func(name, script string) string { return inMount(t, name, stack, target, script) }
	const look = `stat -c '%n %F %u:%g %a' a b d d/* new`
	in("fuse-overlayfs", `mkdir d/sub; touch new d/f; chmod 2750 d; chown 1:2 d; chmod 4711 new; chmod 640 d/f; chown 3:4 a d/f; chown 7:8 d/sub`)
	want := `a regular file 3:4 644
b regular file 100001:100002 644
d directory 1:2 2750
d/f regular empty file 3:4 640
d/sub directory 7:8 755
new regular empty file 0:0 4711
`
	if d := oracle.DiffLines(want, in("drop-in", look)); len(d) > 0 {
		t.Errorf("- expected, + shown by plyfs:\n%s", d)
	}
	in("drop-in", `chown 9:9 b; chmod 600 d/f`)
	want = strings.NewReplacer("100001:100002", "9:9", "3:4 640", "3:4 600").Replace(want)
	if d := oracle.DiffLines(want, in("fuse-overlayfs", look)); len(d) > 0 {
		t.Errorf("- expected, + shown by fuse-overlayfs of what plyfs has written:\n%s", d)
	}
}
