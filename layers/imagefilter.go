package layers

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"

	"github.com/plyfs/plyfs/metadata"
)

// ImagesOptions choose images of a list.
type ImagesOptions struct {
	// Name is "", a repository, a repository:tag or a pattern of them.
	Name string
	// Filters are conditions KEY=VALUE, all of which must hold:
	//
	//	dangling=true|false    without, or with, a name
	//	label=KEY[=VALUE]      the config has the label
	//	before=IMAGE           made before that image
	//	since=IMAGE            made after that image
	//	reference=PATTERN      of several, one must match
	Filters []string
	// All also lists images without a name that others were made from.
	All bool
}

// FilterKeys are the keys of [ImagesOptions].
var FilterKeys = []string{"before", "dangling", "label", "reference", "since"}

// imageFilter is what the conditions come to.
type imageFilter struct {
	opts     ImagesOptions
	name     func(ImageSummary) bool
	patterns []string
	labels   []string
	dangling *bool
	before   []string
	since    []string

	earliest, latest time.Time // exclusive; zero: none
}

func newImageFilter(o ImagesOptions) (f imageFilter, err error) {
	f.opts = o
	if f.name, err = nameFilter(o.Name); err != nil {
		return f, err
	}
	for _, c := range o.Filters {
		key, value, ok := strings.Cut(c, "=")
		if !ok || value == "" {
			return f, fmt.Errorf("%w: filter %q: expected KEY=VALUE with one of the keys %s", ErrInvalid, c, strings.Join(FilterKeys, ", "))
		}
		switch key {
		case "dangling":
			b, err := strconv.ParseBool(value)
			if err != nil || f.dangling != nil && *f.dangling != b {
				return f, fmt.Errorf("%w: filter %q: expected dangling=true or dangling=false, once", ErrInvalid, c)
			}
			f.dangling = &b
		case "label":
			f.labels = append(f.labels, value)
		case "reference":
			if _, err := path.Match(value, ""); err != nil {
				return f, fmt.Errorf("%w: filter %q: %w", ErrInvalid, c, err)
			}
			f.patterns = append(f.patterns, value)
		case "before":
			f.before = append(f.before, value)
		case "since":
			f.since = append(f.since, value)
		default:
			return f, fmt.Errorf("%w: filter %q: expected one of the keys %s", ErrInvalid, c, strings.Join(FilterKeys, ", "))
		}
	}
	return f, nil
}

// times finds out when the images were made that others are compared with.
func (f *imageFilter) times(tx *metadata.Tx) error {
	made := func(name string) (time.Time, error) {
		r, err := resolve(tx, name)
		if err != nil {
			return time.Time{}, err
		}
		row, err := tx.Image(r.id)
		return row.Made, err
	}
	f.earliest, f.latest = time.Time{}, time.Time{}
	for _, name := range f.since {
		t, err := made(name)
		if err != nil {
			return err
		}
		if t.After(f.earliest) {
			f.earliest = t
		}
	}
	for _, name := range f.before {
		t, err := made(name)
		if err != nil {
			return err
		}
		if f.latest.IsZero() || t.Before(f.latest) {
			f.latest = t
		}
	}
	return nil
}

// image looks at what does not depend on a name.
func (f *imageFilter) image(tx *metadata.Tx, row metadata.Image, refs []string) (bool, error) {
	if f.dangling != nil && *f.dangling != onlyDigests(refs, "") {
		return false, nil
	}
	if len(f.since) > 0 && !row.Made.After(f.earliest) || len(f.before) > 0 && !row.Made.Before(f.latest) {
		return false, nil
	}
	if len(f.labels) == 0 {
		return true, nil
	}
	img, _, _, err := image(tx, row.ID)
	if err != nil {
		return false, err
	}
	for _, l := range f.labels {
		key, want, exact := strings.Cut(l, "=")
		if have, ok := img.Config.Config.Labels[key]; !ok || exact && have != want {
			return false, nil
		}
	}
	return true, nil
}

// nameless reports whether images without a name are wanted.
func (f *imageFilter) nameless() bool { return f.opts.Name == "" && len(f.patterns) == 0 }

// steps reports whether those of them are wanted that others were made from. They hang
// on these, so they do not dangle.
func (f *imageFilter) steps() bool { return f.opts.All && (f.dangling == nil || !*f.dangling) }

// matches looks at a line of the list, which has a name.
func (f *imageFilter) matches(line ImageSummary) bool {
	return f.name(line) && (len(f.patterns) == 0 ||
		slices.ContainsFunc(f.patterns, func(p string) bool { return matchName(p, line) }))
}

// matchName compares a pattern with all names that a line has.
func matchName(pattern string, line ImageSummary) bool {
	names := []string{line.Repository, line.Repository + ":" + line.Tag}
	for _, d := range line.Digests {
		names = append(names, line.Repository+"@"+d.String())
	}
	return slices.ContainsFunc(names, func(n string) bool {
		ok, _ := path.Match(pattern, n) // the pattern was looked at
		return ok
	})
}

func nameFilter(filter string) (func(ImageSummary) bool, error) {
	if filter == "" {
		return func(ImageSummary) bool { return true }, nil
	}
	if strings.ContainsAny(filter, "*?[") {
		if _, err := path.Match(filter, ""); err != nil {
			return nil, fmt.Errorf("%w: pattern %q: %w", ErrInvalid, filter, err)
		}
		return func(line ImageSummary) bool { return matchName(filter, line) }, nil
	}
	named, err := reference.ParseNormalizedNamed(filter)
	if err != nil {
		return nil, fmt.Errorf("%w: %q is not an image name: %w", ErrInvalid, filter, err)
	}
	want := reference.FamiliarName(named)
	if d, ok := named.(reference.Digested); ok { // which decides, whatever the tag
		return func(line ImageSummary) bool {
			return line.Repository == want && slices.Contains(line.Digests, d.Digest())
		}, nil
	}
	tagged, hasTag := named.(reference.Tagged)
	return func(line ImageSummary) bool {
		return line.Repository == want && (!hasTag || line.Tag == tagged.Tag())
	}, nil
}
