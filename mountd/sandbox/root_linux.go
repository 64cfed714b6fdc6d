package sandbox

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// What of /proc and /sys is hidden or read-only: what runtimes hide and protect.
var (
	hiddenProc    = []string{"acpi", "asound", "interrupts", "kcore", "keys", "latency_stats", "sched_debug", "scsi", "timer_list", "timer_stats"}
	protectedProc = []string{"bus", "fs", "irq", "sys", "sysrq-trigger"}
	hiddenSys     = []string{"devices/virtual/powercap", "firmware"}
)

// Volume is a directory or file of the machine that is bound into a root.
type Volume struct {
	Host     string `json:"host"`   // absolute
	Inside   string `json:"inside"` // absolute
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// ParseVolume reads HOST:INSIDE[:ro]. HOST may be relative to dir.
func ParseVolume(text, dir string) (Volume, error) {
	f := strings.Split(text, ":")
	v := Volume{}
	if len(f) == 3 && (f[2] == "ro" || f[2] == "rw") {
		v.ReadOnly = f[2] == "ro"
		f = f[:2]
	}
	if len(f) != 2 || f[0] == "" || !path.IsAbs(f[1]) {
		return v, fmt.Errorf("volume %q: expected HOST:INSIDE or HOST:INSIDE:ro, with INSIDE an absolute path", text)
	}
	v.Host, v.Inside = f[0], path.Clean(f[1])
	if !path.IsAbs(v.Host) {
		v.Host = path.Join(dir, v.Host)
	}
	if v.Inside == "/" {
		return v, fmt.Errorf("volume %q: it would cover the whole image", text)
	}
	return v, nil
}

// root is the root of an image while mounts are put into it.
type root struct {
	fd       int // O_PATH, of the union
	readOnly bool
	dev      int // the tmpfs on /dev
	pts      int // the devpts on /dev/pts
}

// openRoot takes a mount namespace out of the machine's propagation and opens
// the root.
func openRoot(dir string, ro bool) (*root, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("make the mounts private: %w", err)
	}
	fd, err := fsat.OpenTrusted(dir)
	if err != nil {
		return nil, fmt.Errorf("open the root %q: %w", dir, err)
	}
	return &root{fd: fd, readOnly: ro, dev: -1, pts: -1}, nil
}

func (r *root) close() {
	for _, fd := range []int{r.fd, r.dev, r.pts} {
		fsat.Close(fd)
	}
	r.fd, r.dev, r.pts = -1, -1, -1
}

// mountSystem puts /proc, /sys and /dev into the root.
func (r *root) mountSystem() error {
	for _, m := range []struct {
		name  string
		mount func(at int) error
	}{
		{"proc", r.mountProc},
		{"sys", r.mountSys},
		{"dev", r.mountDev},
	} {
		at, err := fsat.OpenBeneath(r.fd, m.name, unix.O_PATH|unix.O_DIRECTORY)
		switch {
		case errors.Is(err, unix.ENOENT) && r.readOnly:
			return fmt.Errorf("the image has no directory /%s, and nothing can be made in a read-only mount: leave out --ro", m.name)
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
			return fmt.Errorf("/%s of the image is no directory, so nothing can be mounted there", m.name)
		case err != nil:
			return fmt.Errorf("/%s of the image: %w", m.name, err)
		}
		err = m.mount(at)
		_ = unix.Close(at)
		if err != nil {
			return fmt.Errorf("/%s: %w", m.name, err)
		}
	}
	return nil
}

func (r *root) mountProc(at int) error {
	fd, err := mountOver(at, "proc", inert)
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w; a container in which parts of /proc are hidden allows no new one", err)
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return errors.Join(protect(fd, protectedProc, false), protect(fd, hiddenProc, true))
}

// mountSys mounts /sys read-only: a new one where the network namespace allows it,
// else what the machine has there, with all that is mounted below.
func (r *root) mountSys(at int) error {
	fd, err := mountOver(at, "sysfs", readOnly)
	if errors.Is(err, unix.EPERM) {
		if fd, err = clone(unix.AT_FDCWD, "/sys", readOnly, true); err == nil {
			err = attach(fd, at)
		}
	}
	defer fsat.Close(fd)
	if err != nil {
		return err
	}
	return protect(fd, hiddenSys, true)
}

// fileNames are the files of /etc that are the sandbox's own.
var fileNames = []string{"resolv.conf", "hosts", "hostname"}

