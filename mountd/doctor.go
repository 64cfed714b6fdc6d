package mountd

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/mountd/sandbox"
)

// Diagnosis is one thing this machine allows or not.
type Diagnosis struct {
	What    string `json:"what"`
	OK      bool   `json:"ok"`
	Found   string `json:"found"`
	Follows string `json:"follows"`
}

// Doctor looks at what plyfs depends on. It changes nothing.
func Doctor(ctx context.Context, root string) []Diagnosis {
	return []Diagnosis{
		kernelRelease(),
		devFuse(),
		passthrough(),
		fusermount(),
		mounts(),
		userNamespaces(),
		shellIDs(),
		kernelOverlay(),
		trustedXattrs(),
		containerd(),
		storeFS(root),
		runDirectory(ctx, root),
	}
}

func kernelRelease() Diagnosis {
	d := Diagnosis{What: "kernel", OK: true}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Diagnosis{What: "kernel", Found: err.Error()}
	}
	d.Found = unix.ByteSliceToString(u.Release[:])
	var major, minor int
	if n, _ := fmt.Sscanf(d.Found, "%d.%d", &major, &minor); n == 2 && (major < 5 || major == 5 && minor < 6) {
		d.OK = false
		d.Follows = "5.6 or later is needed (openat2)"
	}
	return d
}

func devFuse() Diagnosis {
	d := Diagnosis{What: "/dev/fuse"}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		d.Found = err.Error()
		d.Follows = "no mount is possible; load the fuse module, or give access to the device (chmod 666 /dev/fuse)"
		return d
	}
	_ = unix.Close(fd) // only tried
	d.OK, d.Found = true, "can be opened"
	return d
}

// passthrough can only be asked of a live connection; the conditions are known.
func passthrough() Diagnosis {
	d := Diagnosis{What: "FUSE passthrough"}
	var u unix.Utsname
	_ = unix.Uname(&u) // an empty release reads as 0.0
	var major, minor int
	_, _ = fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	switch {
	case major < 6 || major == 6 && minor < 9:
		d.Found, d.Follows = "kernel older than 6.9", "file data goes through the mount server"
	case !mayUseTrusted(): // the same condition: CAP_SYS_ADMIN in the first user namespace
		d.Found, d.Follows = "needs root outside of a user namespace", "file data goes through the mount server"
	default:
		d.OK, d.Found = true, "kernel and privileges allow it"
	}
	return d
}

func fusermount() Diagnosis {
	d := Diagnosis{What: "fusermount3"}
	p, err := exec.LookPath("fusermount3")
	if err != nil {
		d.OK = os.Geteuid() == 0
		d.Found, d.Follows = "not installed", "users without a namespace of their own cannot mount; install fuse3"
		return d
	}
	d.OK, d.Found = true, p
	st, err := os.Stat(p)
	if err == nil && st.Mode()&os.ModeSetuid == 0 && os.Geteuid() != 0 {
		d.OK, d.Follows = false, "it is not set-user-id root: users cannot mount with it"
	}
	if conf, err := os.ReadFile("/etc/fuse.conf"); os.Geteuid() != 0 && (err != nil || !hasLine(string(conf), "user_allow_other")) {
		d.Follows = strings.TrimPrefix(d.Follows+"; no --allow-other for users (user_allow_other in /etc/fuse.conf)", "; ")
	}
	return d
}

// mounts tells by which way a mount comes about here, and whose files it shows.
func mounts() Diagnosis {
	d := Diagnosis{What: "plyfs mount", OK: true}
	switch helper, err := exec.LookPath("fusermount3"); {
	case mayUseTrusted():
		d.Found, d.Follows = "by mount(2), as root", "all owners of an image show, everybody may enter"
	case os.Geteuid() == 0:
		o, err := ownersHere()
		if err != nil {
			d.OK, d.Found = false, err.Error()
			break
		}
		ids := uint64(0)
		for _, r := range o.UIDs.Ranges {
			ids += uint64(r.Length)
		}
		d.Found = fmt.Sprintf("by mount(2), seen in this namespace; %d user ids", ids)
		d.Follows = "owners beyond them show as root, and are kept"
	case err != nil:
		d.OK, d.Found, d.Follows = false, "no privilege, and no fusermount3", "install fuse3, or use plyfs shell"
	default:
		d.Found, d.Follows = "by "+helper, "everything shows as yours, only you may enter; the image's owners are kept"
	}
	return d
}

func hasLine(text, line string) bool {
	for l := range strings.Lines(text) {
		if strings.TrimSpace(l) == line {
			return true
		}
	}
	return false
}

