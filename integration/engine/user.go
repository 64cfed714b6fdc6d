package engine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

const (
	// furniture is the directory of what a place mounts for itself.
	furniture = "furniture"

	userName = "plyfsuser"
	userHome = "u" // all paths are short: podman bounds that of its runtime files
	userID   = 4321
	// runtimeDir is XDG_RUNTIME_DIR, below the home.
	runtimeDir = "x"
	// subIDs is the first subordinate id of the user, autoIDs the first that podman
	// gives containers of --userns=auto; there are idCount of each.
	subIDs  = 1_000_000
	autoIDs = 2_000_000
	idCount = 1 << 16
)

// people makes the homes of who runs commands.
func (p *Place) people() error {
	add := func(w *Person, name, home string, uid, gid int) error {
		*w = Person{place: p, Name: name, UID: uid, GID: gid, Home: filepath.Join(p.Dir, home), Env: map[string]string{}}
		for _, d := range []string{"", "tmp", runtimeDir, ".config", ".config/containers"} {
			dir := filepath.Join(w.Home, d)
			if err := errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, uid, gid)); err != nil {
				return err
			}
		}
		// Engines refuse images without a policy.
		policy := filepath.Join(w.Home, ".config/containers/policy.json")
		return errors.Join(os.WriteFile(policy, []byte(`{"default":[{"type":"insecureAcceptAnything"}]}`), 0o644), os.Chown(policy, uid, gid))
	}
	if os.Geteuid() == 0 {
		return errors.Join(add(&p.Root, "root", "r", 0, 0), add(&p.User, userName, userHome, userID, userID))
	}
	u, err := user.Current()
	if err != nil {
		return err
	}
	return add(&p.User, u.Username, userHome, os.Geteuid(), os.Getegid())
}

// NeedUser says why the user of a place cannot mount, or nothing.
func (p *Place) NeedUser() string {
	if res := p.User.Do("", "sh", "-c", ": <> /dev/fuse"); res.Code != 0 {
		return "a user cannot open /dev/fuse: " + strings.TrimSpace(res.Stderr)
	}
	return ""
}

// NeedSubIDs says why the user of a place cannot run engines, or nothing.
func (p *Place) NeedSubIDs() string {
	if why := p.NeedUser(); why != "" {
		return why
	}
	if os.Geteuid() != 0 {
		b, err := os.ReadFile("/etc/subuid")
		if err != nil || !slices.ContainsFunc(strings.Split(string(b), "\n"), func(line string) bool {
			name, _, _ := strings.Cut(line, ":")
			return name == p.User.Name || name == strconv.Itoa(p.User.UID)
		}) {
			return fmt.Sprintf("user %s has no subordinate ids in /etc/subuid", p.User.Name)
		}
	}
	if res := p.User.Do("", "unshare", "-Ur", "true"); res.Code != 0 {
		return "a user cannot make user namespaces: " + strings.TrimSpace(res.Stderr)
	}
	return ""
}

// furnish makes the host's mount namespace what the place needs.
func furnish(dir string) error {
	var o Options
	b, err := os.ReadFile(filepath.Join(dir, optionsName))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &o); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return nil
	}
	if err := dropMounts(); err != nil {
		return err
	}
	own := filepath.Join(dir, furniture)
	if err := os.Mkdir(own, 0o755); err != nil {
		return err
	}
	etc := filepath.Join(own, "etc")
	if err := os.Mkdir(etc, 0o755); err != nil {
		return err
	}
	ids := fmt.Sprintf("%s:%d:%d\ncontainers:%d:%d\n", userName, subIDs, idCount, autoIDs, idCount)
	if err := errors.Join(
		extend(etc, "passwd", fmt.Sprintf("%s:x:%d:%d::%s:/bin/sh\n", userName, userID, userID, filepath.Join(dir, userHome))),
		extend(etc, "group", fmt.Sprintf("%s:x:%d:\n", userName, userID)),
		extend(etc, "subuid", ids), extend(etc, "subgid", ids),
		cover("/etc", etc),
	); err != nil {
		return err
	}
	return errors.Join(openDevice(own), addLinks(own, "/usr/sbin", o.Sbin), addLinks(own, "/usr/local/bin", o.Local))
}

// dropMounts takes the FUSE file systems of other tests out of our namespace, which has got
// copies of all mounts: they would stay alive here, and their servers with them.
func dropMounts() error {
	table, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.FSType != "fuse" && !strings.HasPrefix(m.FSType, "fuse."), false
	})
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(table) { // what lies on another comes later
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL {
			return fmt.Errorf("unmount %q here: %w", m.Mountpoint, err)
		}
	}
	return nil
}

// extend makes a copy of a file of /etc, if there is one, with more lines.
func extend(etc, name, more string) error {
	b, err := os.ReadFile(filepath.Join("/etc", name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.WriteFile(filepath.Join(etc, name), append(b, more...), 0o644)
}

// cover puts the names in top over those of dir, and takes what is written there. It is the
// directory that is covered, not its files: who changes those outside, by renaming,
// would take away what lies over them.
func cover(dir, top string) error {
	below, work := top+".below", top+".work"
	if err := errors.Join(os.Mkdir(below, 0o755), os.Mkdir(work, 0o755)); err != nil {
		return err
	}
	if err := unix.Mount(dir, below, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", dir, err)
	}
	if err := unix.Mount("overlay", dir, "overlay", 0, "lowerdir="+below+",upperdir="+top+",workdir="+work); err != nil {
		return fmt.Errorf("overlay on %s: %w", dir, err)
	}
	return nil
}

// openDevice puts a FUSE device that everybody may open over /dev/fuse, as distributions
// have it. Where that is not possible it stays as it is, and NeedUser says so.
func openDevice(own string) error {
	file := filepath.Join(own, "fuse")
	if err := unix.Mknod(file, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229))); err != nil {
		return nil // a user namespace, most likely
	}
	if err := os.Chmod(file, 0o666); err != nil {
		return err
	}
	fd, err := unix.Open(file, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil // the file system allows no devices
	}
	_ = unix.Close(fd) // it was only a probe
	if err := unix.Mount(file, "/dev/fuse", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("put a device for everybody over /dev/fuse: %w", err)
	}
	return nil
}

// addLinks adds links to a directory of programs, where mount(8) and its helpers look.
func addLinks(own, dir string, links map[string]string) error {
	if len(links) == 0 {
		return nil
	}
	top := filepath.Join(own, filepath.Base(dir))
	if err := os.Mkdir(top, 0o755); err != nil {
		return err
	}
	for name, target := range links {
		if err := os.Symlink(target, filepath.Join(top, name)); err != nil {
			return err
		}
	}
	return cover(dir, top)
}
