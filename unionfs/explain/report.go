package explain

import (
	"fmt"
	"strconv"
	"time"
)

// Roles of an [Entry].
const (
	RoleServes  = "serves"  // it is what the mount shows
	RoleMerged  = "merged"  // its names are added to those of the directories above it
	RoleData    = "data"    // of the object that serves
	RoleDeletes = "deletes" // it is a whiteout in force
	RoleHidden  = "hidden"
)

// Rules that hide an entry, or keep a path from existing. With [parentPrefix] before it, the
// rule is about a directory above.
const (
	RuleShadowed     = "shadowed"        // a layer above has something of the name
	RuleWhiteout     = "whiteout"        // a layer above, or this one, deletes the name
	RuleOpaque       = "opaque"          // the directory of a layer above hides all below it
	RuleNotDirectory = "not-a-directory" // it cannot be merged into the directory above
	RuleMergeEnded   = "merge-ended"     // something that is no directory lies between
	RuleRedirected   = "redirected"      // the directory above takes its content from another path
	RuleCopiedLink   = "copied-link"     // the copy of another hard link of it serves the name
	RuleAbsent       = "absent"          // no layer has anything
	RuleRefused      = "refused"         // an attribute that the mount does not follow
	RuleDataMissing  = "data-missing"    // of a metacopy
	RuleOwnDirectory = "own-directory"   // the mount's own upper or workdir, seen in a lower
	RuleTooLong      = "name-too-long"
	parentPrefix     = "parent-"
)

// Mode has the permission bits of st_mode, setuid, setgid and sticky among them.
type Mode uint32

// String returns the octal form.
func (m Mode) String() string { return fmt.Sprintf("%04o", uint32(m)) }

// MarshalText makes it that in JSON, too.
func (m Mode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText parses what MarshalText wrote.
func (m *Mode) UnmarshalText(b []byte) error {
	v, err := strconv.ParseUint(string(b), 8, 32)
	*m = Mode(v)
	return err
}

// Label is what people call a layer.
type Label struct {
	// Name is short: "upper", "layer 3 of 5".
	Name      string `json:"name"`
	DiffID    string `json:"diffID,omitempty"`
	CreatedBy string `json:"createdBy,omitempty"`
}

// LayerInfo is one layer of the stack.
type LayerInfo struct {
	Index int `json:"index"` // 0 is the topmost
	Label
	Upper   bool   `json:"upper,omitempty"` // the writable one
	Dialect string `json:"dialect"`
	Dir     Path   `json:"dir"`
}

// Xattr is an attribute that the union keeps for itself.
type Xattr struct {
	Name  string `json:"name"`
	Value Path   `json:"value"`
}

// Attr is what an object is. Owners are those that the mount shows.
type Attr struct {
	Kind   string    `json:"kind"` // file, directory, symlink, fifo, socket, character device, block device
	Mode   Mode      `json:"mode"`
	UID    uint32    `json:"uid"`
	GID    uint32    `json:"gid"`
	Size   int64     `json:"size"`
	MTime  time.Time `json:"mtime"`
	Rdev   string    `json:"rdev,omitempty"`   // MAJOR:MINOR
	Target Path      `json:"target,omitempty"` // of a symbolic link
}

// Entry is what one layer has where the path leads in it.
type Entry struct {
	Layer int  `json:"layer"`
	In    Path `json:"in"` // in the layer
	// Attr is nil if there is a whiteout only.
	Attr *Attr `json:"attr,omitempty"`
	// Whiteout is the form of a whiteout, Opaque that of the mark of an opaque directory.
	Whiteout string `json:"whiteout,omitempty"`
	Opaque   string `json:"opaque,omitempty"`
	// Redirect is where the layers below have the content, or the data.
	Redirect Path `json:"redirect,omitempty"`
	Metacopy bool `json:"metacopy,omitempty"`
	// Origin says what an object of the upper was copied from.
	Origin *Origin `json:"origin,omitempty"`
	// Ino, Dev and Links are of the file in the layer; the mount shows other numbers.
	Ino     uint64  `json:"ino"`
	Dev     string  `json:"dev"`
	Links   uint64  `json:"links"`
	Private []Xattr `json:"private,omitempty"`

	Role string `json:"role"`
	// Rule, By and Why say what hides it: a layer, which may be this one, and a sentence.
	Rule string `json:"rule,omitempty"`
	By   *int   `json:"by,omitempty"`
	Why  string `json:"why,omitempty"`
	// Problem says what is wrong with it.
	Problem string `json:"problem,omitempty"`
}

// Origin is what an object of the upper was copied from.
type Origin struct {
	Handle string `json:"handle"` // as it is kept: hexadecimal
	Layer  *int   `json:"layer,omitempty"`
	In     Path   `json:"in,omitempty"`
}

// Link is a symbolic link on the way.
type Link struct {
	At     Path `json:"at"` // in the mount
	Target Path `json:"target"`
	Layer  int  `json:"layer"` // that has it
	// Hides counts the layers that have something of the link's name below it.
	Hides int `json:"hides,omitempty"`
}

// Component is a directory on the way, the root first.
type Component struct {
	At     Path   `json:"at"`
	Kind   string `json:"kind"`             // "" if there is nothing
	Layers []int  `json:"layers,omitempty"` // that it comes from, topmost first
	Hidden int    `json:"hidden,omitempty"` // entries that are hidden
}

// What became of an object of the lowers in the upper.
const (
	CopyNone     = ""         // it is not in the upper
	CopyNew      = "new"      // made in the upper: nothing says that it was copied
	CopyFull     = "full"     // copied with its data
	CopyMetadata = "metadata" // attributes only; the data is still in a lower
	CopyMerged   = "merged"   // a directory that both have
)

// Report explains one path.
type Report struct {
	Asked Path `json:"asked"`
	// Path is where that leads, links on the way resolved.
	Path   Path   `json:"path"`
	Exists bool   `json:"exists"`
	Errno  string `json:"errno,omitempty"` // what looking at it says, if it does not exist
	Rule   string `json:"rule,omitempty"`  // that keeps it from existing
	Answer string `json:"answer"`          // in one sentence

	Attr *Attr `json:"attr,omitempty"`
	// Layer serves the name and the attributes; Data, if another layer than that, the data.
	Layer *int `json:"layer,omitempty"`
	Data  *int `json:"data,omitempty"`
	// CopyUp says what became of it in the upper, if the stack has one.
	CopyUp string `json:"copyUp,omitempty"`

	Layers     []LayerInfo `json:"layers"`
	Entries    []Entry     `json:"entries"` // topmost layer first
	Links      []Link      `json:"links,omitempty"`
	Components []Component `json:"components,omitempty"`
}

// Line is one name of a tree.
type Line struct {
	At     Path   `json:"at"`
	Exists bool   `json:"exists"`
	Attr   *Attr  `json:"attr,omitempty"`
	Layer  *int   `json:"layer,omitempty"` // that serves it, or keeps it from existing
	Data   *int   `json:"data,omitempty"`
	Merged []int  `json:"merged,omitempty"` // further layers of a directory
	Opaque bool   `json:"opaque,omitempty"` // a directory that hides what lies below
	Hidden int    `json:"hidden,omitempty"` // entries of other layers that are hidden
	Rule   string `json:"rule,omitempty"`   // why it does not exist, or cannot be looked at
	Errno  string `json:"errno,omitempty"`
}
