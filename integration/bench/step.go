package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// env is where a step runs.
type env struct {
	r  *runner
	p  *place
	sc *scene
	s  system
	f  *fixture // nil: the scene needs none
	rm *room
	m  *mounted // nil: not mounted yet
	// undo is called when the scene is over, after unmounting.
	undo      []func() error
	container string // of plyfs' store
}

// outcome is what a scene gave on one system, by phase.
type outcome struct {
	parts  map[string]part
	counts map[string]requests
}

// scene executes a scene on one system. With a tracer it counts requests.
func (r *runner) scene(ctx context.Context, p *place, sc *scene, s system, tr *tracer) (out *outcome, err error) {
	e := &env{r: r, p: p, sc: sc, s: s}
	if sc.fixture != "" {
		if e.f, err = p.fixture(ctx, sc.fixture, r.sizes); err != nil {
			return nil, err
		}
	}
	if e.rm, err = p.newRoom(); err != nil {
		return nil, err
	}
	defer func() {
		if e.m != nil {
			err = errors.Join(err, e.m.unmount())
		}
		for _, undo := range e.undo {
			err = errors.Join(err, undo())
		}
		// What is removed, and written for it, must not be paid by the next.
		err = errors.Join(err, removeAll(e.rm.dir), p.sync())
	}()
	if !sc.unmounted {
		if e.m, err = e.mount(ctx, true); err != nil {
			return nil, err
		}
	}
	if sc.warm || sc.warmContent {
		if err := e.f.warm(sc.warmContent); err != nil {
			return nil, err
		}
	}
	out = &outcome{parts: map[string]part{}, counts: map[string]requests{}}
	for i := range sc.steps {
		st := &sc.steps[i]
		parts, counts, err := e.step(ctx, st, tr)
		if err != nil {
			return out, err
		}
		if len(st.phases) > 0 && len(parts) != len(st.phases) {
			return out, fmt.Errorf("%d phases, but %d parts", len(st.phases), len(parts))
		}
		for i, ph := range st.phases {
			out.parts[ph.Name] = parts[i]
			if counts != nil {
				out.counts[ph.Name] = counts
			}
		}
	}
	return out, nil
}

// mount mounts the fixture for the system, with the upper of the room.
func (e *env) mount(ctx context.Context, foreground bool) (*mounted, error) {
	if e.s.kind == native {
		if !e.sc.writes {
			dir, err := e.f.plainTree(ctx)
			return plain(e.s, dir), err
		}
		dir := filepath.Join(e.rm.dir, "plain")
		return plain(e.s, dir), e.f.copyPlain(ctx, dir)
	}
	if e.s.store {
		return e.mountStored(ctx)
	}
	st := stack{lowers: e.f.lowers, options: e.sc.options}
	if !e.s.readOnly {
		st.upper, st.work = e.rm.upper, e.rm.work
	}
	m, err := e.s.mount(ctx, e.r.binary(e.s), e.r.options, st, e.rm.target, foreground)
	if err == nil && e.s.kind == plyfs {
		e.r.warned(e.s, m.log.String())
	}
	return m, err
}

// step executes one step. The time limit breaks the mount.
func (e *env) step(ctx context.Context, st *step, tr *tracer) ([]part, requests, error) {
	ctx, cancel := context.WithTimeout(ctx, e.r.limit)
	defer cancel()
	// A system call of this process can hang as well.
	defer context.AfterFunc(ctx, abortAll)()
	if st.special != nil {
		parts, err := st.special(ctx, e)
		return parts, nil, err
	}
	j := st.job(e.f, e.r.sizes)
	j.Dir = e.m.target
	w, err := startWorker(ctx, j, e.m.abort)
	if err != nil {
		return nil, nil, err
	}
	if err := e.settle(st.drop); err != nil {
		return nil, nil, errors.Join(err, w.kill())
	}
	if tr != nil && e.m.minor != "" {
		if err := tr.start(e.m.minor); err != nil {
			return nil, nil, errors.Join(err, w.kill())
		}
	}
	parts, err := w.finish()
	var counts requests
	if tr != nil && e.m.minor != "" {
		var terr error
		counts, terr = tr.stop()
		err = errors.Join(err, terr)
	}
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("%w (limit %s): %w", ctx.Err(), e.r.limit, err)
	}
	return parts, counts, err
}

// settle writes out what is dirty and, to be cold, drops the caches.
func (e *env) settle(drop bool) error {
	if e.m != nil {
		if err := syncfs(e.m.target); err != nil {
			return err
		}
	}
	if err := e.p.sync(); err != nil {
		return err
	}
	if drop {
		return dropCaches()
	}
	return nil
}

// mountAndList measures the time from the start of the mount command to the
// end of the first listing of the root. Kernel overlayfs is mounted by system
// calls of this process, as container engines do.
func mountAndList(ctx context.Context, e *env) ([]part, error) {
	if e.s.store {
		// Loading the image is a phase of its own, and not here.
		if err := e.makeContainer(ctx); err != nil {
			return nil, err
		}
	}
	if err := e.settle(false); err != nil {
		return nil, err
	}
	c := start()
	m, err := e.mount(ctx, false)
	if err != nil {
		return nil, err
	}
	e.m = m
	err = listRoot(m.target)
	return []part{c.part(1)}, err
}

func listRoot(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dir, err)
	}
	defer unix.Close(fd)
	buf := make([]byte, listBuffer)
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil {
			return fmt.Errorf("list %s: %w", dir, err)
		}
		if n == 0 {
			return nil
		}
	}
}

// removeAll removes a directory in which a server may still be busy for a
// moment.
func removeAll(dir string) (err error) {
	poll(5*time.Second, func() bool {
		err = os.RemoveAll(dir)
		return err == nil
	})
	return err
}
