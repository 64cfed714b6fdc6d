package oracle

import (
	"fmt"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// opSnapshot writes the tree below a path as sorted lines, one a name. Errors
// are part of the lines, so that one unreadable file does not hide the rest.
func opSnapshot(a *agent, op Op) (string, error) {
	s := &snapshot{a: a, op: op, groups: make(map[[2]uint64]string)}
	s.walk(op.path(), "")
	return strings.Join(s.lines, "\n"), nil
}

type snapshot struct {
	a      *agent
	op     Op
	lines  []string
	groups map[[2]uint64]string // (dev, ino) to the first name
}

func (s *snapshot) walk(path, rel string) {
	var st unix.Stat_t
	shown := Name(rel).String()
	if rel == "" {
		shown = "/"
	}
	if err := unix.Lstat(path, &st); err != nil {
		s.lines = append(s.lines, shown+" lstat: "+errName(err))
		return
	}
	line := shown + " " + showStat(&st)
	typ := st.Mode & unix.S_IFMT
	if typ != unix.S_IFDIR && st.Nlink > 1 {
		id := [2]uint64{st.Dev, st.Ino}
		if first, ok := s.groups[id]; ok {
			line += " same=" + first
		} else {
			s.groups[id] = shown
		}
	}
	attrs, err := listxattr(path, false)
	if err != nil {
		line += " listxattr:" + errName(err)
	}
	buf := make([]byte, 1<<16)
	for _, k := range attrs {
		n, err := unix.Lgetxattr(path, k, buf)
		if err != nil {
			line += " " + k + ":" + errName(err)
			continue
		}
		line += " " + Name(k).String() + "=" + showBytes(buf[:n])
	}
	switch typ {
	case unix.S_IFLNK:
		n, err := unix.Readlink(path, buf)
		line += fmt.Sprintf(" -> %s%s", showBytes(buf[:max(n, 0)]), errName(err))
	case unix.S_IFREG:
		line += " " + s.content(path)
	case unix.S_IFDIR:
		s.lines = append(s.lines, line)
		s.dir(path, rel)
		return
	}
	s.lines = append(s.lines, line)
}

func (s *snapshot) content(path string) string {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return "open:" + errName(err)
	}
	defer unix.Close(fd)
	b, err := readAll(fd)
	if err != nil {
		return "read:" + errName(err)
	}
	m, err := dataMap(fd)
	if err != nil {
		m = errName(err)
	}
	if m == "right" {
		return showBytes(b)
	}
	return showBytes(b) + " holes: " + m
}

func (s *snapshot) dir(path, rel string) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		s.lines = append(s.lines, Name(rel).String()+" opendir: "+errName(err))
		return
	}
	ents, err := listing(fd)
	ents = s.a.exists(s.op, fd, ents)
	_ = unix.Close(fd) // only read
	if err != nil {
		s.lines = append(s.lines, Name(rel).String()+" readdir: "+errName(err))
		return
	}
	sort.Slice(ents, func(i, j int) bool { return ents[i].name < ents[j].name })
	for i, e := range ents {
		if e.name == "." || e.name == ".." {
			continue
		}
		if i > 0 && ents[i-1].name == e.name {
			s.lines = append(s.lines, Name(rel+"/"+e.name).String()+" listed twice")
			continue
		}
		child := e.name
		if rel != "" {
			child = rel + "/" + e.name
		}
		s.walk(strings.TrimSuffix(path, "/")+"/"+e.name, child)
	}
}

// opPaths lists what exists, for the generator.
func opPaths(a *agent, op Op) (string, error) {
	var b strings.Builder
	var walk func(dir string, depth int)
	walk = func(dir string, depth int) {
		fd, err := unix.Open("/"+dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return
		}
		ents, _ := listing(fd) // an error shows in the comparison
		ents = a.exists(op, fd, ents)
		_ = unix.Close(fd) // only read
		sort.Slice(ents, func(i, j int) bool { return ents[i].name < ents[j].name })
		for _, e := range ents {
			if e.name == "." || e.name == ".." {
				continue
			}
			p := string(join(Name(dir), Name(e.name)))
			fmt.Fprintf(&b, "%s %s\n", direntTypes[e.typ], Name(p))
			if e.typ == unix.DT_DIR && depth < 8 {
				walk(p, depth+1)
			}
		}
	}
	walk("", 0)
	return b.String(), nil
}

// DiffLines returns the lines that only one of two snapshots has, marked - for
// the first and + for the second.
func DiffLines(a, b string) []string {
	count := make(map[string]int)
	for l := range strings.SplitSeq(a, "\n") {
		count[l]++
	}
	for l := range strings.SplitSeq(b, "\n") {
		count[l]--
	}
	var out []string
	for l, n := range count {
		switch {
		case n > 0:
			out = append(out, "- "+l)
		case n < 0:
			out = append(out, "+ "+l)
		}
	}
	sort.Slice(out, func(i, j int) bool {
		if out[i][2:] != out[j][2:] {
			return out[i][2:] < out[j][2:]
		}
		return out[i] > out[j]
	})
	return out
}
