package harness

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Stack is what gets mounted. Lowers[0] is the topmost.
type Stack struct {
	Lowers      []string
	Upper, Work string // both empty: read-only
	// Dialect is "" (overlay), "userxattr", "aufs" or "auto".
	Dialect string
	// ReadOnly mounts with MS_RDONLY although there is an upper.
	ReadOnly bool
	// Atime is "", "noatime", "nodiratime" or "strictatime".
	Atime string
	// Options are options of overlayfs that say what may be written to the
	// upper, as key=value. They replace those of Defaults.
	Options []string
	// Extra options, given to the mounter as they are.
	Extra []string
}

// Defaults are the options of overlayfs that every stack is mounted with
// whose Options do not say otherwise: everything off that has no counterpart
// in a plain stack of directories.
var Defaults = map[string]string{"index": "off", "metacopy": "off", "redirect_dir": "off"}

// options are Defaults with Options. The userxattr dialect excludes redirects
// and metacopy, even when off.
func (s Stack) options() map[string]string {
	opts := maps.Clone(Defaults)
	if s.Dialect == "userxattr" {
		delete(opts, "redirect_dir")
		delete(opts, "metacopy")
	}
	for _, o := range s.Options {
		key, value, _ := strings.Cut(o, "=")
		opts[key] = value
	}
	return opts
}

// Mounter mounts stacks in one way.
type Mounter interface {
	// Name says which way: "plyfs", "drop-in", "kernel", "fuse-overlayfs".
	Name() string
	// Mount mounts s on target, which must exist, and returns when the mount
	// answers.
	Mount(s Stack, target string) (Mount, error)
}

// Mount is one live mount.
type Mount interface {
	Target() string
	// Pid is the process that serves the mount; 0 for the kernel.
	Pid() int
	// Unmount takes the mount away and waits until its server has ended. An
	// error says what was left behind.
	Unmount() error
	// Abort breaks a mount that hangs: it ends every waiting request and
	// detaches the target. It returns what the server said.
	Abort() string
	// Kill kills the server with SIGKILL, waits for its end and detaches the
	// dead mount. For the kernel it is Unmount.
	Kill() error
}

// NewMounter returns the mounter of that name. "plyfs+OPTIONS" is plyfs with mount
// options of its own.
func NewMounter(name string) (Mounter, error) {
	name, more, _ := strings.Cut(name, "+")
	switch name {
	case "kernel":
		return Kernel{}, nil
	case "plyfs":
		bin, err := Binary()
		if err != nil {
			return nil, err
		}
		f := FUSE{name: name, argv: []string{bin, "overlay", "-f"}, plus: true}
		if more != "" {
			f.more = []string{more}
		}
		return f, nil
	case "drop-in": // plyfs, called by the name of fuse-overlayfs
		bin, err := DropIn()
		if err != nil {
			return nil, err
		}
		return FUSE{name: name, argv: []string{bin, "-f"}, plus: true, more: []string{"suid", "dev", "relatime"}}, nil
	case "fuse-overlayfs":
		return FUSE{name: name, argv: []string{"fuse-overlayfs", "-f"}}, nil
	}
	return nil, fmt.Errorf("unknown mounter %q: expected plyfs, drop-in, kernel or fuse-overlayfs", name)
}

// Kernel is overlayfs of the running kernel.
type Kernel struct{}

// Name implements Mounter.
func (Kernel) Name() string { return "kernel" }

// Mount implements Mounter. An upper is in use for a moment after its last mount: whoever
// has made a mount namespace meanwhile has a copy of that.
func (k Kernel) Mount(s Stack, target string) (Mount, error) {
	deadline := time.Now().Add(10 * time.Second)
	for wait := time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		m, err := k.mount(s, target)
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return m, err
		}
		time.Sleep(wait) // polling with back-off: nothing tells when it is free
	}
}

