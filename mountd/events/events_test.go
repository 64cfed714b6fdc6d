package events

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// image is an event with a name that tells it from others.
func image(name string) Event {
	return Event{Type: TypeImage, Action: Tag, Image: &ImageEvent{Name: name}}
}

// write appends events to a log.
func write(t *testing.T, l *Log, names ...string) {
	t.Helper()
	for _, n := range names {
		if err := l.Append(image(n)); err != nil {
			t.Fatal(err)
		}
	}
}

// text is an event in a few characters.
func text(e Event) string {
	switch {
	case e.Missed != nil:
		return fmt.Sprintf("lost %d", e.Missed.Events)
	case e.Image != nil:
		return fmt.Sprintf("%d %s", e.Seq, e.Image.Name)
	}
	return fmt.Sprintf("%d %s %s", e.Seq, e.Type, e.Action)
}

// backlog is what a reader gets of a log by now.
func backlog(t *testing.T, l *Log, q Query) []string {
	t.Helper()
	if q.Since.IsZero() {
		q.Since = time.Unix(1, 0)
	}
	if q.Until.IsZero() {
		q.Until = time.Now()
	}
	var got []string
	if err := l.Follow(t.Context(), q, func(e Event) error { got = append(got, text(e)); return nil }); err != nil {
		t.Fatal(err)
	}
	return got
}

func expect(t *testing.T, got []string, want ...string) {
	t.Helper()
	if strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("events %q, expected %q", got, want)
	}
}

func TestBacklog(t *testing.T) {
	l := In(t.TempDir())
	expect(t, backlog(t, l, Query{}))
	write(t, l, "a", "b")
	if err := l.Append(Event{Type: TypeMount, Action: Mount, Mount: &MountEvent{Target: "/m"}}); err != nil {
		t.Fatal(err)
	}
	early := Event{Time: time.Unix(2, 0), Type: TypeStore, Action: GC, Store: &StoreEvent{}}
	if err := l.Append(early); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		q    Query
		want []string
	}{
		{"all", Query{}, []string{"1 a", "2 b", "3 mount mount", "4 store gc"}},
		{"types", Query{Types: []string{TypeMount, TypeStore}}, []string{"3 mount mount", "4 store gc"}},
		{"actions", Query{Actions: []string{Tag}}, []string{"1 a", "2 b"}},
		{"both", Query{Types: []string{TypeMount}, Actions: []string{Tag}}, nil},
		{"since", Query{Since: time.Unix(1000, 0)}, []string{"1 a", "2 b", "3 mount mount"}},
		{"until", Query{Until: time.Unix(1000, 0)}, []string{"4 store gc"}},
	} {
		t.Run(c.name, func(t *testing.T) { expect(t, backlog(t, l, c.q), c.want...) })
	}
}

// collector gets the events of a reader that follows a log.
func collector(t *testing.T, l *Log, q Query) (next func() string, stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	got, started, done := make(chan string, 100), make(chan struct{}), make(chan error, 1)
	q.Started = func() { close(started) }
	go func() {
		done <- l.Follow(ctx, q, func(e Event) error { got <- text(e); return nil })
	}()
	<-started
	next = func() string {
		t.Helper()
		select {
		case s := <-got:
			return s
		case <-time.After(20 * time.Second):
			t.Fatal("no event comes")
			return ""
		}
	}
	return next, func() error { cancel(); return <-done }
}

// TestFollow: a reader sees what is written after its start, also if the log, or its
// directory, is made later, and over rotations.
func TestFollow(t *testing.T) {
	for _, before := range []int{0, 1} {
		t.Run(fmt.Sprint(before), func(t *testing.T) {
			l := In(t.TempDir())
			l.max = 500
			for range before {
				write(t, l, "before")
			}
			next, stop := collector(t, l, Query{})
			for i := range 50 {
				name := fmt.Sprint("x", i)
				write(t, l, name)
				if got, want := next(), fmt.Sprintf("%d %s", before+1+i, name); got != want {
					t.Fatalf("got %q, expected %q", got, want)
				}
			}
			if err := stop(); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			if _, err := os.Lstat(filepath.Join(l.dir, oldName)); err != nil {
				t.Error("the log has not been rotated:", err)
			}
		})
	}
}

