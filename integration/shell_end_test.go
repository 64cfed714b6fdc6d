package integration

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
)

// TestShellKilled kills each process of a shell, and some together: nothing may be
// left, and the container keeps what was written.
func TestShellKilled(t *testing.T) {
	as(t, func(t *testing.T, p *person) {
		p.load(shellImage(t, nil))
		p.run("create", "shell:1", "work")
		for i, victims := range [][]string{
			{"shell"},
			{"shell-keeper"},
			{"shell-init"},
			{"mount-server"},
			{"shell", "shell-keeper"},
			{"shell-keeper", "mount-holder"},
			{"shell-keeper", "mount-server"},
			{"shell", "shell-keeper", "shell-init", "mount-holder", "mount-server"},
		} {
			text := strings.Join(victims, "+")
			sh := startShell(t, p, "-e", "TEXT="+text, "work", "sh", "-c", "echo $TEXT >> /log; sleep 100 & echo ready; wait")
			sh.waitFor("ready")
			found := p.processes()
			found["shell"] = sh.cmd.Process.Pid
			for _, v := range victims {
				if found[v] == 0 {
					t.Fatalf("no process %s: %v", v, found)
				}
				if err := unix.Kill(found[v], unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
					t.Errorf("kill %s: %v", v, err)
				}
			}
			if text == "mount-server" { // programs get errors, and may go on all the same
				if err := sh.cmd.Process.Signal(unix.SIGTERM); err != nil {
					t.Error(err)
				}
			}
			if status := sh.wait(); status == 0 {
				t.Errorf("%s: status 0", text)
			}
			p.waitNone()
			if out := p.run("ps", "-q"); len(strings.Fields(out)) != 1 {
				t.Errorf("%s: containers %q", text, out)
			}
			if out := p.run("ps"); !strings.Contains(out, "created") {
				t.Errorf("%s: still mounted:\n%s", text, out)
			}
			out := p.run("shell", "-q", "work", "cat", "/log")
			if lines := strings.Fields(out); len(lines) != i+1 || lines[i] != text {
				t.Errorf("%s: the container has %q", text, out)
			}
		}
		if names, err := os.ReadDir(p.path("run")); err != nil || len(names) != 1 {
			t.Errorf("run directory: %v, %v", names, err)
		}
	})
}

// TestShellOutlivesHolder kills the process that owns the mount: the shell goes on,
// and all ends with it.
func TestShellOutlivesHolder(t *testing.T) {
	as(t, func(t *testing.T, p *person) {
		p.load(shellImage(t, nil))
		sh := startShell(t, p, "--name", "work", "shell:1", "sh", "-c", "echo ready; while ! test -e /tmp/go; do sleep 0.1; done; echo on > /on; cat /on; exec sleep 100")
		sh.waitFor("ready")
		found := p.processes()
		if err := unix.Kill(found["mount-holder"], unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "end of the holder", func() bool { return p.processes()["mount-holder"] == 0 })
		if p.uid == 0 { // the mount of a user namespace is closed to root of the machine as well
			if err := os.WriteFile("/proc/"+strconv.Itoa(found["shell-init"])+"/root/tmp/go", nil, 0o644); err != nil {
				t.Fatal(err)
			}
			sh.waitFor("on")
		}
		if err := sh.cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Error(err)
		}
		sh.wait()
		p.waitNone()
		p.run("rm", "work")
	})
}

func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for wait := time.Millisecond; !ok(); wait = min(2*wait, 100*time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s has not come", what)
		}
		<-time.After(wait)
	}
}

// TestShellTerminal types into a shell that has a terminal.
func TestShellTerminal(t *testing.T) {
	as(t, func(t *testing.T, p *person) {
		p.load(shellImage(t, nil))
		master, slave := openPty(t)
		if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 33, Col: 99}); err != nil {
			t.Fatal(err)
		}
		before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		cmd := p.cmd(ctx, p.bin, slices.Concat([]string{"shell"}, p.opts, []string{"-q", "--rm", "-e", "PS1=", "shell:1", "sh"})...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
		cmd.Env = append(cmd.Env, "TERM=dumb")
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty = true, true
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill() }) // it has ended, unless the test has failed
		out := make(chan string, 100)
		go func() {
			defer close(out)
			buf := make([]byte, 4096)
			for {
				n, err := master.Read(buf)
				if err != nil {
					return
				}
				out <- string(buf[:n])
			}
		}()
		sh := &runningShell{t: t, out: out}
		say := func(text, want string) {
			t.Helper()
			if _, err := master.WriteString(text); err != nil {
				t.Fatal(err)
			}
			sh.waitFor(want)
		}
		// The answers are not what is typed, which the terminal shows as well.
		say("tty; stty size; echo $TERM $((20+3))\n", "dumb 23")
		say("test -c /dev/console && echo cons$((1+1))\n", "cons2")
		say("(echo run$((30+4)); exec sleep 100)\n", "run34")
		say("\x03", "^C")
		say("(echo job$((40+5)); exec sleep 100)\n", "job45")
		say("\x1a", "Stopped")
		say("kill -9 %1; wait; echo killed$((50+6))\n", "killed56")
		if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 44, Col: 111}); err != nil {
			t.Fatal(err)
		}
		say("while test \"$(stty size)\" != '44 111'; do sleep 0.1; done; echo size $((60+7))\n", "size 67")
		say("exit 5\n", "exit 5")
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case err := <-done:
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 5 {
				t.Errorf("end: %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("the shell does not end")
		}
		after, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
		if err != nil || *after != *before {
			t.Errorf("the terminal is not what it was: %+v, %+v, %v", before, after, err)
		}
	})
}

// openPty makes a terminal of this machine.
func openPty(t testing.TB) (master, slave *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		harness.Skip(t, "needs a terminal: %v", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		t.Fatal(errno)
	}
	master, slave = os.NewFile(uintptr(fd), "master"), os.NewFile(peer, "slave")
	t.Cleanup(func() { _, _ = master.Close(), slave.Close() }) // nothing was written to be lost
	return master, slave
}
