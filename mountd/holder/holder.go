package holder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/mountd/events"
	"github.com/plyfs/plyfs/unionfs"
	"github.com/plyfs/plyfs/unionfs/transport"
)

// HolderMain is the hidden verb [VerbHolder]. It returns the exit status.
func HolderMain(logger *zap.Logger) int {
	becomeDaemon("plyfs-holder")
	parent, err := linkFromFile(os.NewFile(3, "status socket"))
	if err != nil {
		logger.Error("holder not started by plyfs", zap.Error(err))
		return 1
	}
	m, with, err := parent.recv()
	if err == nil && (m.Spec == nil || m.Kind != kindSpec && (m.Kind != kindAdopt || with.at(0) == nil || m.State == nil)) {
		err = errors.New("no spec")
	}
	if err != nil {
		logger.Error("no mount spec received", zap.Error(err))
		return 1
	}
	if m.Spec.Comm != "" {
		setComm(m.Spec.Comm)
	}
	h := &holder{kept: make(map[uint64]files), spec: *m.Spec, log: logger.With(zap.String("mount_id", m.Spec.ID)), serverLog: os.Stderr}
	sigs := make(chan os.Signal, 4)
	signal.Notify(sigs, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1)
	if m.Kind == kindAdopt {
		h.adopt(parent, m, with)
		parent = nil
	}
	defer h.removeRunDir()
	if err := h.run(parent, sigs); err != nil {
		h.log.Error("mount ended", zap.String("target", h.spec.Target), zap.Error(err))
		return 1
	}
	return 0
}

// Foreground runs the holder in the calling process until the mount ends.
// Cancelling ctx unmounts; live is called once the mount is usable.
func Foreground(ctx context.Context, spec Spec, logger *zap.Logger, live func(State)) error {
	if err := spec.Validate(); err != nil {
		return err
	}
	h := &holder{kept: make(map[uint64]files), spec: spec, log: logger, serverLog: os.Stderr, live: live}
	sigs := make(chan os.Signal, 4)
	signal.Notify(sigs, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1)
	defer signal.Stop(sigs)
	stop := context.AfterFunc(ctx, func() { sigs <- unix.SIGTERM })
	defer stop()
	return h.run(nil, sigs)
}

// holder owns one mount.
type holder struct {
	spec      Spec
	log       *zap.Logger
	serverLog *os.File
	live      func(State)

	keep   bool      // the mount goes on where we are killed
	spare  *os.File  // the socket of a spare holder, for the next server; may be nil
	server *exec.Cmd // nil: it is not our child, but has made us
	ctl    *link
	dev    *os.File // our copy of /dev/fuse: the connection lives while it is open
	state  State

	resume  *transport.Resume // what the next server needs; nil: there can be none
	ledger  *os.File          // the same: what this one writes down; nil: it need not
	upper   *os.File          // the same: the mount that the upper lies in; may be nil
	kept    map[uint64]files  // the same: descriptors of objects without a name, by node id
	since   time.Time         // when the server began to serve; zero: it has not
	crashed bool              // the last server ended by an error of its own
	deaths  int               // of servers in a row that have not served for long
	stuck   *time.Timer       // ends one that takes too long to take over
	told    bool              // there is an event of the mount's beginning
}

// event is what the holder's loop waits for.
type event struct {
	from *link
	m    message
	with files
	err  error
}

