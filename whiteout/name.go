package whiteout

import "strings"

// The names of the aufs dialect, which image layer tars use too
// (image-spec, layer.md, "Whiteouts").
const (
	MarkerPrefix = ".wh."
	OpaqueMarker = ".wh..wh..opq"
	metaPrefix   = ".wh..wh."
)

// Marker is what a name means in the aufs dialect.
type Marker uint8

const (
	// NotMarker is an ordinary name.
	NotMarker Marker = iota
	// MarkerWhiteout deletes the name that ParseMarker returns.
	MarkerWhiteout
	// MarkerOpaque makes the directory it lies in opaque.
	MarkerOpaque
	// MarkerMeta is bookkeeping of aufs itself (.wh..wh.plnk and others):
	// neither shown nor obeyed.
	MarkerMeta
	// MarkerInvalid is ".wh." with nothing behind it, or a marker for "." or
	// "..". A layer with such a name is broken.
	MarkerInvalid
)

// ParseMarker tells what name means in the aufs dialect, and the deleted name
// if it is a whiteout.
func ParseMarker(name string) (m Marker, target string) {
	rest, found := strings.CutPrefix(name, MarkerPrefix)
	switch {
	case !found:
		return NotMarker, ""
	case name == OpaqueMarker:
		return MarkerOpaque, ""
	case strings.HasPrefix(name, metaPrefix):
		return MarkerMeta, ""
	case rest == "" || rest == "." || rest == "..":
		return MarkerInvalid, ""
	}
	return MarkerWhiteout, rest
}