// mount uses the mount API that takes layers one by one, so that 500 of them fit.
func (Kernel) mount(s Stack, target string) (Mount, error) {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen overlay: %w", err)
	}
	defer unix.Close(fd)
	set := func(key, value string) error {
		if err := unix.FsconfigSetString(fd, key, value); err != nil {
			return fmt.Errorf("overlay option %s=%s: %w: %s", key, value, err, fsLog(fd))
		}
		return nil
	}
	opts := s.options()
	opts["xino"], opts["source"] = "off", "oracle"
	switch s.Dialect {
	case "", "overlay":
	case "userxattr":
		if err := unix.FsconfigSetFlag(fd, "userxattr"); err != nil {
			return nil, fmt.Errorf("overlay option userxattr: %w: %s", err, fsLog(fd))
		}
	default:
		return nil, fmt.Errorf("kernel overlayfs has no dialect %q", s.Dialect)
	}
	for _, l := range s.Lowers {
		if err := set("lowerdir+", l); err != nil {
			return nil, err
		}
	}
	if s.Upper != "" {
		if err := errors.Join(set("upperdir", s.Upper), set("workdir", s.Work)); err != nil {
			return nil, err
		}
	}
	for key, value := range opts {
		if err := set(key, value); err != nil {
			return nil, err
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return nil, fmt.Errorf("create overlay: %w: %s", err, fsLog(fd))
	}
	var attr int
	if s.ReadOnly {
		attr |= unix.MOUNT_ATTR_RDONLY
	}
	switch s.Atime {
	case "noatime":
		attr |= unix.MOUNT_ATTR_NOATIME
	case "nodiratime":
		attr |= unix.MOUNT_ATTR_NODIRATIME
	case "strictatime":
		attr |= unix.MOUNT_ATTR_STRICTATIME
	}
	mfd, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return nil, fmt.Errorf("fsmount overlay: %w", err)
	}
	defer unix.Close(mfd)
	if err := unix.MoveMount(mfd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return nil, fmt.Errorf("attach overlay to %s: %w", target, err)
	}
	return &kernelMount{target}, nil
}

// fsLog reads the kernel's messages about a failed fsconfig.
func fsLog(fd int) string {
	var lines []string
	buf := make([]byte, 4096)
	for {
		n, err := unix.Read(fd, buf)
		if err != nil || n <= 0 {
			return strings.Join(lines, "; ")
		}
		lines = append(lines, string(buf[:n]))
	}
}

type kernelMount struct{ target string }

func (m *kernelMount) Target() string { return m.target }
func (m *kernelMount) Pid() int       { return 0 }
func (m *kernelMount) Kill() error    { return m.Unmount() }
func (m *kernelMount) Unmount() error { return umount(m.target) }

func (m *kernelMount) Abort() string {
	_ = unix.Unmount(m.target, unix.MNT_DETACH) // nothing more can be done
	return ""
}

// umount unmounts target. A descriptor that another process is just about to
// close makes it busy for a moment, so it tries for some seconds.
func umount(target string) error {
	deadline := time.Now().Add(10 * time.Second)
	wait := time.Millisecond
	for {
		err := unix.Unmount(target, 0)
		if err == nil || !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			if err != nil {
				err = errors.Join(fmt.Errorf("unmount %s: %w", target, err), unix.Unmount(target, unix.MNT_DETACH))
			}
			return err
		}
		time.Sleep(wait) // polling with back-off: umount(2) has no way to wait
		wait = min(2*wait, 200*time.Millisecond)
	}
}

// IsMounted says whether a mount sits exactly on target, and its device.
func IsMounted(target string) (dev string, ok bool) {
	real, err := filepath.EvalSymlinks(filepath.Dir(target))
	if err == nil {
		target = filepath.Join(real, filepath.Base(target))
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", false
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 4 && unescapeMountinfo(f[4]) == target {
			dev, ok = f[2], true
		}
	}
	return dev, ok
}

// MountsBelow lists the mount points inside dir.
func MountsBelow(dir string) []string {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var found []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 4 && strings.HasPrefix(unescapeMountinfo(f[4]), dir+"/") {
			found = append(found, unescapeMountinfo(f[4]))
		}
	}
	return found
}

// unescapeMountinfo undoes the octal escapes of /proc/self/mountinfo.
func unescapeMountinfo(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`, `\043`, "#").Replace(s)
}