// run goes through the start and then watches until the mount has ended.
// parent is nil in the foreground.
func (h *holder) run(parent *link, sigs <-chan os.Signal) (err error) {
	news := make(chan event)
	quit := make(chan struct{})
	defer close(quit)
	listen := func(l *link) {
		for {
			m, with, err := l.recv()
			select {
			case news <- event{l, m, with, err}:
			case <-quit:
				with.close()
				return
			}
			if err != nil {
				return
			}
		}
	}
	live := h.dev != nil                            // adopted
	h.keep = live || parent != nil && !h.spec.Bound // in the foreground the mount is to end with us
	if !live {
		if err := h.startServer(); err != nil {
			tell(parent, message{Kind: kindError, Error: toWire(err)})
			return err
		}
	}
	go listen(h.ctl)
	if parent != nil {
		go listen(parent)
	}

	signals := 0
	for {
		select {
		case s := <-sigs:
			if s == unix.SIGUSR1 {
				h.signal(unix.SIGUSR1) // it prints how much it knows
				continue
			}
			if s == unix.SIGHUP { // the terminal of a foreground mount, or a habit
				s = unix.SIGTERM
			}
			if h.dev == nil {
				h.end()
				return fmt.Errorf("stopped by %v before it was mounted", s)
			}
			signals++
			if err := h.unmountAll(signals > 1); err != nil {
				h.log.Warn("cannot unmount on signal; send it again to detach the mount while it is in use",
					zap.String("target", h.spec.Target), zap.Error(err))
			}
		case e := <-news:
			switch {
			case e.from == parent && e.err != nil:
				if !live {
					h.end()
					return errors.New("the command that asked for the mount went away")
				}
				parent = nil
				if h.spec.Bound {
					h.letGo()
				}
			case e.from == parent && e.m.Kind == kindGo:
				if err := h.mount(); err != nil {
					tell(parent, message{Kind: kindError, Error: toWire(err)})
					h.end()
					return err
				}
			case e.from == h.ctl && e.err != nil:
				err := h.serverGone(e.err)
				if h.mayResume() {
					if err = h.startAgain(err); err == nil {
						go listen(h.ctl)
						continue
					}
				}
				err = h.lost(err)
				tell(parent, message{Kind: kindError, Error: toWire(err)})
				return err
			case e.from != parent && e.from != h.ctl:
				e.with.close() // of a server that is gone
			case e.m.Kind == kindKeep:
				h.drop(e.m.Node)
				h.kept[e.m.Node] = e.with
			case e.m.Kind == kindDrop:
				h.drop(e.m.Node)
			case e.m.Kind == kindRefused:
				h.state.Refused++
				h.recordState()
				h.event(events.Refuse, nil)
			case e.m.Kind == kindError && e.m.Error != nil:
				tell(parent, message{Kind: kindError, Error: e.m.Error})
				h.end()
				if live {
					h.recordExit(e.m.Error)
					h.ended(e.m.Error)
				}
				return e.m.Error
			case e.m.Kind == kindPrepared && h.dev != nil:
				if err := h.handOver(); err != nil { // its end is an event, too
					h.log.Warn("another mount server", zap.Error(err))
				}
			case e.m.Kind == kindPrepared:
				if parent != nil {
					tell(parent, message{Kind: kindPrepared})
				} else if err := h.mount(); err != nil {
					h.end()
					return err
				}
			case e.m.Kind == kindLive && live:
				e.with.close() // it has come from us
				h.stuck.Stop()
				h.since = time.Now()
				h.log.Info("another mount server goes on", zap.String("target", h.spec.Target), zap.Int("pid", h.state.Server.Pid))
				h.recordState()
				h.event(events.Restart, nil)
			case e.m.Kind == kindLive:
				live, h.since = true, time.Now()
				h.resume, h.ledger, h.upper = e.m.Resume, e.with.at(0), e.with.at(1)
				transport.SetReadAhead(h.state.Major, h.state.Minor)
				h.recordState()
				h.told = true
				h.event(events.Mount, nil)
				tell(parent, message{Kind: kindLive, State: &h.state})
				if h.live != nil {
					h.live(h.state)
				}
				unionfs.Trim() // from here on we only wait
			case e.m.Kind == kindDone:
				return h.finished(e.m.Error)
			}
		}
	}
}

// waitServer waits for the end of the server and says how it was, as far as can be known.
func (h *holder) waitServer() error {
	if h.server != nil {
		return h.server.Wait()
	}
	ctx, cancel := context.WithTimeout(context.Background(), resumeTimeout)
	defer cancel()
	if err := h.state.Server.WaitGone(ctx); err != nil {
		return err
	}
	return errors.New("it was no child")
}

func (h *holder) signal(s unix.Signal) {
	if p := h.state.Server; p.Alive() {
		_ = unix.Kill(p.Pid, s) // it may have ended
	}
}

// tell sends m if there is somebody to tell. A parent that is gone shows up as
// an event of its own.
func tell(parent *link, m message) {
	if parent != nil {
		_ = parent.send(m)
	}
}

