package oracle

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"time"

	"golang.org/x/sys/unix"
)

// Kind is the type of an entry of a layer.
type Kind string

// The kinds. Whiteout and Opaque are written in the dialect of the layer.
const (
	File      Kind = "file"
	Dir       Kind = "dir"
	Opaque    Kind = "opaque" // a directory that hides everything below
	Symlink   Kind = "symlink"
	Fifo      Kind = "fifo"
	Socket    Kind = "socket"
	Char      Kind = "char"
	Block     Kind = "block"
	Hardlink  Kind = "hardlink" // Target is a path in the same layer
	Whiteout  Kind = "whiteout"
	XWhiteout Kind = "xwhiteout" // empty file with overlay.whiteout
)

// Entry is one name of a layer. Parents come first.
type Entry struct {
	Path   Name              `json:"path"` // relative; "" is the layer's root
	Kind   Kind              `json:"kind"`
	Mode   uint32            `json:"mode,omitempty"`
	UID    int               `json:"uid,omitempty"`
	GID    int               `json:"gid,omitempty"`
	Mtime  string            `json:"mtime,omitempty"`  // "seconds.nanoseconds"
	Size   int64             `json:"size,omitempty"`   // of a file
	Seed   int64             `json:"seed,omitempty"`   // of its content; see Pattern
	Sparse bool              `json:"sparse,omitempty"` // data only at start and end
	Text   string            `json:"text,omitempty"`   // content, instead of Size and Seed
	Target Name              `json:"target,omitempty"`
	Rdev   [2]uint32         `json:"rdev,omitzero"`
	Xattrs map[string]string `json:"xattrs,omitempty"` // values: see EncodeValue
	Flags  string            `json:"flags,omitempty"`  // letters of chattr(1)
	Fill   int               `json:"fill,omitempty"`   // of a directory: so many empty files; of a hard link: so many more
}

// Layer is a list of entries, parents first.
type Layer struct {
	Entries []Entry `json:"entries"`
	// Dialect is "" (overlay), "userxattr" or "aufs".
	Dialect string `json:"dialect,omitempty"`
}

// Recipe is a whole stack. Lowers[0] is the topmost.
type Recipe struct {
	Lowers []Layer `json:"lowers"`
	// Upper is what the upper directory holds before the mount; its root
	// entry gives the merged root its attributes.
	Upper Layer `json:"upper"`
}

// defaultTime is the modification time of what has none of its own.
const defaultTime = "1000000000.123456789"

// Pattern returns n bytes that depend on seed and position.
func Pattern(seed, n int64) []byte {
	b := make([]byte, n)
	x := uint64(seed)*0x9e3779b97f4a7c15 + 1
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x >> 24)
	}
	return b
}

// xattr names by dialect.
func prefix(dialect string) string {
	if dialect == "userxattr" {
		return "user.overlay."
	}
	return "trusted.overlay."
}

// Build writes the layer into dir, which must be an empty directory.
func (l Layer) Build(dir string) error {
	// Directories with xwhiteouts have to be marked for the kernel to look.
	marked := make(map[string]bool)
	for _, e := range l.Entries {
		if e.Kind == XWhiteout && l.Dialect != "aufs" {
			marked[filepath.Dir(filepath.Join(dir, string(e.Path)))] = true
			marked[dir] = true // the layer has any
		}
		if err := l.buildEntry(dir, e); err != nil {
			return fmt.Errorf("build %s %q: %w", e.Kind, e.Path, err)
		}
	}
	for d := range marked {
		err := unix.Lsetxattr(d, prefix(l.Dialect)+"opaque", []byte("x"), unix.XATTR_CREATE)
		if err != nil && !errors.Is(err, unix.EEXIST) { // "y" stays
			return fmt.Errorf("mark %s: %w", d, err)
		}
	}
	// Times last, children before parents.
	done := append([]Entry(nil), l.Entries...)
	sort.SliceStable(done, func(i, j int) bool { return len(done[i].Path) > len(done[j].Path) })
	rooted := false
	for _, e := range done {
		p := filepath.Join(dir, string(e.Path))
		if l.Dialect == "aufs" && (e.Kind == Whiteout || e.Kind == XWhiteout) {
			continue
		}
		if e.Kind == Hardlink {
			continue
		}
		rooted = rooted || e.Path == ""
		if err := setTime(p, e.Mtime); err != nil {
			return err
		}
		if e.Flags != "" {
			if err := setFileFlags(p, e.Flags); err != nil {
				return fmt.Errorf("set flags %q of %s: %w", e.Flags, p, err)
			}
		}
	}
	if !rooted {
		if err := os.Chmod(dir, 0o755); err != nil {
			return err
		}
		return setTime(dir, "")
	}
	return nil
}

func setTime(path, when string) error {
	if when == "" {
		when = defaultTime
	}
	ts, err := parseTime(when)
	if err != nil {
		return err
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set times of %s: %w", path, err)
	}
	return nil
}

// whiteoutPath is the name of the .wh. file for p.
func whiteoutPath(p string) string { return filepath.Join(filepath.Dir(p), ".wh."+filepath.Base(p)) }

