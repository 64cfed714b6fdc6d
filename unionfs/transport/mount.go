package transport

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// MountOptions are what mount(2) is told; the union itself is described by
// unionfs.Options.
type MountOptions struct {
	Target      string // directory to mount on
	FSName      string // first column of the mount table; "plyfs" if empty
	Subtype     string // type is "fuse.<Subtype>"; "plyfs" if empty
	ReadOnly    bool
	AllowOther  bool
	NoSuid      bool
	NoDev       bool
	NoExec      bool
	NoAtime     bool
	StrictAtime bool
	NoDirAtime  bool
}

// Mount opens /dev/fuse and mounts it on o.Target: by mount(2) where the
// caller may, else through fusermount3. The caller owns the returned file and
// must keep it open for as long as the mount shall live.
func Mount(o MountOptions) (*os.File, error) {
	if o.FSName == "" {
		o.FSName = "plyfs"
	}
	if o.Subtype == "" {
		o.Subtype = "plyfs"
	}
	dev, err := mountDirect(o)
	if err == nil {
		return dev, nil
	}
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
		return nil, err
	}
	dev, ferr := mountHelper(o)
	if ferr != nil {
		return nil, errors.Join(err, ferr)
	}
	return dev, nil
}

func mountDirect(o MountOptions) (*os.File, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/fuse: %w", err)
	}
	dev := os.NewFile(uintptr(fd), "/dev/fuse")
	var st unix.Stat_t
	if err := unix.Stat(o.Target, &st); err != nil {
		return nil, errors.Join(fmt.Errorf("mountpoint %q: %w", o.Target, err), dev.Close())
	}
	opts := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,default_permissions",
		fd, st.Mode&unix.S_IFMT, os.Geteuid(), os.Getegid())
	if o.AllowOther {
		opts += ",allow_other"
	}
	if err := unix.Mount(o.FSName, o.Target, "fuse."+o.Subtype, o.flags(), opts); err != nil {
		return nil, errors.Join(fmt.Errorf("mount on %q: %w", o.Target, err), dev.Close())
	}
	return dev, nil
}

// SetReadAhead lets the kernel read as much ahead in a live mount as it may ask for at
// once: INIT cannot ask for more than the 128 KiB that it offers. It takes root; without,
// large files are read in smaller pieces.
func SetReadAhead(major, minor int) {
	path := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", major, minor)
	_ = os.WriteFile(path, strconv.AppendInt(nil, maxWrite>>10, 10), 0)
}

// Remount changes the flags of a live mount, as mount(8) -o remount. Its server
// keeps to the rules for access times that it was started with.
func Remount(o MountOptions) error {
	if err := unix.Mount("", o.Target, "", unix.MS_REMOUNT|o.flags(), ""); err != nil {
		return fmt.Errorf("remount %q: %w", o.Target, err)
	}
	return nil
}

// flags returns what mount(2) takes as a number.
func (o MountOptions) flags() (flags uintptr) {
	for _, f := range []struct {
		on   bool
		flag uintptr
	}{
		{o.ReadOnly, unix.MS_RDONLY},
		{o.NoSuid, unix.MS_NOSUID},
		{o.NoDev, unix.MS_NODEV},
		{o.NoExec, unix.MS_NOEXEC},
		{o.NoAtime, unix.MS_NOATIME},
		{o.StrictAtime, unix.MS_STRICTATIME},
		{o.NoDirAtime, unix.MS_NODIRATIME},
	} {
		if f.on {
			flags |= f.flag
		}
	}
	return flags
}

// fusermount finds the helper that mounts for users (setuid root), also without a PATH:
// mount(8) and mount.fuse(8) take it away from the programs they start.
func fusermount() (string, error) {
	for _, name := range []string{"fusermount3", "fusermount"} {
		for _, dir := range []string{"", "/usr/local/bin/", "/usr/bin/", "/bin/"} {
			if p, err := exec.LookPath(dir + name); err == nil {
				return p, nil
			}
		}
	}
	return "", errors.New("neither fusermount3 nor fusermount found: install the package fuse3")
}

// mountHelper lets fusermount3 mount and receives the descriptor over a socket,
// the protocol of libfuse (lib/mount.c, _FUSE_COMMFD).
func mountHelper(o MountOptions) (*os.File, error) {
	bin, err := fusermount()
	if err != nil {
		return nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "fusermount"), os.NewFile(uintptr(pair[1]), "fusermount")
	defer ours.Close()
	defer theirs.Close()

	opts := []string{"fsname=" + escapeOption(o.FSName), "subtype=" + escapeOption(o.Subtype), "default_permissions"}
	for _, f := range []struct {
		on  bool
		opt string
	}{
		{o.ReadOnly, "ro"},
		{o.AllowOther, "allow_other"},
		{o.NoExec, "noexec"},
		{o.NoAtime, "noatime"},
	} {
		if f.on {
			opts = append(opts, f.opt)
		}
	}
	cmd := exec.Command(bin, "-o", strings.Join(opts, ","), "--", o.Target)
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	cmd.ExtraFiles = []*os.File{theirs}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", bin, err, strings.TrimSpace(stderr.String()))
	}
	fd, err := receiveFd(pair[0])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", bin, err)
	}
	return os.NewFile(uintptr(fd), "/dev/fuse"), nil
}

func escapeOption(s string) string {
	return strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(s)
}

func receiveFd(sock int) (int, error) {
	data, oob := make([]byte, 4), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(sock, data, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("receive descriptor: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return -1, errors.New("no descriptor received")
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, errors.New("no descriptor received")
	}
	return fds[0], nil
}

// Unmount detaches target: umount2(2) where the caller may, else fusermount3.
// With lazy the name disappears at once and the rest when the last user left.
func Unmount(target string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err := unix.Unmount(target, flags)
	if err == nil || !errors.Is(err, unix.EPERM) {
		if err != nil {
			err = fmt.Errorf("unmount %q: %w", target, err)
		}
		return err
	}
	bin, ferr := fusermount()
	if ferr != nil {
		return ferr
	}
	args := []string{"-u"}
	if lazy {
		args = append(args, "-z")
	}
	out, ferr := exec.Command(bin, append(args, "--", target)...).CombinedOutput()
	if ferr != nil {
		text := strings.TrimSpace(string(out))
		if strings.Contains(text, "busy") {
			return fmt.Errorf("unmount %q: %w", target, unix.EBUSY)
		}
		return fmt.Errorf("unmount %q: %s: %w: %s", target, bin, ferr, text)
	}
	return nil
}