func (h *holder) startServer() error {
	l, theirs, err := socketPair()
	if err != nil {
		return err
	}
	defer theirs.Close()
	h.server, err = spawn(VerbServer, h.spec.Target, theirs, h.serverLog)
	if err != nil {
		l.close()
		return err
	}
	h.ctl = l
	h.state.Target, h.state.Holder = h.spec.Target, Self()
	h.state.Server, _ = Lookup(h.server.Process.Pid) // empty if it died at once: seen as an event
	if err := l.send(message{Kind: kindSpec, Spec: &h.spec, Restarts: h.state.Restarts}, h.upper); err != nil {
		return err
	}
	if h.keep {
		h.makeSpare() // while the server opens the layers
	}
	return nil
}

func (h *holder) mount() error {
	dev, err := transport.Mount(h.spec.mountOptions())
	if err != nil {
		return err
	}
	h.dev = dev
	if m, err := ownMount(h.spec.Target); err == nil {
		h.state.Major, h.state.Minor = m.Major, m.Minor
	}
	return h.handOver()
}

// handOver lets the server serve. Requests wait in the kernel until it answers.
func (h *holder) handOver() error {
	for node, with := range h.kept {
		if err := h.ctl.send(message{Kind: kindKeep, Node: node}, with...); err != nil {
			return fmt.Errorf("hand over what has no name: %w", err)
		}
	}
	if err := h.ctl.send(message{Kind: kindServe, Resume: h.resume, Keep: h.keep, Restarts: h.state.Restarts, Crashed: h.crashed}, h.dev, h.ledger); err != nil {
		return fmt.Errorf("hand over /dev/fuse: %w", err)
	}
	h.giveSpare()
	return nil
}

// removeRunDir removes a run directory that is the mount's own.
func (h *holder) removeRunDir() {
	if !h.spec.OwnRunDir {
		return
	}
	if err := os.RemoveAll(h.spec.RunDir); err != nil {
		h.log.Warn("run directory not removed", zap.String("name", h.spec.RunDir), zap.Error(err))
	}
}

func (h *holder) recordState() {
	if h.spec.RunDir == "" {
		return
	}
	if err := writeJSON(filepath.Join(h.spec.RunDir, stateFile), &h.state); err != nil {
		h.log.Warn("state of the mount not recorded", zap.Error(err))
	}
}

func (h *holder) recordExit(err error) {
	if h.spec.RunDir == "" {
		return
	}
	if werr := writeJSON(filepath.Join(h.spec.RunDir, exitFile), &Exit{Error: err.Error()}); werr != nil {
		h.log.Warn("end of the mount not recorded", zap.Error(werr))
	}
}

// letGo takes a live mount out of the tree because its starter has ended. It ends
// when the last process that has it elsewhere, which the starter has started, does.
func (h *holder) letGo() {
	h.log.Info("the process that the mount belongs to has ended", zap.String("target", h.spec.Target))
	if err := h.unmountAll(true); err != nil && !errors.Is(err, unix.EINVAL) { // it has unmounted first
		h.log.Warn("cannot detach the mount", zap.String("target", h.spec.Target), zap.Error(err))
	}
}

// finished is the regular end: the server has unmounted, synced and said so.
func (h *holder) finished(bad *wireError) error {
	_ = h.waitServer() // its message is its status
	h.ctl.close()
	if bad != nil {
		h.detach()
		h.recordExit(bad)
	}
	h.closeDev()
	if bad != nil {
		h.ended(bad)
		return bad
	}
	h.ended(nil)
	return nil
}

// lost is the end of a mount that nobody serves any more.
func (h *holder) lost(err error) error {
	h.detach()
	h.closeDev()
	h.recordExit(err)
	h.ended(err)
	return err
}

// end gives up before the mount was live.
func (h *holder) end() {
	h.detach()
	h.ctl.close() // the server ends when it sees this
	h.closeDev()
	_ = h.waitServer() // nothing was mounted: nothing to report
}

// closeDev lets go of the connection and of what was for the next server.
func (h *holder) closeDev() {
	h.closeSpare()
	for node := range h.kept {
		h.drop(node)
	}
	for _, f := range []**os.File{&h.upper, &h.ledger, &h.dev} {
		if *f != nil {
			_ = (*f).Close() // nothing is buffered in it
			*f = nil
		}
	}
}

// drop closes the descriptor of an object that has no name.
func (h *holder) drop(node uint64) {
	h.kept[node].close()
	delete(h.kept, node)
}
