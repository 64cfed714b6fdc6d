package holder

import (
	"path/filepath"

	"go.uber.org/zap"

	"github.com/plyfs/plyfs/mountd/events"
)

// event tells what has become of the mount.
func (h *holder) event(action string, cause error) {
	if err := h.spec.Events.write(action, h.state, cause); err != nil {
		h.log.Warn("an event is not recorded", zap.String("op", action), zap.Error(err))
	}
}

// ended tells how a mount ended that has begun: nil is as it should.
func (h *holder) ended(cause error) {
	if !h.told {
		return
	}
	action := events.Unmount
	if cause != nil {
		action = events.End
	}
	h.event(action, cause)
	h.state.Ended = true
	h.recordState()
}

// ended is the same for a server that has lost its holder and got no other.
func (s *server) ended(cause error) {
	if s.spec.RunDir == "" {
		return
	}
	st, err := ReadState(s.spec.RunDir)
	if err != nil {
		return // it has never been live
	}
	action := events.Unmount
	if cause != nil {
		action = events.End
	}
	err = s.spec.Events.write(action, st, cause)
	st.Ended = true
	if werr := writeJSON(filepath.Join(s.spec.RunDir, stateFile), &st); err != nil || werr != nil {
		s.log.Warn("end of the mount not recorded", zap.Error(err), zap.NamedError("state", werr))
	}
}

// write writes one event; without a source, as of a raw mount, there are none.
func (s *EventSource) write(action string, st State, cause error) error {
	if s == nil {
		return nil
	}
	m := s.Mount
	m.Pid = st.Holder.Pid
	switch action {
	case events.Restart:
		m.Pid, m.Restarts = st.Server.Pid, st.Restarts
	case events.Refuse:
		m.Refused = st.Refused
	}
	if cause != nil {
		m.Error = cause.Error()
	}
	return events.At(s.Dir).Append(events.Event{Type: events.TypeMount, Action: action, Mount: &m})
}
