package holder

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs"
	"github.com/plyfs/plyfs/unionfs/inject"
	"github.com/plyfs/plyfs/unionfs/ledger"
	"github.com/plyfs/plyfs/unionfs/trace"
	"github.com/plyfs/plyfs/unionfs/transport"
)

// ServerMain is the hidden verb [VerbServer]. It returns the exit status.
func ServerMain(logger *zap.Logger) int {
	becomeDaemon("plyfs-server")
	ctl, err := linkFromFile(os.NewFile(3, "control socket"))
	if err != nil {
		logger.Error("mount server not started by plyfs", zap.Error(err))
		return 1
	}
	m, with, err := ctl.expect(kindSpec)
	if err == nil && m.Spec == nil {
		err = errors.New("no spec")
	}
	if err != nil {
		logger.Error("no mount spec received", zap.Error(err))
		return 1
	}
	s := &server{self: Self(), spec: m.Spec, restarts: m.Restarts, upper: with.at(0), ctl: ctl, log: logger.With(zap.String("mount_id", m.Spec.ID))}
	s.watchSignals()
	if err := s.run(); err != nil {
		if s.orphan.Load() { // else the holder has been told, and says it
			s.log.Error("mount server stops", zap.String("target", s.spec.Target), zap.Error(err))
		}
		return 1
	}
	return 0
}

// server answers the requests of one mount.
type server struct {
	self     Process
	spec     *Spec
	restarts int      // how many servers have died before
	upper    *os.File // the mount that the upper lies in; nil: none of its own, or not known yet
	log      *zap.Logger
	dev      *os.File
	fs       *unionfs.FS
	ledger   *ledger.Ledger // nil: there is no memory for it
	suspects map[uint64]int // see transport.ServeOptions

	orphan atomic.Bool // the holder is gone
	keep   bool        // then a spare one takes its place
	ending atomic.Bool // nobody needs one any more

	mu     sync.Mutex
	ctl    *link             // guarded by mu
	spare  *link             // guarded by mu; to a holder that waits; nil: none
	resume *transport.Resume // guarded by mu; nil before the mount is live, or if nobody can take over
	live   bool              // guarded by mu
}

// send tells the holder.
func (s *server) send(m message, files ...*os.File) error {
	s.mu.Lock()
	ctl := s.ctl
	s.mu.Unlock()
	return ctl.send(m, files...)
}

// Keep implements unionfs.Keeper.
func (s *server) Keep(node uint64, fd int) {
	s.mu.Lock()
	ctl := s.ctl
	s.mu.Unlock()
	if err := ctl.sendFds(message{Kind: kindKeep, Node: node}, fd); err != nil && !s.orphan.Load() {
		s.log.Warn("an object without a name will be lost if this process is killed", zap.Uint64("node", node), zap.Error(err))
	}
}

// Drop implements unionfs.Keeper.
func (s *server) Drop(node uint64) {
	_ = s.send(message{Kind: kindDrop, Node: node}) // a holder that is gone keeps nothing
}

// gcPercent is how much garbage may lie around, in percent of what is in use.
// Most of that is inodes, of which there may be millions, and little garbage is
// made per request: memory is worth more here than a rare collection.
const gcPercent = 40

// ballast counts as memory in use, though nothing ever touches it and so it takes
// none: with little in use the collector would run, and stop the request loop, every
// few milliseconds. It allows for some 20 MiB of garbage, which package unionfs
// has collected when the mount is at rest.
const ballast = 48 << 20

