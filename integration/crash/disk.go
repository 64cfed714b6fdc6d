package crash

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// FileSystem is what lies on a disk.
type FileSystem struct {
	Name string
	Size int64
	mkfs []string // the image's path is appended
	opts string
}

// Ext4 commits its journal only when somebody asks for it, so the order of
// commits is ours to choose.
var Ext4 = FileSystem{
	Name: "ext4", Size: 48 << 20, opts: "commit=300",
	mkfs: []string{"mkfs.ext4", "-q", "-F", "-b", "4096", "-J", "size=8", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", "-I", "256"},
}

// XFS needs more room.
var XFS = FileSystem{
	Name: "xfs", Size: 300 << 20, opts: "nouuid",
	mkfs: []string{"mkfs.xfs", "-q", "-f", "-K"},
}

// Missing says what the file system needs that is not there; "" if nothing is.
func (f FileSystem) Missing() string {
	if _, err := exec.LookPath(f.mkfs[0]); err != nil {
		return f.mkfs[0]
	}
	if b, err := os.ReadFile("/proc/filesystems"); err != nil || !strings.Contains(string(b), "\t"+f.Name+"\n") {
		return "a kernel with " + f.Name
	}
	return ""
}

// limit is how long a command of ours may take that talks to a disk.
const limit = 30 * time.Second

// Disk is a recorded disk with a mounted file system.
type Disk struct {
	FS  FileSystem
	dir string

	cmd    *exec.Cmd
	stderr bytes.Buffer
	out    *bufio.Reader
	dev    *os.File
	up     bool // mounted

	mu sync.Mutex
	in io.WriteCloser // guarded by mu
}

// Names in the directory of a disk; see also those of the recorder.
const (
	baseName  = "base" // the fresh file system
	mountName = "fs"
)

// NewDisk makes a file system in dir, an empty directory, and mounts it from a
// disk that is recorded. Call Close.
func NewDisk(dir string, fs FileSystem) (_ *Disk, err error) {
	d := &Disk{FS: fs, dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Abort())
		}
	}()
	for _, sub := range []string{fuseName, mountName} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, fmt.Errorf("make disk: %w", err)
		}
	}
	if err := d.format(); err != nil {
		return nil, err
	}
	if err := d.startRecorder(); err != nil {
		return nil, err
	}
	if d.dev, err = attach(filepath.Join(dir, fuseName, diskName)); err != nil {
		return nil, err
	}
	if err := unix.Mount(d.dev.Name(), d.Root(), fs.Name, 0, fs.opts); err != nil {
		return nil, fmt.Errorf("mount recorded disk: %w", err)
	}
	d.up = true
	return d, nil
}

// Root is where the disk's file system is mounted.
func (d *Disk) Root() string { return filepath.Join(d.dir, mountName) }

// format makes the image and keeps a copy of it.
func (d *Disk) format() error {
	path := filepath.Join(d.dir, imageName)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	if err := os.Truncate(path, d.FS.Size); err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	args := append(append([]string(nil), d.FS.mkfs...), path)
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", args[0], err, out)
	}
	return copySparse(filepath.Join(d.dir, baseName), path)
}

// startRecorder starts this binary again as the recorder of dir.
func (d *Disk) startRecorder() error {
	d.cmd = exec.Command("/proc/self/exe", "-test.run=^$")
	d.cmd.Env = append(os.Environ(), RecorderEnv+"="+d.dir)
	d.cmd.Stderr = &d.stderr
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := d.cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("start recorder: %w", err)
	}
	if d.in, err = d.cmd.StdinPipe(); err != nil {
		return fmt.Errorf("start recorder: %w", err)
	}
	if err := d.cmd.Start(); err != nil {
		d.cmd = nil
		return fmt.Errorf("start recorder: %w", err)
	}
	d.out = bufio.NewReader(out)
	return d.answer("ready")
}

// answer waits for a line of the recorder.
func (d *Disk) answer(want string) error {
	stuck := time.AfterFunc(limit, func() { _ = d.cmd.Process.Kill() }) // it may have ended
	defer stuck.Stop()
	line, err := d.out.ReadString('\n')
	if err != nil || strings.TrimSpace(line) != want {
		return fmt.Errorf("recorder says %q, not %q: %w: %s", line, want, err, d.stderr.String())
	}
	return nil
}

// Mark writes a mark to the log: what was answered before is in front of it,
// what is asked for later behind.
func (d *Disk) Mark(text string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := fmt.Fprintf(d.in, "mark %s\n", text); err != nil {
		return fmt.Errorf("mark %s: %w", text, err)
	}
	return d.answer("ok")
}

// Close unmounts the disk and returns what was recorded.
func (d *Disk) Close() (*Recording, error) {
	if err := unmount(d.Root()); err != nil {
		return nil, errors.Join(err, d.Abort())
	}
	d.up = false
	err := d.dev.Close()
	d.dev = nil
	if err == nil {
		err = unmount(filepath.Join(d.dir, fuseName))
	}
	d.mu.Lock()
	if err == nil {
		_, err = fmt.Fprintln(d.in, "end")
	}
	if err == nil {
		err = d.answer("ok")
	}
	d.mu.Unlock()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("end of the recording: %w", err), d.Abort())
	}
	err = d.cmd.Wait()
	d.cmd = nil
	if err != nil {
		return nil, fmt.Errorf("recorder: %w: %s", err, d.stderr.String())
	}
	l, err := readLog(filepath.Join(d.dir, logName))
	if err != nil {
		return nil, err
	}
	return &Recording{FS: d.FS, Log: l, dir: d.dir}, nil
}

// Abort takes everything away, whatever state it is in: the recorder goes first,
// which breaks its connection and lets all that waits for the disk fail.
func (d *Disk) Abort() error {
	if d.cmd != nil {
		_ = d.cmd.Process.Kill() // it may have ended
		_ = d.cmd.Wait()         // its state does not matter any more
		d.cmd = nil
	}
	var err error
	if d.up {
		err = unix.Unmount(d.Root(), unix.MNT_DETACH)
		d.up = false
	}
	if d.dev != nil {
		err = errors.Join(err, d.dev.Close())
		d.dev = nil
	}
	_ = unix.Unmount(filepath.Join(d.dir, fuseName), unix.MNT_DETACH) // it may not be mounted yet, or any more
	return err
}

// unmount waits for a while for those who are just leaving.
func unmount(path string) error {
	end := time.Now().Add(limit)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		err := unix.Unmount(path, 0)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
		time.Sleep(pause) // umount(2) has no way to wait
	}
}
