package holder

import (
	"errors"
	"fmt"
	"io"
	"os/exec"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// adopt takes over from a holder that was killed. The server has sent the spec, the
// connection and what the next server needs.
func (h *holder) adopt(ctl *link, m message, with files) {
	h.ctl, h.dev, h.ledger, h.upper, h.resume, h.since = ctl, with.at(0), with.at(1), with.at(2), m.Resume, time.Now()
	if was, err := ReadState(h.spec.RunDir); err == nil && h.spec.RunDir != "" {
		h.state = was
	} else if own, err := ownMount(h.spec.Target); err == nil {
		h.state.Major, h.state.Minor = own.Major, own.Minor
	}
	h.state.Target, h.state.Holder, h.state.Server = h.spec.Target, Self(), m.State.Server
	h.told = true
	h.log.Warn("the holder of a mount was killed; this is another one", zap.String("target", h.spec.Target), zap.Int("server", h.state.Server.Pid))
	h.makeSpare()
	h.giveSpare() // before anybody hears of us, and may kill us
	h.recordState()
}

// makeSpare makes a spare holder for the next server. Without, the mount does not outlive us.
func (h *holder) makeSpare() {
	h.closeSpare()
	var err error
	if h.spare, err = forkSpare(h.spec.Target); err != nil {
		h.log.Warn("this mount will not outlive its holder", zap.String("target", h.spec.Target), zap.Error(err))
	}
}

// giveSpare leaves it to the server, with which it ends.
func (h *holder) giveSpare() {
	if h.spare != nil {
		_ = h.ctl.send(message{Kind: kindSpare}, h.spare) // a server that is gone needs none
		h.closeSpare()
	}
}

func (h *holder) closeSpare() {
	if h.spare != nil {
		_ = h.spare.Close() // nothing is buffered in it
		h.spare = nil
	}
}

// serverGone says how a server ended that did not say goodbye.
func (h *holder) serverGone(err error) error {
	if h.stuck != nil {
		h.stuck.Stop()
	}
	werr := h.waitServer()
	var exit *exec.ExitError
	if h.crashed = errors.As(werr, &exit); h.crashed {
		ws, ok := exit.Sys().(syscall.WaitStatus)
		h.crashed = !ok || !ws.Signaled() || ws.Signal() != unix.SIGKILL
	}
	if !errors.Is(err, io.EOF) {
		werr = errors.Join(err, werr)
	}
	if werr == nil {
		werr = errors.New("exit status 0")
	}
	h.ctl.close()
	return fmt.Errorf("the mount server of %q ended unexpectedly: %w", h.spec.Target, werr)
}

// A server that ends as soon as it serves is not started for ever: a request that kills
// it comes again each time.
const (
	maxDeaths = 10 // in a row, each of a server
	tooSoon   = time.Second
	// takeOverTimeout is how long a server may take until it answers requests: some
	// microseconds for each object that the kernel knows.
	takeOverTimeout = 5 * time.Minute
	// resumeTimeout is how long it may take to end.
	resumeTimeout = 30 * time.Second
)

// mayResume reports whether a new server can go on where one has just ended. Of a mount that
// has been unmounted meanwhile it does what comes at the end.
func (h *holder) mayResume() bool {
	if h.resume == nil || h.dev == nil {
		return false
	}
	if h.since.IsZero() || time.Since(h.since) < tooSoon {
		h.deaths++
	} else {
		h.deaths = 0
	}
	h.since = time.Time{}
	if h.deaths >= maxDeaths {
		h.log.Error("mount servers end again and again", zap.String("target", h.spec.Target), zap.Int("times", h.deaths))
		return false
	}
	return true
}

// startAgain starts a new server; why is how the last one ended.
func (h *holder) startAgain(why error) error {
	h.log.Warn("another mount server is started", zap.Error(why))
	h.state.Restarts++
	if err := h.startServer(); err != nil {
		return errors.Join(why, err)
	}
	server := h.server.Process
	h.stuck = time.AfterFunc(takeOverTimeout, func() { _ = server.Kill() }) // it may have ended
	return nil
}