func (s *server) run() error {
	debug.SetGCPercent(gcPercent)
	weight := make([]byte, ballast)
	defer runtime.KeepAlive(weight)
	counts := make(chan os.Signal, 1) // not lost if it comes before the union is open
	signal.Notify(counts, unix.SIGUSR1)
	o := s.spec.unionOptions()
	o.Logger, o.Restarts, o.Mount = s.log, s.restarts, s.upper
	err := s.spec.Limits.obey()
	var fs *unionfs.FS
	if err == nil {
		fs, err = unionfs.New(o)
	}
	if err != nil {
		_ = s.send(message{Kind: kindError, Error: toWire(err)}) // a holder that is gone needs no answer
		return err
	}
	if err := s.send(message{Kind: kindPrepared}); err != nil {
		return errors.Join(err, fs.Close())
	}
	s.fs = fs
	serve, with, kept, err := s.expectServe()
	if err != nil { // given up before the mount: the holder's story, not ours
		s.log.Debug("not mounted", zap.Error(err))
		return fs.Close()
	}
	dev := with.at(0)
	s.dev, s.keep = dev, serve.Keep
	if err := s.takeOver(fs, serve, with.at(1), kept); err != nil {
		_ = s.send(message{Kind: kindError, Error: toWire(err)})
		return errors.Join(err, dev.Close(), fs.Close())
	}
	go func() { // lives as long as the process
		for range counts {
			// In the words of fuse-overlayfs, whose users ask this way.
			inodes, nodes := fs.Known()
			fmt.Fprintf(os.Stderr, "# INODES: %d\n# NODES: %d\n", inodes, nodes)
		}
	}()

	depth := 0
	if fs.IO() == unionfs.IOPassthrough {
		depth = fs.StackDepth()
	}
	watch := &control{hub: new(trace.Hub), faults: new(inject.Faults), fs: fs, ending: make(chan struct{})}
	watch.hub.Name(s.spec.Labels)
	watch.describe = func() Description {
		return Description{
			ID: s.spec.ID, Target: s.spec.Target, Server: s.self, IO: fs.IO().String(),
			Complete: s.spec.Complete, Caching: fs.Caching(), ReadOnly: s.spec.ReadOnly, Spec: *s.spec,
		}
	}
	fs.SetFaults(watch.faults)
	defer s.keepHistory(watch.hub)()
	stopAnswering := s.answer(func() Stats {
		return Stats{
			ID: s.spec.ID, Target: s.spec.Target, Server: s.self, Restarts: serve.Restarts,
			IO: fs.IO().String(), Since: fs.Counters().Since(), Counters: fs.Counters().Snapshot(),
		}
	}, watch)
	s.confine()
	go s.watchHolder()
	err = transport.Serve(dev, fs, transport.ServeOptions{
		Resume: serve.Resume,
		Ready: func(r *transport.Resume) {
			if !fs.Resumable() {
				r = nil
			}
			s.mu.Lock()
			s.live, s.resume = true, r
			s.mu.Unlock()
			if err := s.send(message{Kind: kindLive, Resume: r}, s.ledger.File(), s.upper); err != nil {
				s.log.Warn("holder not told that the mount is live", zap.Error(err))
			}
			go unionfs.Trim()
		},
		Ledger:     s.ledger,
		Suspects:   s.suspects,
		Refused:    func() { _ = s.send(message{Kind: kindRefused}) }, // it is in the log as well
		GoFuse:     s.spec.GoFuse,
		Spin:       s.spec.Spin,
		NoOpen:     fs.IO() == unionfs.IONoOpen,
		NoACL:      s.spec.NoACL || s.spec.NoXattrs,
		StackDepth: depth,
		Debug:      s.spec.Debug,
		Logger:     s.log,
		Counters:   fs.Counters(),
		Complete:   s.spec.Complete,
		Trace:      watch.hub,
		Faults:     watch.faults,
	})
	stopAnswering()
	if err != nil {
		err = fmt.Errorf("serve %q: %w", s.spec.Target, err)
	}
	s.ending.Store(true)
	_ = dev.Close() // the mount is gone
	if cerr := fs.Close(); cerr != nil {
		err = errors.Join(err, fmt.Errorf("close the union of %q: %w", s.spec.Target, cerr))
	}
	s.closeSpare()
	m := message{Kind: kindDone}
	if err != nil {
		m.Error = toWire(err)
	}
	serr := s.send(m)
	if s.orphan.Load() {
		s.ended(err)
	} else if serr != nil {
		s.log.Warn("holder not told of the end", zap.Error(serr))
	}
	return err
}

// expectServe waits for the connection, and collects the descriptors that come before it.
func (s *server) expectServe() (serve message, with files, kept map[uint64]int, err error) {
	kept = make(map[uint64]int)
	for {
		m, with, err := s.ctl.recv()
		switch {
		case err == nil && m.Kind == kindKeep && len(with) == 1:
			fd, err := unix.FcntlInt(with[0].Fd(), unix.F_DUPFD_CLOEXEC, 3)
			with.close()
			if err != nil {
				return m, nil, nil, fmt.Errorf("take over an object without a name: %w", err)
			}
			kept[m.Node] = fd
			continue
		case err == nil && m.Kind != kindServe:
			err = fmt.Errorf("expected message %q, got %q", kindServe, m.Kind)
		case err == nil && with.at(0) == nil:
			err = errors.New("message without /dev/fuse")
		}
		if err != nil {
			with.close()
		}
		return m, with, kept, err
	}
}

