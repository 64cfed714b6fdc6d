//go:build amd64 || arm64

package confine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// childEnv makes this binary a process that is confined.
const childEnv = "PLYFS_TEST_CONFINED"

func TestMain(m *testing.M) {
	switch os.Getenv(childEnv) {
	case "":
		os.Exit(m.Run())
	case "filter":
		fmt.Println(confined(Options{}))
	case "looser":
		fmt.Println(confined(Options{Unmount: true, Kill: true}))
	case "foreign":
		fmt.Println(foreign())
	}
}

// confined installs the filter and says what does not go as it should.
func confined(o Options) (wrong []string) {
	check := func(what string, got, want error) {
		if !errors.Is(got, want) || want == nil && got != nil {
			wrong = append(wrong, fmt.Sprintf("%s: %v, expected %v", what, got, want))
		}
	}
	before, after := make(chan bool), make(chan error) // a thread that is there already
	go func() {
		<-before
		_, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		after <- err
	}()
	dir, err := os.MkdirTemp("", "confine")
	if err != nil {
		return []string{err.Error()}
	}
	if err := Filter(o); err != nil {
		return []string{err.Error()}
	}
	close(before)
	check("socket in another thread", <-after, unix.ENOSYS)
	check("execve", unix.Exec("/proc/self/exe", []string{"x"}, nil), unix.ENOSYS)
	_, err = os.StartProcess("/proc/self/exe", []string{"x"}, &os.ProcAttr{})
	check("fork", err, unix.ENOSYS)
	check("mount", unix.Mount("none", dir, "tmpfs", 0, ""), unix.ENOSYS)
	check("chroot", unix.Chroot("/"), unix.ENOSYS)
	check("unshare", unix.Unshare(unix.CLONE_NEWUSER), unix.ENOSYS)
	_, err = unix.OpenTree(unix.AT_FDCWD, "/", unix.OPEN_TREE_CLONE)
	check("open_tree", err, unix.ENOSYS)
	check("setuid", unix.Setuid(os.Getuid()), unix.ENOSYS)
	check("ptrace", unix.PtraceAttach(os.Getppid()), unix.ENOSYS)
	check("dumpable", unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0), unix.ENOSYS)
	notUnmounted, signalled := error(unix.ENOSYS), error(unix.ENOSYS)
	if o.Unmount {
		notUnmounted = unix.EINVAL // it is allowed, and no mount point
		if os.Geteuid() != 0 {
			notUnmounted = unix.EPERM
		}
	}
	if o.Kill {
		signalled = nil
	}
	check("umount2", unix.Unmount(dir, 0), notUnmounted)
	check("kill of the parent", unix.Kill(os.Getppid(), 0), signalled)

	check("kill", unix.Kill(os.Getpid(), 0), nil)
	check("write", os.WriteFile(dir+"/f", []byte("x"), 0o600), nil)
	check("rename", os.Rename(dir+"/f", dir+"/g"), nil)
	_, err = os.ReadDir(dir)
	check("read a directory", err, nil)
	check("remove", os.RemoveAll(dir), nil)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	check("socketpair", err, unix.ENOSYS)
	_ = fds
	var wg sync.WaitGroup // threads can still be made
	for range 32 {
		wg.Go(func() {
			fds := make([]int, 2)
			if err := unix.Pipe2(fds, unix.O_CLOEXEC); err == nil {
				_, _ = unix.Write(fds[1], []byte{1})
				_, _ = unix.Read(fds[0], make([]byte, 1))
			}
		})
	}
	wg.Wait()
	return wrong
}

// foreign calls getpid as x32 does, which is to end the process.
func foreign() error {
	if err := Filter(Options{}); err != nil {
		return err
	}
	_, _, errno := unix.RawSyscall(unix.SYS_GETPID|x32, 0, 0, 0)
	return errno
}

func TestFilter(t *testing.T) {
	for _, kind := range []string{"filter", "looser"} {
		out, err := child(kind)
		if strings.Contains(out, ErrUnavailable.Error()) {
			t.Skip(out)
		}
		if err != nil || out != "[]" {
			t.Errorf("%s: %v, %s", kind, err, out)
		}
	}
}

func TestForeignCallsEndTheProcess(t *testing.T) {
	out, err := child("foreign")
	if strings.Contains(out, ErrUnavailable.Error()) {
		t.Skip(out)
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || !strings.Contains(exit.Error(), "bad system call") {
		t.Errorf("%v, %s", err, out)
	}
}

func child(kind string) (string, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+kind)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// TestProgram: it is not longer than the kernel takes (BPF_MAXINSNS), and no call is listed twice.
func TestProgram(t *testing.T) {
	if n := len(program(Options{Unmount: true, Kill: true}, unix.SECCOMP_RET_LOG)); n > 4096 {
		t.Errorf("%d instructions", n)
	}
	seen := make(map[uint32]bool)
	for _, r := range rules(Options{}) {
		seen[r.call] = true
	}
	for _, c := range append(calls(), moreCalls...) {
		if seen[c] {
			t.Errorf("call %d twice", c)
		}
		seen[c] = true
	}
}