func (l Layer) buildEntry(dir string, e Entry) error {
	p := filepath.Join(dir, string(e.Path))
	switch e.Kind {
	case Dir, Opaque:
		if e.Path != "" {
			if err := unix.Mkdir(p, 0o700); err != nil {
				return err
			}
		}
		if err := fillDir(p, e.Fill); err != nil {
			return err
		}
		if e.Kind == Opaque {
			if l.Dialect == "aufs" {
				if err := os.WriteFile(filepath.Join(p, ".wh..wh..opq"), nil, 0o644); err != nil {
					return err
				}
			} else if err := unix.Lsetxattr(p, prefix(l.Dialect)+"opaque", []byte("y"), 0); err != nil {
				return err
			}
		}
	case File:
		if err := writeContent(p, e); err != nil {
			return err
		}
	case Symlink:
		if err := unix.Symlink(string(e.Target), p); err != nil {
			return err
		}
	case Hardlink:
		for i := range e.Fill {
			if err := unix.Link(filepath.Join(dir, string(e.Target)), fmt.Sprintf("%s%06d", p, i)); err != nil {
				return err
			}
		}
		return unix.Link(filepath.Join(dir, string(e.Target)), p)
	case Fifo:
		if err := unix.Mknod(p, unix.S_IFIFO|0o600, 0); err != nil {
			return err
		}
	case Socket:
		if err := unix.Mknod(p, unix.S_IFSOCK|0o600, 0); err != nil {
			return err
		}
	case Char, Block:
		typ := uint32(unix.S_IFCHR)
		if e.Kind == Block {
			typ = unix.S_IFBLK
		}
		if err := unix.Mknod(p, typ|0o600, int(unix.Mkdev(e.Rdev[0], e.Rdev[1]))); err != nil {
			return err
		}
	case Whiteout:
		if l.Dialect == "aufs" {
			return os.WriteFile(whiteoutPath(p), nil, 0o644)
		}
		return unix.Mknod(p, unix.S_IFCHR, 0)
	case XWhiteout:
		if l.Dialect == "aufs" {
			return os.WriteFile(whiteoutPath(p), nil, 0o644)
		}
		if err := os.WriteFile(p, nil, 0o644); err != nil {
			return err
		}
		return unix.Lsetxattr(p, prefix(l.Dialect)+"whiteout", []byte("y"), 0)
	default:
		return fmt.Errorf("unknown kind %q", e.Kind)
	}
	if err := unix.Lchown(p, e.UID, e.GID); err != nil {
		return err
	}
	if e.Kind != Symlink {
		mode := e.Mode
		if mode == 0 {
			mode = 0o644
			if e.Kind == Dir || e.Kind == Opaque {
				mode = 0o755
			}
		}
		if err := unix.Chmod(p, mode); err != nil {
			return err
		}
	}
	for _, k := range sortedKeys(e.Xattrs) {
		v, err := EncodeValue(e.Xattrs[k])
		if err != nil {
			return err
		}
		if err := unix.Lsetxattr(p, k, v, 0); err != nil {
			return fmt.Errorf("set %s: %w", k, err)
		}
	}
	return nil
}

// fillDir makes files low000000, low000001 and so on.
func fillDir(dir string, n int) error {
	for i := range n {
		fd, err := unix.Open(fmt.Sprintf("%s/low%06d", dir, i), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return err
		}
		if err := unix.Close(fd); err != nil {
			return err
		}
	}
	return nil
}

func writeContent(p string, e Entry) error {
	f, err := os.OpenFile(p, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	switch {
	case e.Text == ELF:
		_, err = f.Write(elfPause)
	case e.Text != "":
		_, err = f.WriteString(e.Text)
	case e.Sparse:
		const edge = 4096
		_, err = f.WriteAt(Pattern(e.Seed, edge), 0)
		if err == nil && e.Size > 2*edge {
			_, err = f.WriteAt(Pattern(e.Seed+1, edge), (e.Size-edge)&^(edge-1))
		}
		err = errors.Join(err, f.Truncate(e.Size))
	default:
		_, err = f.Write(Pattern(e.Seed, e.Size))
	}
	return errors.Join(err, f.Close())
}

// parseTime reads "seconds.nanoseconds", "now" or "omit".
func parseTime(s string) (unix.Timespec, error) {
	switch s {
	case "now", "":
		return unix.Timespec{Nsec: unix.UTIME_NOW}, nil
	case "omit":
		return unix.Timespec{Nsec: unix.UTIME_OMIT}, nil
	}
	var sec, nsec int64
	if _, err := fmt.Sscanf(s, "%d.%d", &sec, &nsec); err != nil {
		return unix.Timespec{}, fmt.Errorf("time %q: expected seconds.nanoseconds, now or omit: %w", s, err)
	}
	return unix.Timespec{Sec: sec, Nsec: nsec}, nil
}

// showTime renders a time so that two right answers are equal.
func showTime(ts unix.Timespec) string {
	t := time.Unix(ts.Sec, ts.Nsec)
	if d := time.Since(t); d > -10*time.Minute && d < 30*time.Minute {
		return "recent"
	}
	return fmt.Sprintf("%d.%09d", ts.Sec, ts.Nsec)
}
