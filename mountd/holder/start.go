package holder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// StartOptions tune [Start].
type StartOptions struct {
	// Log becomes standard output and error of holder and server; nil is
	// /dev/null. The caller closes its own copy.
	Log *os.File
}

// Pending is a mount whose processes run and have opened every layer, but
// which is not mounted yet.
type Pending struct {
	// Process is the holder: what the caller records before [Pending.Go].
	Process Process

	cmd   *exec.Cmd
	link  *link
	bound bool        // the link stays open for as long as we live
	stop  func() bool // ends the watch over the context
}

// Start checks the spec, makes holder and mount server and waits until they
// are ready to mount. Cancelling ctx before Go has returned ends both.
func Start(ctx context.Context, spec Spec, o StartOptions) (*Pending, error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	l, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	cmd, err := spawn(VerbHolder, spec.Target, theirs, o.Log)
	_ = theirs.Close() // the child has its copy
	if err != nil {
		l.close()
		return nil, err
	}
	p := &Pending{cmd: cmd, link: l, bound: spec.Bound}
	p.stop = context.AfterFunc(ctx, l.close) // the holder sees the end and gives up
	_ = l.c.SetDeadline(time.Now().Add(startTimeout))

	if p.Process, err = Lookup(cmd.Process.Pid); err == nil {
		err = l.send(message{Kind: kindSpec, Spec: &spec})
	}
	if err == nil {
		_, _, err = l.expect(kindPrepared)
	}
	if err != nil {
		p.Abort()
		return nil, startError(ctx, err, o.Log)
	}
	return p, nil
}

// Go mounts. It returns when the kernel's first request was answered; from
// then on the mount is on its own.
func (p *Pending) Go(ctx context.Context) (State, error) {
	// The context of Start may be the same one; a second watch does no harm.
	stop := context.AfterFunc(ctx, p.link.close)
	var m message
	err := ctx.Err() // what watches over it runs in its own time
	if err == nil {
		err = p.link.send(message{Kind: kindGo})
	}
	if err == nil {
		m, _, err = p.link.expect(kindLive)
	}
	stop()
	if err == nil && m.State == nil {
		err = errors.New("holder reported no state")
	}
	if err != nil {
		p.Abort()
		return State{}, startError(ctx, err, nil)
	}
	p.release()
	return *m.State, nil
}

// Abort ends the processes of a mount that nobody was told is live, and waits for
// them. It may have become live all the same, just when the starter gave up: then the
// holder takes the end of the link for that of a starter that is content, so it is
// told by signals, the second of which detaches a mount that is in use already.
func (p *Pending) Abort() {
	p.stop()
	p.link.close()
	const patience = 2 * time.Second
	tell := func() { _ = p.cmd.Process.Signal(unix.SIGTERM) } // or it has ended
	tell()
	again := time.AfterFunc(patience, tell)
	defer again.Stop()
	_ = p.cmd.Wait() // its status says nothing that its message did not
}

// release lets the holder go: it is reaped when it ends, whenever that is.
func (p *Pending) release() {
	p.stop()
	if !p.bound {
		p.link.close()
	}
	go func() { // ends with the holder, or with us
		_ = p.cmd.Wait()
		p.link.close()
	}()
}

// startError explains an end of the socket without a message.
func startError(ctx context.Context, err error, log *os.File) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, io.EOF):
		err = errors.New("the mount's process ended unexpectedly")
		if log != nil {
			err = fmt.Errorf("%w; its last words in %s: %s", err, log.Name(), lastLine(log.Name()))
		}
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("the mount was not ready within %s", startTimeout)
	}
	return err
}

// lastLine returns the last line of a log, for a message.
func lastLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	s := lines[len(lines)-1]
	if len(s) > 500 {
		s = s[:500]
	}
	return fmt.Sprintf("%q", s)
}