// takeOver prepares the union for the requests of the kernel, which an earlier server may
// have answered before.
func (s *server) takeOver(fs *unionfs.FS, serve message, written *os.File, kept map[uint64]int) (err error) {
	var past *ledger.Past
	needs := fs.NeedsLedger()
	switch {
	case serve.Resume == nil && !s.spec.GoFuse:
		if s.ledger, err = ledger.New(unionfs.FirstID); err != nil {
			s.log.Warn("the mount will end with this process", zap.Error(err))
			return nil
		}
	case written != nil:
		if s.ledger, past, err = ledger.Open(written); err != nil {
			return fmt.Errorf("go on with the mount: %w", err)
		}
		s.suspects = s.ledger.Suspects(serve.Crashed)
	}
	if s.ledger != nil && needs {
		fs.SetLedger(s.ledger)
		fs.SetKeeper(s)
		if fd, err := unix.FcntlInt(uintptr(fs.Mount()), unix.F_DUPFD_CLOEXEC, 3); err == nil && s.upper == nil {
			s.upper = os.NewFile(uintptr(fd), "mount of the upper")
		}
	}
	if serve.Resume == nil {
		return nil
	}
	if !fs.Resumable() { // the one before us could: something else has changed
		return errors.New("nobody can go on with this mount")
	}
	if !needs {
		past = nil
	}
	fs.Resume(past, kept)
	return nil
}

// watchHolder notices the death of the holder. The mount goes on: its descriptor is
// here too, and everything that uses it would fail otherwise. Another holder is made.
func (s *server) watchHolder() {
	made := time.Time{}
	for {
		s.mu.Lock()
		ctl := s.ctl
		s.mu.Unlock()
		m, with, err := ctl.recv()
		if err == nil && m.Kind == kindSpare && len(with) == 1 {
			s.setSpare(with[0])
			continue
		}
		with.close() // not ours to keep
		if err == nil {
			continue
		}
		if s.keep && !s.ending.Load() && time.Since(made) > tooSoon {
			made = time.Now()
			if err := s.newHolder(); err == nil {
				continue
			} else {
				s.log.Error("another holder", zap.Error(err))
			}
		}
		s.orphan.Store(true)
		s.log.Warn("holder is gone; serving until the mount is unmounted", zap.String("target", s.spec.Target))
		if s.spec.Bound {
			// The starter may end as well, and nobody would see it.
			if err := transport.Unmount(s.spec.Target, true); err != nil && !errors.Is(err, unix.EINVAL) {
				s.log.Warn("cannot detach the mount", zap.String("target", s.spec.Target), zap.Error(err))
			}
		}
		return
	}
}

// newHolder makes a holder in the place of one that was killed.
func (s *server) newHolder() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.live {
		return errors.New("the mount is not live yet")
	}
	l := s.spare
	if l == nil {
		return errors.New("there is no spare one")
	}
	s.spare = nil
	err := l.send(message{Kind: kindAdopt, Spec: s.spec, State: &State{Server: s.self}, Resume: s.resume}, s.dev, s.ledger.File(), s.upper)
	if err == nil {
		s.fs.Kept(func(node uint64, fd int) {
			err = errors.Join(err, l.sendFds(message{Kind: kindKeep, Node: node}, fd))
		})
	}
	if err != nil {
		l.close()
		return err
	}
	s.ctl.close()
	s.ctl = l
	return nil
}

// watchSignals keeps the signals that a session or service manager sends to
// everybody from ending the mount under its users: the holder unmounts, then
// we end. Without a holder the server unmounts by itself.
func (s *server) watchSignals() {
	sigs := make(chan os.Signal, 4)
	signal.Notify(sigs, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	go func() { // lives as long as the process
		asked := 0
		for range sigs {
			if !s.orphan.Load() {
				continue
			}
			asked++
			if err := transport.Unmount(s.spec.Target, asked > 1); err != nil {
				s.log.Warn("cannot unmount on signal; send it again to detach the mount while it is in use",
					zap.String("target", s.spec.Target), zap.Error(err))
			}
		}
	}()
}
