package events

import (
	"encoding/json"
	"strings"
	"time"
	"unicode/utf8"
)

// Types of events: which member of an [Event] is set.
const (
	TypeImage     = "image"
	TypeContainer = "container"
	TypeMount     = "mount"
	TypeStore     = "store"
	// TypeLog is about the log itself and never written to it: see [Missed].
	TypeLog = "log"
)

// Types are all types of events.
var Types = []string{TypeImage, TypeContainer, TypeMount, TypeStore, TypeLog}

// Actions of images.
const (
	Load   = "load"
	Pull   = "pull"
	Push   = "push"
	Import = "import"
	Commit = "commit"
	Adopt  = "adopt"
	Save   = "save"
	Tag    = "tag"
	Untag  = "untag"
	Delete = "delete"
)

// Actions of containers.
const (
	Create = "create"
	Remove = "remove"
)

// Actions of mounts.
const (
	Mount   = "mount"   // it is live
	Unmount = "unmount" // it has ended as it should, and everything is written; or it goes on at other mount points
	End     = "end"     // it has ended otherwise; Error says how
	Restart = "restart" // another server goes on in the place of one that has died
	Fail    = "fail"    // a wanted mount could not be made again; Error says why
	Refuse  = "refuse"  // a request was answered with EIO because it has ended two servers
)

// Actions of the store.
const (
	GC      = "gc"
	Prune   = "prune"
	Check   = "check"
	Repair  = "repair"
	Rebuild = "rebuild"
	Compact = "compact"
)

// Lost is the action of [TypeLog].
const Lost = "lost"

// Event is one thing that has happened. Of the pointers the one that its type names is set.
type Event struct {
	// Seq is the number of the event in the log; 0 if it is not in it.
	Seq    uint64    `json:"seq,omitempty"`
	Time   time.Time `json:"time"`
	Type   string    `json:"type"`
	Action string    `json:"action"`
	// Cut: texts were too long and have been shortened.
	Cut bool `json:"cut,omitempty"`

	Image     *ImageEvent     `json:"image,omitempty"`
	Container *ContainerEvent `json:"container,omitempty"`
	Mount     *MountEvent     `json:"mount,omitempty"`
	Store     *StoreEvent     `json:"store,omitempty"`
	Missed    *Missed         `json:"missed,omitempty"`
}

// ImageEvent names an image.
type ImageEvent struct {
	ID   string `json:"id,omitempty"`   // digest of its configuration; empty where only a name is known
	Name string `json:"name,omitempty"` // reference, as users write it; empty for an image without one
}

// ContainerEvent names a container.
type ContainerEvent struct {
	ID        string `json:"id"`
	Name      string `json:"name"`
	ImageID   string `json:"imageID"`
	ImageName string `json:"imageName,omitempty"`
}

// MountEvent is about a mount.
type MountEvent struct {
	// Target is where it was made. If that is not valid UTF-8, TargetB64 has its bytes.
	Target      string `json:"target"`
	TargetB64   []byte `json:"targetB64,omitempty"`
	ContainerID string `json:"containerID,omitempty"` // empty: a read-only mount of an image
	Container   string `json:"container,omitempty"`   // its name
	ImageID     string `json:"imageID,omitempty"`
	ReadOnly    bool   `json:"readOnly,omitempty"`
	Pid         int    `json:"pid,omitempty"` // of the holder; of a restart: of the new server
	// Restarts and Refused are as counted so far, where the action is about them.
	Restarts int    `json:"restarts,omitempty"`
	Refused  int    `json:"refused,omitempty"`
	Error    string `json:"error,omitempty"`
}

// StoreEvent is about the store as a whole. What the action has no number of is zero.
type StoreEvent struct {
	Images    int   `json:"images,omitempty"`    // removed; of a rebuild: found
	Layers    int   `json:"layers,omitempty"`    // the same
	Reclaimed int64 `json:"reclaimed,omitempty"` // bytes
	Problems  int   `json:"problems,omitempty"`  // that remain
	Fixed     int   `json:"fixed,omitempty"`     // by a repair
	Deep      bool  `json:"deep,omitempty"`      // all content was read
}

// Missed says what a reader has not got.
type Missed struct {
	Events uint64 `json:"events"` // how many; 0: it cannot be known
}

// MaxLine is the most bytes that an event takes in the log, with the end of its line.
const MaxLine = 4096

// encode returns the line of an event. Texts that make it too long are shortened.
func encode(e Event) ([]byte, error) {
	if m := e.Mount; m != nil && !utf8.ValidString(m.Target) {
		c := *m
		c.TargetB64 = []byte(m.Target)
		e.Mount = &c
	}
	for limit := MaxLine; ; limit /= 2 {
		if limit < MaxLine {
			e = e.cut(limit)
		}
		b, err := json.Marshal(e)
		if err != nil || len(b) < MaxLine {
			return append(b, '\n'), err
		}
	}
}

// cut returns a copy of which every text has at most n bytes.
func (e Event) cut(n int) Event {
	short := func(s *string) {
		if len(*s) > n {
			*s, e.Cut = strings.ToValidUTF8((*s)[:n], ""), true
		}
	}
	if e.Image != nil {
		c := *e.Image
		e.Image = &c
		short(&c.ID)
		short(&c.Name)
	}
	if e.Container != nil {
		c := *e.Container
		e.Container = &c
		for _, s := range []*string{&c.ID, &c.Name, &c.ImageID, &c.ImageName} {
			short(s)
		}
	}
	if e.Mount != nil {
		c := *e.Mount
		e.Mount = &c
		for _, s := range []*string{&c.Target, &c.ContainerID, &c.Container, &c.ImageID, &c.Error} {
			short(s)
		}
		if len(c.TargetB64) > n {
			c.TargetB64, e.Cut = c.TargetB64[:n], true
		}
	}
	short(&e.Type)
	short(&e.Action)
	return e
}