// mountFiles covers files of /etc by those of the same name in dir. A name that
// the image does not have is told and left out.
func (r *root) mountFiles(dir string, note func(string)) error {
	src, err := fsat.OpenTrusted(dir)
	if err != nil {
		return fmt.Errorf("open %q: %w", dir, err)
	}
	defer unix.Close(src)
	etc, err := fsat.OpenInRoot(r.fd, "etc", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		note("the image has no directory /etc: no resolv.conf, hosts and hostname")
		return nil //nolint:nilerr // as told
	}
	defer unix.Close(etc)
	for _, name := range fileNames {
		var st unix.Stat_t
		if fsat.Stat(src, name, &st) != nil {
			continue // the machine has none
		}
		if err := coverFile(etc, src, name); err != nil {
			note(fmt.Sprintf("/etc/%s of the image stays as it is: %v", name, err))
		}
	}
	return nil
}

func coverFile(etc, src int, name string) error {
	at, err := fsat.OpenName(etc, name, unix.O_PATH, 0)
	if err != nil {
		return err
	}
	defer unix.Close(at)
	return bindOver(at, src, name, readOnly, false)
}

// volume is a Volume that was opened.
type volume struct {
	Volume
	mount int
	isDir bool
}

// openVolumes opens what shall be bound while the machine's tree is still there.
func openVolumes(list []Volume) ([]volume, error) {
	var open []volume
	for _, v := range list {
		attr := uint64(quiet)
		if v.ReadOnly {
			attr |= unix.MOUNT_ATTR_RDONLY
		}
		fd, err := clone(unix.AT_FDCWD, v.Host, attr, true)
		if err != nil {
			return open, fmt.Errorf("volume %q: %w", v.Host, err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			_ = unix.Close(fd)
			return open, fmt.Errorf("volume %q: %w", v.Host, err)
		}
		open = append(open, volume{v, fd, st.Mode&unix.S_IFMT == unix.S_IFDIR})
	}
	return open, nil
}

// mountVolumes binds them, wherever the links of the image lead, below the root.
func (r *root) mountVolumes(list []volume) error {
	for _, v := range list {
		at, err := r.place(v.Inside, v.isDir)
		if err != nil {
			return fmt.Errorf("volume %q: %w", v.Inside, err)
		}
		err = notOfKernel(at)
		if err == nil {
			err = attach(v.mount, at)
		}
		_ = unix.Close(at)
		if err != nil {
			return fmt.Errorf("volume %q: %w", v.Inside, err)
		}
	}
	return nil
}

// notOfKernel refuses places in /proc and /sys, where a mount would take away protection.
func notOfKernel(fd int) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return err
	}
	if st.Type == unix.PROC_SUPER_MAGIC || st.Type == unix.SYSFS_MAGIC {
		return errors.New("it leads into /proc or /sys")
	}
	return nil
}

// place opens the path below the root, O_PATH. What is missing of it is made:
// directories, and at the end a directory or an empty file.
func (r *root) place(name string, dir bool) (fd int, err error) {
	fd, err = fsat.OpenInRoot(r.fd, ".", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1, err
	}
	done := ""
	parts := strings.Split(strings.Trim(path.Clean("/"+name), "/"), "/")
	for i, part := range parts {
		if part == "" {
			continue
		}
		done += "/" + part
		wantDir := dir || i < len(parts)-1
		next, err := fsat.OpenInRoot(r.fd, done, unix.O_PATH)
		if errors.Is(err, unix.ENOENT) {
			next, err = makeIn(fd, part, wantDir)
		}
		_ = unix.Close(fd)
		if err != nil {
			return -1, fmt.Errorf("%q in the image: %w", done, err)
		}
		fd = next
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil || (st.Mode&unix.S_IFMT == unix.S_IFDIR) != wantDir {
			_ = unix.Close(fd)
			if err == nil && wantDir {
				err = unix.ENOTDIR
			} else if err == nil {
				err = unix.EISDIR
			}
			return -1, fmt.Errorf("%q in the image: %w", done, err)
		}
	}
	return fd, nil
}

// makeIn makes a name in a directory; a link that leads nowhere is not followed.
func makeIn(dirFd int, name string, dir bool) (fd int, err error) {
	if dir {
		if err = fsat.Mkdir(dirFd, name, 0o755); err == nil {
			return fsat.OpenName(dirFd, name, unix.O_PATH|unix.O_DIRECTORY, 0)
		}
	} else if err = fsat.Mknod(dirFd, name, unix.S_IFREG|0o644, 0); err == nil {
		return fsat.OpenName(dirFd, name, unix.O_PATH, 0)
	}
	if errors.Is(err, unix.EEXIST) {
		return -1, errors.New("a link that leads nowhere")
	}
	return -1, err
}

// pivot makes the root the root of this process and lets go of the machine's tree.
func (r *root) pivot() error {
	if err := unix.Fchdir(r.fd); err != nil {
		return fmt.Errorf("enter the root: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil { // the old one then lies on the new one
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("enter the root: %w", err)
	}
	return nil
}
