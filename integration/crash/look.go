package crash

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Look describes the tree below dir, one line a name, in all that a story can
// change: two equal descriptions are the same state. Times of files are part of
// it if asked for; those near to now are all alike. What cannot be read is
// described by its error.
func Look(dir string, times bool) string {
	v := &view{times: times, links: make(map[uint64]string)}
	v.walk(dir, ".")
	return strings.Join(v.lines, "\n")
}

type view struct {
	times bool
	lines []string
	links map[uint64]string // inode number to the first name
}

func (v *view) walk(path, shown string) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		v.lines = append(v.lines, fmt.Sprintf("%s lstat: %v", shown, err))
		return
	}
	typ := st.Mode & unix.S_IFMT
	line := fmt.Sprintf("%s %o %d:%d", shown, st.Mode, st.Uid, st.Gid)
	if typ != unix.S_IFDIR {
		line += fmt.Sprintf(" links=%d", st.Nlink)
		if first, ok := v.links[st.Ino]; ok && st.Nlink > 1 {
			line += " same=" + first
		} else {
			v.links[st.Ino] = shown
		}
		if v.times {
			line += " " + showTime(st.Mtim)
		}
	}
	line += showXattrs(path)
	switch typ {
	case unix.S_IFREG:
		b, err := os.ReadFile(path)
		line += fmt.Sprintf(" size=%d %s", st.Size, showData(b))
		if err != nil {
			line += " " + plain(err)
		} else if int64(len(b)) != st.Size {
			line += fmt.Sprintf(" but %d bytes", len(b))
		}
	case unix.S_IFLNK:
		to, err := os.Readlink(path)
		line += fmt.Sprintf(" -> %q", to)
		if err != nil {
			line += " " + plain(err)
		}
	case unix.S_IFDIR:
		ents, err := os.ReadDir(path)
		if err != nil {
			line += " " + plain(err)
		}
		v.lines = append(v.lines, line)
		for _, e := range ents {
			// The kernel lists whiteouts of some kinds (docs/differences.md).
			var st unix.Stat_t
			if unix.Lstat(path+"/"+e.Name(), &st) == unix.ENOENT {
				continue
			}
			v.walk(path+"/"+e.Name(), shown+"/"+e.Name())
		}
		return
	}
	v.lines = append(v.lines, line)
}

// showData tells data from other data, and zeros from data.
func showData(b []byte) string {
	zeros := 0
	for ; zeros < len(b) && b[zeros] == 0; zeros++ {
	}
	if len(b) > 0 && zeros == len(b) {
		return "all zeros"
	}
	sum := sha256.Sum256(b)
	s := fmt.Sprintf("%x", sum[:6])
	if zeros >= 512 {
		s += fmt.Sprintf(" (first %d bytes zero)", zeros)
	}
	return s
}

func showTime(ts unix.Timespec) string {
	if d := time.Since(time.Unix(ts.Sec, ts.Nsec)); d < time.Hour && d > -time.Hour {
		return "recent"
	}
	return fmt.Sprintf("%d.%09d", ts.Sec, ts.Nsec)
}

func showXattrs(path string) string {
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return " listxattr: " + err.Error()
	}
	names := strings.FieldsFunc(string(buf[:n]), func(r rune) bool { return r == 0 })
	sort.Strings(names)
	s := ""
	for _, name := range names {
		n, err := unix.Lgetxattr(path, name, buf)
		if err != nil {
			s += fmt.Sprintf(" %s: %v", name, err)
			continue
		}
		s += fmt.Sprintf(" %s=%q", name, buf[:n])
	}
	return s
}

// plain is an error without the path, which differs from mount to mount.
func plain(err error) string {
	if e := (*os.PathError)(nil); errors.As(err, &e) {
		return e.Op + ": " + e.Err.Error()
	}
	return err.Error()
}
