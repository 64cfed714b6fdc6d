package mountd

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/mountd/events"
	"github.com/plyfs/plyfs/mountd/holder"
)

// happened lists all events of a store, without those of the fixture.
func happened(t *testing.T, s Service) []events.Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var all []events.Event
	err := s.Events(ctx, EventsRequest{Since: time.Unix(1, 0), Until: time.Now()}, func(e events.Event) error {
		all = append(all, e)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all[2:] // an import, a container
}

func words(all []events.Event) string {
	var w []string
	for _, e := range all {
		w = append(w, e.Type+" "+e.Action)
	}
	return strings.Join(w, ", ")
}

// waitFor waits for an event of this action.
func (f *fixture) waitFor(action string) events.Event {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 30*time.Second)
	defer cancel()
	var found events.Event
	done := errors.New("found")
	err := f.Events(ctx, EventsRequest{Since: time.Unix(1, 0), Actions: []string{action}}, func(e events.Event) error {
		found = e
		return done
	})
	if !errors.Is(err, done) {
		f.t.Fatalf("no event %q: %v; there are: %s", action, err, words(happened(f.t, f)))
	}
	return found
}

// TestEventsOfAMount: its life is told once, whoever ends it and however.
func TestEventsOfAMount(t *testing.T) {
	f := newFixture(t)
	st := f.mount("c")
	e := f.waitFor(events.Mount)
	if m := e.Mount; m == nil || m.Target != f.mnt || m.Container != "c" || m.ContainerID == "" || m.ImageID == "" || m.Pid != st.Holder.Pid {
		t.Errorf("event %+v of %+v", e.Mount, st)
	}
	if _, err := f.Unmount(t.Context(), UnmountRequest{Name: "c"}); err != nil {
		t.Fatal(err)
	}
	if got, want := words(happened(t, f)), "mount mount, mount unmount"; got != want {
		t.Errorf("unmounted: %s, expected %s", got, want)
	}

	// By umount(8).
	st = f.mount("c")
	if err := unix.Unmount(f.mnt, 0); err != nil {
		t.Fatal(err)
	}
	f.waitGone(st.Holder)
	if _, err := f.List(t.Context(), Empty{}); err != nil { // which finds the row
		t.Fatal(err)
	}
	if got, want := words(happened(t, f)[2:]), "mount mount, mount unmount"; got != want {
		t.Errorf("unmounted by others: %s, expected %s", got, want)
	}

	// Both processes are killed.
	st = f.mount("c")
	for _, s := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} { // so that neither can replace the other
		for _, p := range []holder.Process{st.Holder, st.Server} {
			if err := unix.Kill(p.Pid, s); err != nil {
				t.Fatal(err)
			}
		}
	}
	f.waitGone(st.Holder, st.Server)
	for range 2 { // the second finds nothing
		if _, err := f.List(t.Context(), Empty{}); err != nil {
			t.Fatal(err)
		}
	}
	all := happened(t, f)[4:]
	if got, want := words(all), "mount mount, mount end"; got != want {
		t.Errorf("killed: %s, expected %s", got, want)
	} else if all[1].Mount.Error == "" || all[1].Mount.Container != "c" {
		t.Errorf("event %+v", all[1].Mount)
	}
}

