package layers

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/metadata/chainindex"
)

// Reasons why two objects of one path differ.
const (
	WhyType     = "type"
	WhyMode     = "mode"
	WhyOwner    = "owner"
	WhySize     = "size"
	WhyContent  = "content" // of a file
	WhyLink     = "link"    // the target of a symbolic link
	WhyDevice   = "device"
	WhyXattr    = "xattr"
	WhyHardlink = "hardlink" // it shares its content with other names than before
	WhyTime     = "time"     // of the last modification
)

// reasons collects why two objects differ, as words and in detail.
type reasons struct {
	why     []string
	details []string
}

func (r *reasons) add(why, format string, a ...any) {
	r.why = append(r.why, why)
	if format != "" {
		r.details = append(r.details, why+" "+fmt.Sprintf(format, a...))
	} else {
		r.details = append(r.details, why)
	}
}

// metadata compares what indexes know of two objects. The contents of two files of one
// size are for the caller to compare. Times count only if asked for: an image that is
// built again has others, and nothing else that is new.
func (r *reasons) metadata(a, b *chainindex.Object, times bool) {
	if a.Type() != b.Type() {
		r.add(WhyType, "%s -> %s", typeName(a.Mode), typeName(b.Mode))
		return
	}
	typ := a.Mode & unix.S_IFMT
	if ma, mb := a.Mode&permBits, b.Mode&permBits; ma != mb && typ != unix.S_IFLNK { // whose mode says nothing
		r.add(WhyMode, "%04o -> %04o", ma, mb)
	}
	if a.UID != b.UID || a.GID != b.GID {
		r.add(WhyOwner, "%d:%d -> %d:%d", a.UID, a.GID, b.UID, b.GID)
	}
	switch typ {
	case unix.S_IFREG:
		if a.Size != b.Size {
			r.add(WhySize, "%d -> %d", a.Size, b.Size)
			r.add(WhyContent, "")
		}
	case unix.S_IFLNK:
		if a.Target != b.Target {
			r.add(WhyLink, "%q -> %q", a.Target, b.Target)
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if a.Rdev != b.Rdev {
			r.add(WhyDevice, "%d:%d -> %d:%d", unix.Major(a.Rdev), unix.Minor(a.Rdev), unix.Major(b.Rdev), unix.Minor(b.Rdev))
		}
	}
	if names := xattrChanges(a.Xattrs, b.Xattrs); len(names) > 0 {
		r.add(WhyXattr, "%s", strings.Join(names, ", "))
	}
	if times && a.Mtime != b.Mtime {
		r.add(WhyTime, "%s -> %s", timeText(a.Mtime), timeText(b.Mtime))
	}
}

// xattrChanges names the attributes that differ, with a sign for those only one has.
func xattrChanges(a, b []chainindex.Xattr) (out []string) {
	have := map[string]string{}
	for _, x := range a {
		if !droppedXattrs[x.Name] {
			have[x.Name] = string(x.Value)
		}
	}
	for _, x := range b {
		if droppedXattrs[x.Name] {
			continue
		}
		v, ok := have[x.Name]
		delete(have, x.Name)
		switch {
		case !ok:
			out = append(out, "+"+x.Name)
		case v != string(x.Value):
			out = append(out, x.Name)
		}
	}
	for name := range have {
		out = append(out, "-"+name)
	}
	slices.Sort(out)
	return out
}

func timeText(t chainindex.Time) string { return fmt.Sprintf("%d.%09d", t.Sec, t.Nsec) }

// Types of objects, in lists of files.
const (
	TypeFile      = "file"
	TypeDirectory = "directory"
	TypeSymlink   = "symlink"
)

// typeName is the word for the type of an object with that st_mode.
func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return TypeFile
	case unix.S_IFDIR:
		return TypeDirectory
	case unix.S_IFLNK:
		return TypeSymlink
	case unix.S_IFCHR:
		return "char"
	case unix.S_IFBLK:
		return "block"
	case unix.S_IFIFO:
		return "fifo"
	}
	return "socket"
}
