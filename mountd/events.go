package mountd

import (
	"context"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/events"
)

// EventsRequest asks for what happens to the store. Empty lists are all.
type EventsRequest struct {
	// Since begins with events of that time or later, as far back as the log goes; zero:
	// with what happens from now on.
	Since time.Time `json:"since,omitzero"`
	// Until ends with that time, which may be to come; zero: never.
	Until   time.Time `json:"until,omitzero"`
	Types   []string  `json:"types,omitempty"`
	Actions []string  `json:"actions,omitempty"`
	// Started, if set, is called once nothing that happens can be missed any more.
	Started func() `json:"-"`
}

// Events implements Service.
func (l *Local) Events(ctx context.Context, r EventsRequest, f func(events.Event) error) error {
	for _, t := range r.Types {
		if !slices.Contains(events.Types, t) {
			return markedf(ErrUsage, "there are no events of type %q: expected %s", t, strings.Join(events.Types, ", "))
		}
	}
	q := events.Query{Since: r.Since, Until: r.Until, Types: r.Types, Actions: r.Actions, Started: r.Started}
	return l.events.Follow(ctx, q, f)
}

// emit writes an event. One that cannot be written is no reason to fail: what it tells of
// has been done.
func (l *Local) emit(e events.Event) {
	if err := l.events.Append(e); err != nil {
		l.log.Warn("an event is not recorded", zap.String("op", e.Type+" "+e.Action), zap.Error(err))
	}
}

// emitImage tells of an image, once for each of its names.
func (l *Local) emitImage(action, id string, names ...string) {
	if len(names) == 0 {
		names = []string{""}
	}
	for _, n := range names {
		l.emit(events.Event{Type: events.TypeImage, Action: action, Image: &events.ImageEvent{ID: id, Name: n}})
	}
}

func (l *Local) emitContainer(action string, c *layers.Container) {
	l.emit(events.Event{Type: events.TypeContainer, Action: action, Container: &events.ContainerEvent{
		ID: c.ID, Name: c.Name, ImageID: c.ImageID.String(), ImageName: c.ImageName,
	}})
}

func (l *Local) emitStore(action string, s events.StoreEvent) {
	l.emit(events.Event{Type: events.TypeStore, Action: action, Store: &s})
}

// emitRemoved tells of what gc or prune has removed.
func (l *Local) emitRemoved(action string, rep layers.GCReport) {
	if rep.DryRun {
		return
	}
	for _, name := range rep.Untagged {
		l.emitImage(events.Untag, "", name)
	}
	for _, id := range rep.Images {
		l.emitImage(events.Delete, id.String())
	}
	l.emitStore(action, events.StoreEvent{Images: len(rep.Images), Layers: len(rep.Layers), Reclaimed: rep.Reclaimed})
}

// emitChecked tells of a check or a repair.
func (l *Local) emitChecked(r CheckRequest, rep *layers.Report) {
	e := events.StoreEvent{Deep: r.Deep}
	for _, f := range rep.Findings {
		if f.Fixed {
			e.Fixed++
		}
		if f.Open() {
			e.Problems++
		}
	}
	action := events.Check
	if r.Repair {
		action = events.Repair
	}
	l.emitStore(action, e)
}

// removeContainer deletes a container and says so.
func (l *Local) removeContainer(ctx context.Context, id string) error {
	c, err := l.store.Container(ctx, id)
	if err != nil {
		return err
	}
	if err := l.store.RemoveContainer(ctx, id); err != nil {
		return err
	}
	l.emitContainer(events.Remove, c)
	return nil
}

// emitAdopted tells of what was taken over.
func (l *Local) emitAdopted(rep *layers.AdoptReport) {
	for _, i := range rep.Images {
		if !i.Present {
			l.emitImage(events.Adopt, i.ID.String(), i.Refs...)
		}
	}
	for _, a := range rep.Containers {
		if a.Present {
			continue
		}
		if c, err := l.store.Container(context.Background(), a.ID); err == nil { // else it has been removed already
			l.emitContainer(events.Create, c)
		}
	}
}

// unmountedPoint tells that a mount has one mount point less, and goes on with the others.
func (l *Local) unmountedPoint(a assessment) {
	row := a.row
	row.Target, row.ReadOnly = a.target(), a.readOnly()
	e := l.mountEvent(row)
	l.emit(events.Event{Type: events.TypeMount, Action: events.Unmount, Mount: &e})
}

// mountEvent names a mount in events.
func (l *Local) mountEvent(row layers.Live) events.MountEvent {
	e := events.MountEvent{Target: row.Target, ContainerID: row.ContainerID, ImageID: row.ImageID.String(), ReadOnly: row.ReadOnly}
	if row.ContainerID != "" {
		if c, err := l.store.Container(context.Background(), row.ContainerID); err == nil { // the ID says it as well
			e.Container, e.ImageID = c.Name, c.ImageID.String()
		}
	}
	return e
}
