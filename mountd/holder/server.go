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
	m, _, err := ctl.expect(kindSpec)
	if err == nil && m.Spec == nil {
		err = errors.New("no spec")
	}
	if err != nil {
		logger.Error("no mount spec received", zap.Error(err))
		return 1
	}
	s := &server{spec: m.Spec, ctl: ctl, log: logger.With(zap.String("mount_id", m.Spec.ID))}
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
	spec *Spec
	log  *zap.Logger
	dev  *os.File

	orphan atomic.Bool // the holder is gone
	keep   bool        // then a new one is made
	ending atomic.Bool // nobody needs one any more

	mu     sync.Mutex
	ctl    *link             // guarded by mu
	resume *transport.Resume // guarded by mu; nil before the mount is live, or if nobody can take over
	live   bool              // guarded by mu
}

// send tells the holder.
func (s *server) send(m message) error {
	s.mu.Lock()
	ctl := s.ctl
	s.mu.Unlock()
	return ctl.send(m, nil)
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
	o.Logger = s.log
	fs, err := unionfs.New(o)
	if err != nil {
		_ = s.send(message{Kind: kindError, Error: toWire(err)}) // a holder that is gone needs no answer
		return err
	}
	if err := s.send(message{Kind: kindPrepared}); err != nil {
		return errors.Join(err, fs.Close())
	}
	serve, dev, err := s.ctl.expect(kindServe)
	if err == nil && dev == nil {
		err = errors.New("message without /dev/fuse")
	}
	if err != nil { // given up before the mount: the holder's story, not ours
		s.log.Debug("not mounted", zap.Error(err))
		return fs.Close()
	}
	s.dev, s.keep = dev, serve.Keep
	go s.watchHolder()
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
	if serve.Resume != nil {
		if !fs.Resumable() { // the one before us could: something else has changed
			return errors.Join(errors.New("nobody can go on with this mount"), dev.Close(), fs.Close())
		}
		fs.Resume()
	}
	stopStats := s.answerStats(func() Stats {
		return Stats{
			ID: s.spec.ID, Target: s.spec.Target, Server: Self(), Restarts: serve.Restarts,
			IO: fs.IO().String(), Since: fs.Counters().Since(), Counters: fs.Counters().Snapshot(),
		}
	})
	err = transport.Serve(dev, fs, transport.ServeOptions{
		Resume: serve.Resume,
		Ready: func(r *transport.Resume) {
			if !fs.Resumable() {
				r = nil
			}
			s.mu.Lock()
			s.live, s.resume = true, r
			s.mu.Unlock()
			if err := s.send(message{Kind: kindLive, Resume: r}); err != nil {
				s.log.Warn("holder not told that the mount is live", zap.Error(err))
			}
			go unionfs.Trim()
		},
		GoFuse:     s.spec.GoFuse,
		Spin:       s.spec.Spin,
		NoOpen:     fs.IO() == unionfs.IONoOpen,
		NoACL:      s.spec.NoACL || s.spec.NoXattrs,
		StackDepth: depth,
		Debug:      s.spec.Debug,
		Logger:     s.log,
		Counters:   fs.Counters(),
	})
	stopStats()
	if err != nil {
		err = fmt.Errorf("serve %q: %w", s.spec.Target, err)
	}
	s.ending.Store(true)
	_ = dev.Close() // the mount is gone
	if cerr := fs.Close(); cerr != nil {
		err = errors.Join(err, fmt.Errorf("close the union of %q: %w", s.spec.Target, cerr))
	}
	m := message{Kind: kindDone}
	if err != nil {
		m.Error = toWire(err)
	}
	if serr := s.send(m); serr != nil && !s.orphan.Load() {
		s.log.Warn("holder not told of the end", zap.Error(serr))
	}
	return err
}

// watchHolder notices the death of the holder. The mount goes on: its descriptor is
// here too, and everything that uses it would fail otherwise. Another holder is made.
func (s *server) watchHolder() {
	made := time.Time{}
	for {
		s.mu.Lock()
		ctl := s.ctl
		s.mu.Unlock()
		_, f, err := ctl.recv()
		if f != nil {
			_ = f.Close() // not ours to keep
		}
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
	l, theirs, err := socketPair()
	if err != nil {
		return err
	}
	cmd, err := spawn(VerbHolder, s.spec.Target, theirs, os.Stderr)
	_ = theirs.Close() // the child has its copy
	if err == nil {
		go func() { _ = cmd.Wait() }() // it is killed, or ends after us
		err = l.send(message{Kind: kindAdopt, Spec: s.spec, State: &State{Server: Self()}, Resume: s.resume}, s.dev)
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
