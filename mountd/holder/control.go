package holder

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs"
	"github.com/plyfs/plyfs/unionfs/counters"
	"github.com/plyfs/plyfs/unionfs/inject"
	"github.com/plyfs/plyfs/unionfs/trace"
)

// ControlFile is the socket in a run directory where a mount server is watched, and told which
// faults its requests shall meet. A client sends one line, a [Control], and gets lines: one
// [Answer], and if it asked for a trace, more of them until it closes the connection, or its
// half of it: then it gets what has happened until that moment.
const ControlFile = "control"

// Control is what a client asks a mount server for: one of the fields is set.
type Control struct {
	// Trace asks for events.
	Trace *trace.Filter `json:"trace,omitempty"`
	// Inject asks for changes of the rules, or with none for a list.
	Inject *InjectRequest `json:"inject,omitempty"`
	// Describe asks for nothing but the answer's description of the mount.
	Describe bool `json:"describe,omitempty"`
}

// InjectRequest first clears rules, then adds some.
type InjectRequest struct {
	ClearAll bool          `json:"clearAll,omitempty"`
	Clear    []int         `json:"clear,omitempty"`
	Add      []inject.Rule `json:"add,omitempty"`
}

// Answer is one line of a mount server. The first one that answers a trace has Mount; the
// others have Event, or Dropped alone.
type Answer struct {
	// Error is why a request was refused.
	Error string `json:"error,omitempty"`
	// Mount is what the mount is.
	Mount *Description `json:"mount,omitempty"`
	Event *trace.Event `json:"event,omitempty"`
	// Dropped is how many events could not be kept since the beginning.
	Dropped uint64 `json:"dropped,omitempty"`

	// Rules are those that are in force, Cleared those that were cleared, Added those
	// that are new. Unseen: on this mount the kernel opens, reads and writes files without
	// asking, and rules about that have no effect.
	Rules   []inject.Rule `json:"rules,omitempty"`
	Cleared []inject.Rule `json:"cleared,omitempty"`
	Added   []inject.Rule `json:"added,omitempty"`
	Unseen  bool          `json:"unseen,omitempty"`
}

// Description says what somebody who watches has to know about a mount.
type Description struct {
	ID     string  `json:"id"`
	Target string  `json:"target"`
	Server Process `json:"server"`
	IO     string  `json:"io"`
	// Complete: the kernel asks for everything. Caching: it remembers names and attributes
	// for so long (0: not at all; forever is a year).
	Complete bool          `json:"complete,omitempty"`
	Caching  time.Duration `json:"caching,omitempty"`
	ReadOnly bool          `json:"readOnly,omitempty"`
	// Spec is how the mount was made.
	Spec Spec `json:"spec"`
}

const (
	// controlClients is how many are served at once: each trace has a buffer.
	controlClients = 16
	// controlPatience is how long a client may take to say what it wants, and to read a line.
	controlPatience = 30 * time.Second
	// maxControl bounds a request, maxAnswer a line of an answer.
	maxControl = 1 << 20
	maxAnswer  = 1 << 20
	// drainTime is how long the end of a mount waits for those who watch to get the rest, and
	// how long they wait for it when they end.
	drainTime = 2 * time.Second
	// droppedEvery is how often a client is told how many events were dropped.
	droppedEvery = time.Second
)

// control serves the clients of one mount.
type control struct {
	hub      *trace.Hub
	faults   *inject.Faults
	describe func() Description
	fs       *unionfs.FS

	ending  chan struct{} // closed when the mount has ended
	clients sync.WaitGroup
}

// serve answers until ln is closed.
func (c *control) serve(ln net.Listener) {
	slots := make(chan struct{}, controlClients)
	acceptEach(ln, func(conn net.Conn) {
		select {
		case slots <- struct{}{}:
		default:
			_ = conn.SetDeadline(time.Now().Add(time.Second))
			_ = json.NewEncoder(conn).Encode(Answer{Error: fmt.Sprintf("%d others watch this mount already", controlClients)}) // a client that is gone does not want it
			_ = conn.Close()
			return
		}
		c.clients.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			c.answer(conn)
		})
	})
}

// end lets clients have what is left, and waits for that, but not for long.
func (c *control) end() {
	close(c.ending)
	done := make(chan struct{})
	go func() { c.clients.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(drainTime):
	}
}

func (c *control) answer(conn net.Conn) {
	_ = conn.SetDeadline(time.Now().Add(controlPatience))
	line, err := bufio.NewReader(io.LimitReader(conn, maxControl)).ReadBytes('\n')
	if err != nil {
		return
	}
	var r Control
	if err := json.Unmarshal(line, &r); err != nil {
		c.say(conn, Answer{Error: "request: " + err.Error()})
		return
	}
	switch {
	case r.Trace != nil:
		if err := r.Trace.Validate(counters.OpNames()); err != nil {
			c.say(conn, Answer{Error: err.Error()})
			return
		}
		c.trace(conn, *r.Trace)
	case r.Inject != nil:
		c.say(conn, c.inject(*r.Inject))
	default:
		d := c.describe()
		c.say(conn, Answer{Mount: &d})
	}
}

func (c *control) say(conn net.Conn, a Answer) {
	_ = json.NewEncoder(conn).Encode(a) // a client that is gone does not want it
}