// TestEventOfARestart: another server is told of.
func TestEventOfARestart(t *testing.T) {
	f := newFixture(t)
	st := f.mount("c")
	if err := unix.Kill(st.Server.Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// On an old kernel the mount ends, which is told of, too.
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	err := f.Events(ctx, EventsRequest{Since: time.Unix(1, 0), Actions: []string{events.Restart, events.End}}, func(e events.Event) error {
		if e.Action == events.Restart && (e.Mount.Restarts != 1 || e.Mount.Pid == st.Server.Pid || e.Mount.Pid == 0) {
			t.Errorf("event %+v", e.Mount)
		}
		cancel()
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestEventsOfTheStore: what is done to images, containers and the store is told of, over
// the socket as well.
func TestEventsOfTheStore(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	for _, do := range []func() error{
		func() error {
			_, err := f.Tag(ctx, TagRequest{Source: "localhost/img:1", Target: "localhost/img:2"})
			return err
		},
		func() error {
			_, err := f.Commit(ctx, CommitRequest{Container: "c", Ref: "localhost/img:3"}, nil)
			return err
		},
		func() error { _, err := f.Local.Remove(ctx, RemoveRequest{Name: "c"}); return err },
		func() error { _, err := f.RemoveImage(ctx, RemoveImageRequest{Name: "localhost/img:2"}); return err },
		func() error { _, err := f.RemoveImage(ctx, RemoveImageRequest{Name: "localhost/img:3"}); return err },
		func() error { _, err := f.Check(ctx, CheckRequest{}, nil); return err },
		func() error { _, err := f.Check(ctx, CheckRequest{Repair: true}, nil); return err },
		func() error { _, err := f.GC(ctx, GCRequest{DryRun: true}); return err }, // changes nothing
		func() error { _, err := f.GC(ctx, GCRequest{}); return err },
		func() error { _, err := f.Prune(ctx, PruneRequest{All: true}); return err },
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Tag(ctx, TagRequest{Source: "nothing", Target: "localhost/img:2"}); err == nil { // tells of nothing
		t.Error("what is not there has got a name")
	}
	want := "image tag, image commit, container remove, image untag, image untag, image delete, " +
		"store check, store repair, store gc, image untag, image delete, store prune"
	local := happened(t, f)
	if got := words(local); got != want {
		t.Errorf("events %s\nexpected %s", got, want)
	}
	if got := words(happened(t, serveService(t, f.Local))); got != want {
		t.Errorf("events from the daemon %s\nexpected %s", got, want)
	}
	if err := f.Events(ctx, EventsRequest{Types: []string{"weather"}}, nil); !errors.Is(err, ErrUsage) {
		t.Errorf("unknown type: %v", err)
	}
}

// TestEventsOverTheSocket: a client that follows ends with its context, or with the daemon,
// which does not wait for it; a wrong request has its error.
func TestEventsOverTheSocket(t *testing.T) {
	dir := mkdirs(t, "run")
	t.Setenv(RunDirEnv, dir+"/run")
	l, err := OpenLocal(t.Context(), dir+"/store", LocalOptions{Logger: zaptest.NewLogger(t), AnyFileSystem: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ln, release, err := Listen(dir + "/s")
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	served := make(chan error, 1)
	go func() { served <- serve(ctx, ln, NewHandler(l, zaptest.NewLogger(t)), func() {}) }()
	c := NewClient(dir + "/s")
	defer c.Close()

	if err := c.Events(t.Context(), EventsRequest{Types: []string{"weather"}}, nil); !errors.Is(err, ErrUsage) {
		t.Errorf("unknown type: %v", err)
	}
	got := make(chan events.Event, 1)
	followed := make(chan error, 2)
	start := func(ctx context.Context) {
		started := make(chan struct{})
		go func() {
			followed <- c.Events(ctx, EventsRequest{Started: func() { close(started) }}, func(e events.Event) error { got <- e; return nil })
		}()
		select {
		case <-started:
		case err := <-followed:
			t.Fatal(err)
		}
	}
	own, cancel := context.WithCancel(t.Context())
	start(own)
	if _, err := l.Check(t.Context(), CheckRequest{}, nil); err != nil {
		t.Fatal(err)
	}
	if e := <-got; e.Type != events.TypeStore || e.Action != events.Check || e.Store == nil {
		t.Errorf("event %+v", e)
	}
	cancel()
	if err := <-followed; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	start(t.Context())
	begun := time.Now()
	stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if err := <-followed; !errors.Is(err, ErrUnavailable) {
		t.Errorf("the daemon has stopped: %v", err)
	}
	if d := time.Since(begun); d > stopGrace/2 {
		t.Errorf("the daemon has waited %v for who follows events", d)
	}
}

// waitGone waits for processes to end.
func (f *fixture) waitGone(ps ...holder.Process) {
	f.t.Helper()
	if gone, err := waitGone(f.t.Context(), ps, 20*time.Second); err != nil || !gone {
		f.t.Fatalf("processes %v stay (%v)", ps, err)
	}
}
