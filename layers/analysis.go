package layers

import (
	"time"

	"github.com/opencontainers/go-digest"
)

// An analysis says where the bytes of an image are, and which of them it carries for
// nothing. Its words:
//
//	size of a layer   bytes of its regular files, each once however many names (hard
//	                  links) it has in the layer. A hard link to a file of a layer below
//	                  is a copy of it here, as when docker unpacks it.
//	visible           a file of a layer of which at least one name shows in the image
//	wasted            a file of a layer of which no name does: each was replaced or
//	                  deleted in a layer above. A layer that an image has twice is
//	                  counted twice, though the store holds it once.
//	efficiency        1 - wasted/size; 1 of an image without bytes
//
// So the size of an image is what is visible and what is wasted, and each wasted
// file has one layer that made it so: the one that took its last name away.
//
// What a layer does to a name:
//
//	A added    it was not there after the layers below
//	C changed  it was; a file is stored as a whole, whatever is new about it. A directory
//	           is changed if its mode, owner or extended attributes are new, not because
//	           something in it is
//	D deleted  by a whiteout of its own or of a directory above it, by an opaque
//	           directory, or because a directory above it is something else now. All
//	           names of a directory that goes are deleted, not only its own.

// AnalyzeOptions say what an analysis lists; the counts are always there. Of lists with
// a number, 0 is none and a negative number is all.
type AnalyzeOptions struct {
	Files       bool `json:"files,omitempty"`       // what each layer does, by file
	Layer       int  `json:"layer,omitempty"`       // list the files of this layer only; 0: of all
	Largest     int  `json:"largest,omitempty"`     // visible files
	Directories int  `json:"directories,omitempty"` // visible directories
	Wasted      int  `json:"wasted,omitempty"`      // paths with wasted files, and directories of them
	Duplicates  int  `json:"duplicates,omitempty"`  // reads all files that have the size of another one
	// Why compares each file with the one it replaces, and reads both if they are of one size.
	Why bool `json:"why,omitempty"`
}

// Analysis is what there is to know of the layers of an image.
type Analysis struct {
	ID         digest.Digest `json:"id"`
	Refs       []string      `json:"refs"`
	Size       int64         `json:"size"`
	Visible    int64         `json:"visible"`
	Wasted     int64         `json:"wasted"`
	Efficiency float64       `json:"efficiency"`
	// Files and Directories are names that the image shows; Files are all that are no
	// directories.
	Files       int `json:"files"`
	Directories int `json:"directories"`
	WastedFiles int `json:"wastedFiles"`
	// Deleted is the part of Wasted that was deleted; the rest was replaced.
	Deleted int64 `json:"deleted"`

	Layers  []LayerAnalysis `json:"layers"`  // bottom first
	History []HistoryStep   `json:"history"` // oldest first

	// A list that was asked for is there, if only empty.
	Largest            []LargeFile      `json:"largest,omitzero"`
	LargestDirectories []LargeDirectory `json:"largestDirectories,omitzero"`
	WastedPaths        []WastedPath     `json:"wastedPaths,omitzero"`
	WastedDirectories  []LargeDirectory `json:"wastedDirectories,omitzero"` // by wasted bytes
	// Duplicates are files with the same content, the costliest first, and Duplicated
	// the bytes of all but the first of each.
	Duplicates []Duplicate `json:"duplicates,omitzero"`
	Duplicated int64       `json:"duplicated,omitempty"`
}

// LayerAnalysis is what one layer does.
type LayerAnalysis struct {
	Number int `json:"number"` // 1 is the bottom
	LayerInfo
	CreatedBy string `json:"createdBy"`
	Comment   string `json:"comment,omitempty"`
	// Added and Changed count what the layer has; their bytes are its size. The bytes of
	// Deleted are those of files below, of which it takes the last name away.
	Added   LayerCount `json:"added"`
	Changed LayerCount `json:"changed"`
	Deleted LayerCount `json:"deleted"`
	// Wasted is about files of this layer that the layers above replace or delete.
	Wasted      int64 `json:"wasted"`
	WastedFiles int   `json:"wastedFiles"`
	// Wastes is the bytes of layers below that are wasted because of this one.
	Wastes int64 `json:"wastes"`
	// Images of the store that have this layer, in this place.
	Images int `json:"images"`
	// Files are there, if only none, if they were asked for.
	Files []LayerChange `json:"files,omitzero"`
}

// LayerCount counts names by what a layer does to them.
type LayerCount struct {
	Files       int   `json:"files"` // names of everything that is no directory
	Directories int   `json:"directories"`
	Bytes       int64 `json:"bytes"`
}

// HistoryStep is one step that made an image.
type HistoryStep struct {
	Layer     int       `json:"layer"` // its number; 0: the step made none
	Created   time.Time `json:"created,omitzero"`
	CreatedBy string    `json:"createdBy"`
	Comment   string    `json:"comment,omitempty"`
}

// LayerChange is what a layer does to one name.
type LayerChange struct {
	Kind    string   `json:"kind"` // A, C or D
	Path    Path     `json:"path"`
	Type    string   `json:"type"`              // of what is deleted: what it was
	Size    int64    `json:"size"`              // of a file; 0 of what is deleted
	OldSize int64    `json:"oldSize,omitempty"` // of the file that is replaced or deleted
	LinkTo  Path     `json:"linkTo,omitempty"`  // another name of this file in this layer, listed before
	Why     []string `json:"why,omitempty"`     // in what it differs from what it replaces, if asked for
}

// LargeFile is a file that an image shows.
type LargeFile struct {
	Path  Path  `json:"path"`
	Size  int64 `json:"size"`
	Layer int   `json:"layer"` // that it comes from
}

// LargeDirectory is a directory with all that is below it. One of which nine tenths are
// in one directory below it is left out: that one is listed.
type LargeDirectory struct {
	Path  Path  `json:"path"`
	Size  int64 `json:"size"`
	Files int   `json:"files"`
}

// WastedPath is a path with files that the image does not show.
type WastedPath struct {
	Path     Path         `json:"path"`
	Wasted   int64        `json:"wasted"`
	Versions []WastedFile `json:"versions"` // oldest first
	Visible  bool         `json:"visible"`  // the image shows another file, or what else, at this path
}

// WastedFile is a file of a layer that the image does not show.
type WastedFile struct {
	Layer int    `json:"layer"` // that has it
	Size  int64  `json:"size"`
	By    int    `json:"by"`   // the layer that took its last name away
	Kind  string `json:"kind"` // C: by something else, D: by nothing
	// Why is in what the file that has replaced it differs, if asked for. Without
	// WhyContent the same bytes are there once more.
	Why []string `json:"why,omitempty"`
}

// Duplicate is content that several files have.
type Duplicate struct {
	Digest digest.Digest   `json:"digest"`
	Size   int64           `json:"size"`
	Extra  int64           `json:"extra"` // bytes of all but one
	Files  []DuplicateFile `json:"files"`
}

// DuplicateFile is one of several files with one content. Hard links are one file.
type DuplicateFile struct {
	Path    Path `json:"path"`
	Layer   int  `json:"layer"`
	Visible bool `json:"visible"`
}
