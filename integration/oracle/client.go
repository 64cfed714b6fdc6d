package oracle

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"time"

	"github.com/plyfs/plyfs/integration/harness"
)

// Client is the test's end of an agent process.
type Client struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *json.Decoder
	enc    *json.Encoder
	stderr harness.LockedBuffer
	done   chan error
	limit  time.Duration
}

// ErrHang means that an operation did not return in time.
var ErrHang = errors.New("operation hangs")

// StartAgent starts this test binary again as an agent inside dir. users is
// how many of Users it can be.
func StartAgent(dir string, users int, limit time.Duration) (*Client, error) {
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	cmd.Env = append(os.Environ(), AgentEnv+"="+dir, AgentEnv+"_USERS="+strconv.Itoa(users),
		// Preemption signals would interrupt requests of a FUSE client.
		"GODEBUG=asyncpreemptoff=1", "GOTRACEBACK=none")
	c := &Client{cmd: cmd, done: make(chan error, 1), limit: limit}
	cmd.Stderr = &c.stderr
	var err error
	if c.in, err = cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start agent: %w", err)
	}
	c.out = json.NewDecoder(bufio.NewReaderSize(out, 1<<16))
	c.enc = json.NewEncoder(c.in)
	return c, nil
}

// Do executes one operation. ErrHang is returned after the client's limit; the
// agent is useless then, and blocked until its mount is aborted.
func (c *Client) Do(op Op) (Result, error) {
	type answer struct {
		r   Result
		err error
	}
	ch := make(chan answer, 1)
	go func() {
		var a answer
		if a.err = c.enc.Encode(op); a.err == nil {
			a.err = c.out.Decode(&a.r)
		}
		ch <- a
	}()
	timer := time.NewTimer(c.limit)
	defer timer.Stop()
	select {
	case a := <-ch:
		if a.err != nil {
			return a.r, fmt.Errorf("agent ended during %s: %w: %s", op, a.err, c.stderr.String())
		}
		return a.r, nil
	case <-timer.C:
		return Result{}, fmt.Errorf("%s: %w for %s; the agent waits in %s", op, ErrHang, c.limit, c.where())
	}
}

// where reads what the agent's threads wait for.
func (c *Client) where() string {
	dir := fmt.Sprintf("/proc/%d/task", c.cmd.Process.Pid)
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return "?"
	}
	var b bytes.Buffer
	for _, t := range tasks {
		w, _ := os.ReadFile(dir + "/" + t.Name() + "/wchan") // only for the message
		if len(w) > 1 && string(w) != "futex_do_wait" {
			fmt.Fprintf(&b, "%s ", w)
		}
	}
	return b.String()
}

// Close ends the agent and waits for it.
func (c *Client) Close() error {
	if err := c.in.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("close agent: %w", err)
	}
	ch := make(chan error, 1)
	go func() { ch <- c.cmd.Wait() }()
	timer := time.NewTimer(c.limit)
	defer timer.Stop()
	select {
	case err := <-ch:
		if err != nil {
			return fmt.Errorf("agent: %w: %s", err, c.stderr.String())
		}
		return nil
	case <-timer.C:
		_ = c.cmd.Process.Kill() // it waits in the kernel; the abort that follows lets it end
		return fmt.Errorf("agent does not end: %w", ErrHang)
	}
}

// Signal sends a signal to the agent, which dies of it, and waits for its end:
// whatever it was doing is cut off.
func (c *Client) Signal(sig os.Signal) error {
	if err := c.cmd.Process.Signal(sig); err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	ch := make(chan error, 1)
	go func() { ch <- c.cmd.Wait() }()
	timer := time.NewTimer(c.limit)
	defer timer.Stop()
	select {
	case <-ch: // it was killed, which Wait calls an error
		return nil
	case <-timer.C:
		return fmt.Errorf("agent does not end on %v: %w; it waits in %s", sig, ErrHang, c.where())
	}
}

// Kill ends the agent with SIGKILL, for clean-up after a failure.
func (c *Client) Kill() {
	_ = c.cmd.Process.Kill() // it may have ended
	_ = c.in.Close()         // likewise
	_ = c.cmd.Wait()         // its state does not matter any more
}