// TestSlowReader: a reader that lies behind by more than is kept is told how much it has
// missed, and nobody waits for it.
func TestSlowReader(t *testing.T) {
	l := In(t.TempDir())
	l.max = 300
	write(t, l, "first")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var sum, last uint64
	err := l.Follow(ctx, Query{Since: time.Unix(1, 0)}, func(e Event) error {
		switch {
		case e.Missed != nil:
			sum += e.Missed.Events
		case e.Seq == 1: // while it thinks, much happens
			for range 30 {
				write(t, l, "more")
			}
			sum++
		default:
			sum++
			if last = e.Seq; last == 31 {
				cancel()
			}
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) || sum != 31 || last != 31 {
		t.Errorf("%v: %d events are told of, the last is %d; expected 31", err, sum, last)
	}
	names, err := os.ReadDir(l.dir)
	if err != nil || len(names) > 2 {
		t.Errorf("%v of the log remain (%v)", names, err)
	}
}

// TestWriters: any number of writers, in any number of rotations, lose nothing.
func TestWriters(t *testing.T) {
	dir := t.TempDir()
	const writers, each = 8, 50
	next, stop := collector(t, In(dir), Query{})
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			l := In(dir)     // as a process of its own would
			l.max = 30 << 10 // fewer than two rotations: the reader cannot be too slow
			for range each {
				if err := l.Append(image(fmt.Sprint(w))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range writers * each {
		got := next()
		if seq, _, _ := strings.Cut(got, " "); seq != fmt.Sprint(i+1) {
			t.Fatalf("event %q, expected number %d", got, i+1)
		}
	}
	wg.Wait()
	if err := stop(); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestDamage: what else is in the log ends no reader and no writer, and is no event.
func TestDamage(t *testing.T) {
	good := func(seq int) string {
		return fmt.Sprintf(`{"seq":%d,"time":"2024-01-01T00:00:00Z","type":"image","action":"tag","image":{"name":"x"}}`+"\n", seq)
	}
	for _, c := range []struct {
		name, file string
		want       []string
	}{
		{"part of a line", good(1) + `{"seq":2,"ti`, []string{"1 x", "lost 0", "2 new"}},
		{"words", good(1) + "hello\n" + good(2), []string{"1 x", "lost 0", "2 x", "3 new"}},
		{"gap", good(1) + good(5), []string{"1 x", "lost 3", "5 x", "6 new"}},
		{"long line", good(1) + strings.Repeat("a", 3*MaxFile) + "\n" + good(2), []string{"1 x", "lost 0", "2 x", "3 new"}},
		{"long event", good(1) + `{"seq":2,"type":"` + strings.Repeat("a", MaxLine) + "\"}\n" + good(3), []string{"1 x", "lost 1", "3 x", "4 new"}},
		{"zeros", good(1) + strings.Repeat("\x00", 100) + "\n", []string{"1 x", "lost 0", "2 new"}},
		{"false news", good(1) + `{"seq":9,"type":"log","action":"lost"}` + "\n" + good(2), []string{"1 x", "lost 0", "2 x", "3 new"}},
		{"no number", good(0), []string{"lost 0", "1 new"}},
		{"back", good(7) + good(3), []string{"7 x", "3 x", "4 new"}},
		{"empty", "", []string{"1 new"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := In(t.TempDir())
			l.max = 100 * MaxFile
			if err := errors.Join(os.Mkdir(l.dir, 0o700), os.WriteFile(filepath.Join(l.dir, logName), []byte(c.file), 0o600)); err != nil {
				t.Fatal(err)
			}
			write(t, l, "new")
			expect(t, backlog(t, l, Query{}), c.want...)
		})
	}
}

// TestForeignFiles: nothing but a file of the store alone is written to or read.
func TestForeignFiles(t *testing.T) {
	dir := t.TempDir()
	foreign := filepath.Join(dir, "foreign")
	for _, c := range []struct {
		name string
		make func(path string) error
	}{
		{"link", func(p string) error { return os.Symlink(foreign, p) }},
		{"hard link", func(p string) error { return os.Link(foreign, p) }},
		{"pipe", func(p string) error { return unix.Mkfifo(p, 0o600) }},
		{"directory", func(p string) error { return os.Mkdir(p, 0o700) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := In(t.TempDir())
			if err := errors.Join(os.WriteFile(foreign, nil, 0o600), os.Mkdir(l.dir, 0o700), c.make(filepath.Join(l.dir, logName))); err != nil {
				t.Fatal(err)
			}
			if err := l.Append(image("a")); err == nil {
				t.Error("an event was written")
			}
			if b, err := os.ReadFile(foreign); err != nil || len(b) > 0 {
				t.Errorf("%q was written to a foreign file (%v)", b, err)
			}
		})
	}
	t.Run("linked directory", func(t *testing.T) {
		l := In(t.TempDir())
		if err := os.Symlink(t.TempDir(), l.dir); err != nil {
			t.Fatal(err)
		}
		if err := l.Append(image("a")); err == nil {
			t.Error("an event was written")
		}
	})
}

// TestLockIsNotWaitedFor: a writer that was stopped in the middle keeps nobody.
func TestLockIsNotWaitedFor(t *testing.T) {
	l := In(t.TempDir())
	write(t, l, "a")
	f, err := os.Open(filepath.Join(l.dir, logName))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	l.wait = 50 * time.Millisecond
	write(t, l, "b")
	expect(t, backlog(t, l, Query{}), "1 a", "2 b")
}

// TestLongTexts: a line is never longer than a reader takes.
func TestLongTexts(t *testing.T) {
	for _, c := range []string{"a", "\x01", "\xff", "ü", "<"} {
		long := strings.Repeat(c, 1<<16)
		for _, e := range []Event{
			{Type: TypeImage, Image: &ImageEvent{Name: long}},
			{Type: TypeContainer, Container: &ContainerEvent{ID: long, Name: long, ImageID: long, ImageName: long}},
			{Type: TypeMount, Mount: &MountEvent{Target: long, Container: long, Error: long}},
			{Type: long, Action: long},
		} {
			line, err := encode(e)
			if err != nil || len(line) > MaxLine {
				t.Errorf("%s of %q: a line of %d bytes (%v)", e.Type[:min(9, len(e.Type))], c, len(line), err)
			}
			if !strings.Contains(string(line), `"cut":true`) {
				t.Errorf("%.100s does not say that it was cut", line)
			}
		}
	}
	line, err := encode(Event{Type: TypeMount, Mount: &MountEvent{Target: "/\xff"}})
	if want := `"targetB64":"L/8="`; err != nil || !strings.Contains(string(line), want) {
		t.Errorf("%s (%v), expected %s", line, err, want)
	}
}
