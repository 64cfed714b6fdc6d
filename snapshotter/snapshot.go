package snapshotter

import (
	"maps"
	"strings"
	"time"

	"github.com/plyfs/plyfs/layers"
)

// Kind is what a snapshot is.
type Kind string

// The kinds of snapshots, with the names that filters use.
const (
	View      Kind = "view"
	Active    Kind = "active"
	Committed Kind = "committed"
)

// Info is what containerd may know of a snapshot.
type Info struct {
	Name    string
	Parent  string
	Kind    Kind
	Labels  map[string]string
	Created time.Time
	Updated time.Time
}

// Usage is what a snapshot takes, without its parents.
type Usage struct {
	Size   int64 `json:"size"` // bytes allocated
	Inodes int64 `json:"inodes"`
}

// Mount is one call of mount(8) for the caller.
type Mount struct {
	Type    string
	Source  string
	Options []string
}

// row is a snapshot in the database. Its key there is its name.
type row struct {
	ID      string            `json:"id"`
	Kind    Kind              `json:"kind"`
	Parent  string            `json:"parent,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
	Created time.Time         `json:"created"`
	Updated time.Time         `json:"updated"`
	// Usage is that of a committed snapshot.
	Usage Usage `json:"usage,omitzero"`
}

func (r row) info(name string) Info {
	return Info{Name: name, Parent: r.Parent, Kind: r.Kind, Labels: r.Labels, Created: r.Created, Updated: r.Updated}
}

// maxName is below what bbolt takes for a key.
const maxName = 16 << 10

// checkName refuses names that no row can have.
func checkName(what, name string) error {
	switch {
	case name == "":
		return markedf(layers.ErrInvalid, "the %s of a snapshot must not be empty", what)
	case len(name) > maxName:
		return markedf(layers.ErrInvalid, "the %s of a snapshot has %d bytes: at most %d are possible", what, len(name), maxName)
	}
	return nil
}

// relabel returns the labels that an update with these field paths leaves; none stands
// for all fields that can change.
func relabel(old, given map[string]string, fields []string) (map[string]string, error) {
	if len(fields) == 0 {
		return given, nil
	}
	labels := maps.Clone(old)
	for _, f := range fields {
		key, one := strings.CutPrefix(f, "labels.")
		switch {
		case f == "labels":
			labels = maps.Clone(given)
		case !one:
			return nil, markedf(layers.ErrInvalid, "field %q of a snapshot cannot be updated: only labels can", f)
		case given[key] == "":
			delete(labels, key)
		default:
			if labels == nil {
				labels = map[string]string{}
			}
			labels[key] = given[key]
		}
	}
	return labels, nil
}
