package holder

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/transport"
)

// answering serves a document in a run directory until the test ends.
func answering(t *testing.T, dir string, patience time.Duration, doc func() Stats) net.Listener {
	t.Helper()
	ln, err := listen(dir, StatsFile)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		serveStats(ln, patience, doc)
	}()
	t.Cleanup(func() {
		_ = ln.Close() // perhaps for the second time
		<-done
	})
	return ln
}

func dialStats(t *testing.T, dir string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", filepath.Join(dir, StatsFile))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestStatsOfMount(t *testing.T) {
	s := union(t)
	// A path longer than a socket's address.
	s.RunDir = filepath.Join(s.RunDir, strings.Repeat("long/", 40))
	if err := os.MkdirAll(s.RunDir, 0o700); err != nil {
		t.Fatal(err)
	}
	st := mount(t, s)
	defer func() {
		if err := transport.Unmount(s.Target, false); err != nil {
			t.Fatal(err)
		}
		waitGone(t, st.Holder, st.Server)
	}()
	if fi, err := os.Stat(filepath.Join(s.RunDir, StatsFile)); err != nil || fi.Mode() != os.ModeSocket|0o600 {
		t.Fatalf("socket: %v %v", fi, err)
	}
	before, err := ReadStats(limit(t), s.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	if before.ID != "test" || before.Target != s.Target || before.Server != st.Server || before.Restarts != 0 || before.Since.IsZero() {
		t.Errorf("%+v", before)
	}
	for _, n := range []string{"a", "b", "c"} {
		if err := os.Mkdir(filepath.Join(s.Target, n), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(s.Target+"/file", 0o600); err != nil {
		t.Fatal(err)
	}
	after, err := ReadStats(limit(t), s.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	d := after.Counters.Sub(before.Counters)
	if o := d.Operation("mkdir"); o.Count != 3 || o.Failed() != 0 {
		t.Errorf("%+v", o)
	}
	if d.CopyUps.Count != 1 || d.CopyUps.Bytes != uint64(len("lower")) {
		t.Errorf("%+v", d.CopyUps)
	}
}

// Clients that connect and do not read keep neither the mount nor others from anything.
func TestStatsWithStuckClients(t *testing.T) {
	s := union(t)
	st := mount(t, s)
	defer func() {
		if err := transport.Unmount(s.Target, false); err != nil {
			t.Fatal(err)
		}
		waitGone(t, st.Holder, st.Server)
	}()
	for range 3 * statsClients {
		dialStats(t, s.RunDir)
	}
	if err := os.WriteFile(s.Target+"/new", []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	var asked sync.WaitGroup
	for range 4 * statsClients {
		asked.Go(func() {
			if _, err := ReadStats(limit(t), s.RunDir); err != nil {
				t.Error(err)
			}
		})
	}
	asked.Wait()
}

// An answer that does not fit into the socket is given up, and others come to theirs.
func TestStuckClientIsGivenUp(t *testing.T) {
	dir := t.TempDir()
	long := strings.Repeat("x", 1<<20)
	answering(t, dir, 200*time.Millisecond, func() Stats { return Stats{Target: long} })
	for range 2 * statsClients {
		dialStats(t, dir)
	}
	st, err := ReadStats(limit(t), dir)
	if err != nil || st.Target != long {
		t.Errorf("%d bytes, %v", len(st.Target), err)
	}
}

// A server that takes over replaces the socket of the one that has died.
func TestStatsAfterTakeover(t *testing.T) {
	dir := t.TempDir()
	first := answering(t, dir, time.Second, func() Stats { return Stats{Restarts: 0} })
	if st, err := ReadStats(limit(t), dir); err != nil || st.Restarts != 0 {
		t.Fatalf("%+v, %v", st, err)
	}
	_ = first.Close() // as if it were killed: the file stays
	if _, err := askStats(limit(t), dir); !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatalf("nobody listens: %v", err)
	}
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := ReadStats(short, dir); err == nil {
		t.Error("an answer from nobody")
	}
	got := make(chan Stats, 1)
	go func() {
		st, err := ReadStats(limit(t), dir)
		if err != nil {
			t.Error(err)
		}
		got <- st
	}()
	if err := os.WriteFile(filepath.Join(dir, StatsFile+".new"), nil, 0o600); err != nil { // one that died even earlier
		t.Fatal(err)
	}
	answering(t, dir, time.Second, func() Stats { return Stats{Restarts: 1} })
	if st := <-got; st.Restarts != 1 {
		t.Errorf("%+v", st)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
}

func TestNoSocketIsToldApart(t *testing.T) {
	if _, err := ReadStats(limit(t), t.TempDir()); !errors.Is(err, unix.ENOENT) {
		t.Error(err)
	}
}
