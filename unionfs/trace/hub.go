package trace

import (
	"slices"
	"sync"
	"sync/atomic"
)

// buffer is how many events wait for a session to take them.
const buffer = 1 << 14

// Resolver tells where objects are. It is asked while a request is answered.
type Resolver interface {
	// Where returns the path of an object that the kernel knows, "" if it has none, and
	// its layer: 0 the upper, 1 the topmost lower, and so on; -1: unknown.
	Where(node uint64) (path string, layer int)
	// Child returns the object that has this name in a directory, if the kernel knows it; else 0.
	Child(node uint64, name string) uint64
	// Lower reports whether an object that the kernel knows is in a lower of a writable union,
	// and how many of the directories above it are.
	Lower(node uint64) (lower bool, above int)
}

// Hub is where the events of one mount come together. Its zero value has no listeners.
type Hub struct {
	on       atomic.Bool // there are sessions
	mu       sync.Mutex
	sessions atomic.Pointer[[]*Session] // replaced, never changed; guarded by mu for writing
	people   people
	history  *History // nil: none; immutable once requests come
	labels   []string // of the lowers; immutable once requests come
}

// Name says what people call the lowers, the topmost first. It is called before the first request.
func (h *Hub) Name(lowers []string) { h.labels = lowers }

// label is the name of a layer, if it has one.
func (h *Hub) label(layer int) string {
	if layer < 1 || layer > len(h.labels) {
		return ""
	}
	return h.labels[layer-1]
}

// Keep has the hub write down what is copied up. It is called before the first request.
func (h *Hub) Keep(history *History) { h.history = history }

// On reports whether anybody listens.
func (h *Hub) On() bool { return h.on.Load() }

// Session is one listener.
type Session struct {
	hub     *Hub
	filter  Filter
	events  chan Event
	dropped atomic.Uint64
}

// Listen begins a session. The caller closes it.
func (h *Hub) Listen(f Filter) *Session {
	s := &Session{hub: h, filter: f, events: make(chan Event, buffer)}
	h.change(func(have []*Session) []*Session { return append(have, s) })
	return s
}

func (h *Hub) change(f func([]*Session) []*Session) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var have []*Session
	if p := h.sessions.Load(); p != nil {
		have = slices.Clone(*p)
	}
	have = f(have)
	h.sessions.Store(&have)
	h.on.Store(len(have) > 0)
}

// Events is where events come from, in the order in which answers were made. It is
// never closed.
func (s *Session) Events() <-chan Event { return s.events }

// Dropped is how many events have not fitted into the buffer so far.
func (s *Session) Dropped() uint64 { return s.dropped.Load() }

// Close ends the session. Events that are in its buffer stay there.
func (s *Session) Close() {
	s.hub.change(func(have []*Session) []*Session {
		return slices.DeleteFunc(have, func(o *Session) bool { return o == s })
	})
}

// emit gives an event to all who want it.
func (h *Hub) emit(e *Event) {
	p := h.sessions.Load()
	if p == nil {
		return
	}
	for _, s := range *p {
		if !s.filter.Match(e) {
			continue
		}
		select {
		case s.events <- *e:
		default:
			s.dropped.Add(1)
		}
	}
}