func userNamespaces() Diagnosis {
	d := Diagnosis{What: "user namespaces"}
	limit, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	switch {
	case err != nil:
		d.Found, d.Follows = err.Error(), "rootless engines cannot run"
	case strings.TrimSpace(string(limit)) == "0":
		d.Found, d.Follows = "switched off (user.max_user_namespaces=0)", "rootless engines cannot run"
	default:
		d.OK, d.Found = true, "up to "+strings.TrimSpace(string(limit))
		if b, err := os.ReadFile("/proc/sys/kernel/unprivileged_userns_clone"); err == nil && strings.TrimSpace(string(b)) == "0" {
			d.OK, d.Found = false, "root only (kernel.unprivileged_userns_clone=0)"
			d.Follows = "rootless engines cannot run"
		}
	}
	return d
}

func shellIDs() Diagnosis {
	d := Diagnosis{What: "ids in a shell", OK: true}
	ids := sandbox.OwnIDs()
	d.Follows = ids.Why
	switch ids.Kind {
	case sandbox.HostIDs:
		d.Found = "all"
	case sandbox.SubIDs:
		d.Found = "root and subordinate ids"
	case sandbox.OneID:
		d.Found = "root only"
		d.Follows += ": packages are installed as if all belonged to root"
	}
	return d
}

func kernelOverlay() Diagnosis {
	d := Diagnosis{What: "kernel overlayfs", OK: true, Follows: "not needed; tests compare with it where it is there"}
	b, err := os.ReadFile("/proc/filesystems")
	if err == nil && strings.Contains(string(b), "\toverlay\n") {
		d.Found = "there"
	} else {
		d.Found = "not there, or not loaded"
	}
	return d
}

func trustedXattrs() Diagnosis {
	d := Diagnosis{What: "trusted.* attributes", OK: true, Found: "may be used", Follows: "writable layers are what kernel overlayfs can mount"}
	if !mayUseTrusted() {
		d.Found = "not allowed here"
		d.Follows = "writable layers use user.overlay.* (kernel overlayfs: -o userxattr)"
	}
	return d
}

var fsNames = map[int64]string{
	unix.EXT4_SUPER_MAGIC:      "ext4",
	unix.XFS_SUPER_MAGIC:       "xfs",
	unix.BTRFS_SUPER_MAGIC:     "btrfs",
	unix.TMPFS_MAGIC:           "tmpfs",
	unix.OVERLAYFS_SUPER_MAGIC: "overlay",
	unix.NFS_SUPER_MAGIC:       "nfs",
	unix.FUSE_SUPER_MAGIC:      "fuse",
	unix.F2FS_SUPER_MAGIC:      "f2fs",
	0x2fc12fc1:                 "zfs",
	unix.CIFS_SUPER_MAGIC:      "cifs",
	unix.V9FS_MAGIC:            "9p",
}

func storeFS(root string) Diagnosis {
	d := Diagnosis{What: "store"}
	canon, err := CanonicalRoot(root)
	if err != nil {
		d.Found = err.Error()
		return d
	}
	dir := canon
	var st unix.Statfs_t
	for err = unix.Statfs(dir, &st); err == unix.ENOENT && dir != "/"; err = unix.Statfs(dir, &st) {
		dir = filepath.Dir(dir) // not made yet: its parent decides
	}
	if err != nil {
		d.Found = fmt.Sprintf("%s: %v", canon, err)
		return d
	}
	name := fsNames[int64(st.Type)]
	if name == "" {
		name = fmt.Sprintf("file system type %#x", st.Type)
	}
	free := int64(st.Bavail) * st.Bsize
	d.OK, d.Found = true, fmt.Sprintf("%s on %s, %d MB free", canon, name, free>>20)
	switch name {
	case "xfs", "btrfs":
		d.Follows = "copy-up can share blocks (reflink)"
	case "nfs", "cifs", "9p":
		d.Follows = "slow, and locks depend on the server"
	case "tmpfs":
		d.Follows = "lost at reboot"
	}
	if err := unix.Access(dir, unix.W_OK); err != nil {
		d.OK, d.Follows = false, "cannot be written: "+err.Error()
	}
	return d
}

func runDirectory(ctx context.Context, root string) Diagnosis {
	d := Diagnosis{What: "run directory"}
	canon, err := CanonicalRoot(root)
	if err != nil {
		d.Found = err.Error()
		return d
	}
	d.Found = RunDir(canon)
	if _, err := os.Lstat(d.Found); err == nil {
		if err := ownedByUs(d.Found); err != nil {
			d.Follows = err.Error()
			return d
		}
	}
	d.OK = true
	if info := FindDaemon(ctx, OpenOptions{Root: root}); info != nil {
		d.Follows = fmt.Sprintf("daemon %d is used by commands", info.Pid)
	} else {
		d.Follows = "no daemon: commands work by themselves"
	}
	return d
}
