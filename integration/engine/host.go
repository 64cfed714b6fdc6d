package engine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
)

// HostEnv, when set, turns a test binary into a host: call RunHost first thing in
// TestMain. Its value is the directory of the place.
const HostEnv = "PLYFS_TEST_ENGINE_HOST"

// Command is what a host executes.
type Command struct {
	Args  []string
	Dir   string
	Env   []string
	UID   int // and group; of whom the command is run
	GID   int
	Stdin []byte
	Limit time.Duration
}

// Result is how a command ended.
type Result struct {
	Code           int // exit code; 128 + signal
	Stdout, Stderr string
	// Held: something still had the output open some time after the end of the command.
	// A caller that reads it to the end would hang.
	Held bool
	// Err says why there is no exit code.
	Err string
}

// heldLimit is how long a command's output may stay open after its end.
const heldLimit = 3 * time.Second

const socketName = "host.sock"

// RunHost serves commands until standard input ends, and reports on standard output that
// it is there.
func RunHost(dir string) error {
	r, err := newReaper()
	if err != nil {
		return fmt.Errorf("become a subreaper: %w", err)
	}
	if err := furnish(dir); err != nil {
		return err
	}
	l, err := net.Listen("unix", filepath.Join(dir, socketName))
	if err != nil {
		return fmt.Errorf("listen for commands: %w", err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed below
			}
			go serve(r, c)
		}
	}()
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	return errors.Join(err, l.Close())
}

// serve executes one command for one connection.
func serve(r *reaper, c net.Conn) {
	defer c.Close() // the answer has been read, or nobody is there
	var cmd Command
	var res Result
	if err := json.NewDecoder(c).Decode(&cmd); err != nil {
		res.Err = err.Error()
	} else if res, err = execute(r, cmd); err != nil {
		res.Err = err.Error()
	}
	_ = json.NewEncoder(c).Encode(res) // the test has gone
}

// execute runs a command as a shell would that reads both outputs to their ends.
func execute(r *reaper, cmd Command) (res Result, err error) {
	var pipes [3][2]*os.File // reading and writing end
	for i := range pipes {
		if pipes[i][0], pipes[i][1], err = os.Pipe(); err != nil {
			return res, err
		}
		defer pipes[i][0].Close()
		defer pipes[i][1].Close()
	}
	attr := &syscall.ProcAttr{
		Dir: cmd.Dir, Env: cmd.Env, Files: []uintptr{pipes[0][0].Fd(), pipes[1][1].Fd(), pipes[2][1].Fd()},
		Sys: &syscall.SysProcAttr{Setpgid: true},
	}
	if cmd.UID != os.Geteuid() {
		attr.Sys.Credential = &syscall.Credential{Uid: uint32(cmd.UID), Gid: uint32(cmd.GID)}
	}
	// Ours, not the child's, in a blocking read of which no deadline could end.
	in, out, errs := pipes[0][1], pipes[1][0], pipes[2][0]
	pid, ended, err := r.start(cmd.Args, attr)
	for _, f := range []*os.File{pipes[0][0], pipes[1][1], pipes[2][1]} {
		_ = f.Close() // the child has them
	}
	if err != nil {
		return res, err
	}
	go func() {
		_, _ = in.Write(cmd.Stdin) // a command need not read it
		_ = in.Close()
	}()
	read := make(chan struct{}, 2)
	for _, o := range []struct {
		from *os.File
		to   *string
	}{{out, &res.Stdout}, {errs, &res.Stderr}} {
		go func() {
			b, _ := io.ReadAll(o.from) // up to the deadline below
			*o.to = string(b)
			read <- struct{}{}
		}()
	}
	limit := time.NewTimer(cmd.Limit)
	defer limit.Stop()
	var status unix.WaitStatus
	timedOut := false
	select {
	case status = <-ended:
	case <-limit.C:
		timedOut = true
		_ = unix.Kill(-pid, unix.SIGKILL) // it may just have ended
		status = <-ended
	}
	deadline := time.NewTimer(heldLimit)
	defer deadline.Stop()
	for range 2 {
		select {
		case <-read:
		case <-deadline.C:
			res.Held = true
			now := time.Now()
			_ = errors.Join(out.SetReadDeadline(now), errs.SetReadDeadline(now)) // pipes have deadlines
			<-read
		}
	}
	switch {
	case timedOut:
		return res, fmt.Errorf("did not end within %s", cmd.Limit)
	case status.Signaled():
		res.Code = 128 + int(status.Signal())
	default:
		res.Code = status.ExitStatus()
	}
	return res, nil
}

// processes lists what a host still has below it, without dead ones that are about to be
// reaped.
func processes(host int) []string {
	var found []string
	for _, pid := range harness.Family(host)[1:] {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && len(b) > 0 {
			found = append(found, fmt.Sprintf("%d: %s", pid, strings.ReplaceAll(strings.TrimRight(string(b), "\x00"), "\x00", " ")))
		}
	}
	slices.Sort(found)
	return found
}