// inject changes the rules, or nothing if one of the new ones is wrong.
func (c *control) inject(r InjectRequest) (a Answer) {
	for i := range r.Add {
		if err := r.Add[i].Validate(counters.OpNames()); err != nil {
			return Answer{Error: err.Error()}
		}
		a.Unseen = a.Unseen || r.Add[i].Data() && c.fs.IO() == unionfs.IONoOpen
	}
	if r.ClearAll || len(r.Clear) > 0 {
		a.Cleared = c.faults.Clear(r.Clear)
	}
	added, err := c.faults.Add(r.Add)
	if err != nil {
		return Answer{Error: err.Error()}
	}
	a.Added, a.Rules = added, c.faults.List()
	return a
}

// trace sends events until the client closes the connection or the mount ends.
func (c *control) trace(conn net.Conn, f trace.Filter) {
	s := c.hub.Listen(f)
	defer s.Close()
	gone := make(chan struct{})
	go func() { // ends with the connection
		_ = conn.SetReadDeadline(time.Time{})
		_, _ = conn.Read(make([]byte, 1)) // it has nothing more to say
		close(gone)
	}()
	w := bufio.NewWriterSize(conn, 64<<10)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	send := func(a Answer) bool {
		_ = conn.SetWriteDeadline(time.Now().Add(controlPatience))
		return enc.Encode(a) == nil
	}
	d := c.describe()
	if !send(Answer{Mount: &d}) || w.Flush() != nil {
		return
	}
	tick := time.NewTicker(droppedEvery)
	defer tick.Stop()
	told := uint64(0)
	dropped := func() bool {
		n := s.Dropped()
		if n == told {
			return true
		}
		told = n
		return send(Answer{Dropped: n})
	}
	rest := func() { // what has happened until now; a client that is gone does not want it
		for n := len(s.Events()); n > 0; n-- {
			e := <-s.Events()
			if !send(Answer{Event: &e}) {
				return
			}
		}
		if dropped() {
			_ = w.Flush()
		}
	}
	for ok := true; ok; {
		select {
		case e := <-s.Events():
			ok = send(Answer{Event: &e}) && (len(s.Events()) > 0 || w.Flush() == nil)
		case <-tick.C:
			ok = dropped() && w.Flush() == nil
		case <-gone:
			rest()
			return
		case <-c.ending:
			rest()
			return
		}
	}
}

// ErrControl is what a mount server has refused, or could not do.
var ErrControl = errors.New("refused by the mount server")

// AskControl sends one request that has one answer.
func AskControl(ctx context.Context, runDir string, r Control) (a Answer, err error) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err = talk(ctx, runDir, r, hangUp, func(got Answer) error { a = got; return io.EOF })
		if err == nil || !betweenServers(err) || ctx.Err() != nil {
			return a, err
		}
		select {
		case <-ctx.Done():
			return a, err
		case <-tick.C:
		}
	}
}

// Trace calls f with what the mount server says, until ctx ends (which is no error; what has happened
// before is still told), f returns an error,
// or the server ends: then the error is [io.ErrUnexpectedEOF], and another server may have
// taken over.
func Trace(ctx context.Context, runDir string, filter trace.Filter, f func(Answer) error) error {
	err := talk(ctx, runDir, Control{Trace: &filter}, hearOut, f)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// hangUp ends a conversation.
func hangUp(c net.Conn) { _ = c.Close() }

// hearOut has the server say the rest, for a while.
func hearOut(c net.Conn) {
	_ = c.SetReadDeadline(time.Now().Add(drainTime))
	if u, ok := c.(*net.UnixConn); ok {
		_ = u.CloseWrite() // the server may be gone, which the next line tells
	}
}

// talk sends a request and calls f for each line of the answer. io.EOF from f ends it. When
// ctx ends, end is called.
func talk(ctx context.Context, runDir string, r Control, end func(net.Conn), f func(Answer) error) error {
	c, err := dial(ctx, runDir, ControlFile)
	if err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { end(c) })
	defer stop()
	if err := json.NewEncoder(c).Encode(r); err != nil {
		return fmt.Errorf("ask the mount server: %w", err)
	}
	lines := bufio.NewScanner(c)
	lines.Buffer(make([]byte, 64<<10), maxAnswer)
	for lines.Scan() {
		var a Answer
		if err := json.Unmarshal(lines.Bytes(), &a); err != nil {
			return fmt.Errorf("answer of the mount server: %w", err)
		}
		if a.Error != "" {
			return fmt.Errorf("%w: %s", ErrControl, a.Error)
		}
		if err := f(a); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("answer of the mount server: %w", err)
	}
	return fmt.Errorf("the mount server has ended: %w", io.ErrUnexpectedEOF)
}

// keepHistory has the hub write down what is copied up, if that is wanted, until the returned
// function is called. A mount without history is worth more than none.
func (s *server) keepHistory(hub *trace.Hub) (stop func()) {
	if s.spec.History == "" {
		return func() {}
	}
	f, err := os.OpenFile(s.spec.History, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err == nil {
		var h *trace.History
		if h, err = trace.NewHistory(f); err == nil {
			hub.Keep(h)
			return func() { _ = h.Close() } // nothing is held back
		}
		_ = f.Close() // nothing was written
	}
	s.log.Warn("it is not written down what is copied up", zap.Error(err))
	return func() {}
}
