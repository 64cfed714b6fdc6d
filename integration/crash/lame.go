package crash

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	gofs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// LameEnv, when set to "DIR:TARGET", turns a test binary into a file system
// that shows DIR at TARGET: call RunLame before anything else.
const LameEnv = "PLYFS_TEST_LAME"

// RunLame serves a directory as a file system that has no RENAME_WHITEOUT,
// until it is unmounted.
func RunLame(arg string) error {
	dir, target, _ := strings.Cut(arg, ":")
	unix.Umask(0)
	root, err := gofs.NewLoopbackRoot(dir)
	if err != nil {
		return fmt.Errorf("lame file system: %w", err)
	}
	raw := gofs.NewNodeFS(root, &gofs.Options{NullPermissions: true})
	server, err := fuse.NewServer(lame{raw}, target, &fuse.MountOptions{
		DirectMountStrict: true, FsName: "lame", Name: "lame", AllowOther: true, Options: []string{"default_permissions"},
	})
	if err != nil {
		return fmt.Errorf("lame file system: %w", err)
	}
	go func() {
		if server.WaitMount() == nil {
			fmt.Println("ready")
		}
	}()
	server.Serve()
	return nil
}

type lame struct{ fuse.RawFileSystem }

func (l lame) Rename(cancel <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	if in.Flags&unix.RENAME_WHITEOUT != 0 {
		return fuse.EINVAL
	}
	return l.RawFileSystem.Rename(cancel, in, from, to)
}

// MountLame shows dir at target without RENAME_WHITEOUT until done is called.
func MountLame(dir, target string) (done func() error, err error) {
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	cmd.Env = append(os.Environ(), LameEnv+"="+dir+":"+target)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("lame file system: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("lame file system: %w", err)
	}
	stuck := time.AfterFunc(limit, func() { _ = cmd.Process.Kill() }) // it may have ended
	line, err := bufio.NewReader(out).ReadString('\n')
	stuck.Stop()
	if err != nil {
		_ = cmd.Process.Kill() // likewise
		_ = cmd.Wait()         // the first error is the one to report
		return nil, fmt.Errorf("lame file system on %s says %q: %w", filepath.Base(target), line, err)
	}
	return func() error {
		err := unmount(target)
		if err != nil {
			_ = cmd.Process.Kill() // breaks the connection
			_ = unix.Unmount(target, unix.MNT_DETACH)
		}
		if e := cmd.Wait(); err == nil {
			err = e
		}
		return err
	}, nil
}
