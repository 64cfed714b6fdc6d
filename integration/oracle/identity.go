package oracle

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
)

// An inode number itself is nobody's business, but what keeps its number is:
// programs take two files for the same by it, over a copy-up, a rename and a
// remount. Where all layers are on one file system, as here, an object of the
// lowers has the number that it has there (kernel: Documentation, "Inode
// properties"), whatever happens to it later. So a name can be asked which
// object it is: one of the lowers, or a new one. Objects of the upper are all
// new, as the file system below gives their numbers away again once they are
// removed.

// number is one line of the answer to the operation "numbers".
type number struct {
	path      string // quoted
	ino       uint64
	dIno, dot bool // d_ino is st_ino; likewise for "." of a directory
	dev, many bool // st_dev is that of the root; there are several links
}

// opNumbers writes the inode numbers of the tree below a path, sorted by path.
func opNumbers(a *agent, op Op) (string, error) {
	var root unix.Stat_t
	if err := unix.Lstat(op.path(), &root); err != nil {
		return "", err
	}
	var b strings.Builder
	var walk func(path, rel string, dIno uint64)
	walk = func(path, rel string, dIno uint64) {
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return // the snapshot tells
		}
		isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
		var ents []dirent
		dot := true
		if isDir {
			if fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0); err == nil {
				ents, _ = listing(fd) // likewise
				ents = a.exists(op, fd, ents)
				_ = unix.Close(fd) // only read
			}
		}
		sort.Slice(ents, func(i, j int) bool { return ents[i].name < ents[j].name })
		for _, e := range ents {
			dot = dot && (e.name != "." || e.ino == st.Ino)
		}
		fmt.Fprintf(&b, "%s %d %t %t %t %t\n", Name(rel), st.Ino, dIno == st.Ino, dot, st.Dev == root.Dev, !isDir && st.Nlink > 1)
		for _, e := range ents {
			if e.name != "." && e.name != ".." {
				walk(strings.TrimSuffix(path, "/")+"/"+e.name, string(join(Name(rel), Name(e.name))), e.ino)
			}
		}
	}
	walk(op.path(), "", root.Ino)
	return b.String(), nil
}

// numbers asks a mounted side.
func (s *side) numbers() ([]number, error) {
	r, err := s.do(Op{Op: "numbers"})
	if err != nil {
		return nil, err
	}
	if r.Err != "" {
		return nil, fmt.Errorf("%s: inode numbers: %s", s.name, r.Err)
	}
	return parseNumbers(s.name, r.Out)
}

func parseNumbers(side, out string) (list []number, err error) {
	for line := range strings.Lines(out) {
		n := number{}
		path, rest, _ := strings.Cut(line, " ")
		n.path = path
		if _, err := fmt.Sscanf(rest, "%d %t %t %t %t", &n.ino, &n.dIno, &n.dot, &n.dev, &n.many); err != nil {
			return nil, fmt.Errorf("%s: line %q of inode numbers: %w", side, line, err)
		}
		list = append(list, n)
	}
	return list, nil
}

// objects names the objects of a side's lowers by their numbers. The parts of a
// directory in several layers have one name, as each of them may lend the
// merged directory its number; hard links have the first of their names.
func (s *side) objects() (map[uint64]string, error) {
	known := make(map[uint64]string)
	for _, dir := range s.stack.Lowers {
		err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(dir, p)
			if err != nil {
				return err
			}
			var st unix.Stat_t
			if err := unix.Lstat(p, &st); err != nil {
				return &os.PathError{Op: "lstat", Path: p, Err: err}
			}
			if _, ok := known[st.Ino]; !ok {
				known[st.Ino] = Name(filepath.Join("/", rel)).String()
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("inode numbers of the lowers: %w", err)
		}
	}
	return known, nil
}

// identities says of every name of a mounted side which object it is.
func (s *side) identities() (string, error) {
	list, err := s.numbers()
	if err != nil {
		return "", err
	}
	objects, err := s.objects()
	return showNumbers(list, objects), err
}

// showNumbers says of every name which object it is.
func showNumbers(list []number, objects map[uint64]string) string {
	lines := make([]string, 0, len(list))
	for _, n := range list {
		what, ok := objects[n.ino]
		switch {
		case n.path == "":
			what = "root" // of all layers at once, the upper's number in the kernel
		case !ok:
			what = "new"
		}
		line := "/" + n.path + " is=" + what
		for _, f := range []struct {
			ok   bool
			text string
		}{{n.dIno, otherDIno}, {n.dot, " other-d_ino-of-."}, {n.dev, " other-st_dev"}, {!n.many, manyLinks}} {
			if !f.ok {
				line += f.text
			}
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

// noteLink remembers which object has got another name. The kernel may show
// that name with a number of its own, also when it has become the only one.
func (t *Trial) noteLink(op Op, want, got Result, subject *side) error {
	if op.Op != "link" && op.Op != "linkfd" || want.Err != "" || got.Err != "" {
		return nil
	}
	r, err := subject.do(Op{Op: "numbers", Path: op.To, Rel: op.Rel, Agent: op.Agent})
	if err != nil || r.Err != "" {
		return err
	}
	list, err := parseNumbers(subject.name, r.Out)
	if err != nil || len(list) == 0 {
		return err
	}
	objects, err := subject.objects()
	if err != nil {
		return err
	}
	if t.linked == nil {
		t.linked = make(map[string]bool)
	}
	if what, ok := objects[list[0].ino]; ok {
		t.linked["is="+what] = true
	}
	return nil
}

// Marks of a line that matter below.
const (
	otherDIno = " other-d_ino"
	manyLinks = " links"
)

// diffNumbers compares what two mounts say of the same tree.
func (t *Trial) diffNumbers(step, want, got string) []Diff {
	if want == got || t.LowersOn+t.UpperOn+t.SubjectUpperOn != "" || t.ModelRecipe != nil {
		// Of several file systems, the kernel's numbers depend on what it
		// has in memory (kernel: Documentation, "Inode properties").
		return nil
	}
	have := make(map[string]string)
	for l := range strings.SplitSeq(want, "\n") {
		name, rest, _ := strings.Cut(l, " ")
		have[name] = rest
	}
	var lines []string
	for l := range strings.SplitSeq(got, "\n") {
		name, rest, _ := strings.Cut(l, " ")
		if k, ok := have[name]; ok && k != rest && !t.acceptNumber(k, rest) {
			lines = append(lines, "- "+name+" "+k, "+ "+l)
		}
	}
	if len(lines) == 0 {
		return nil
	}
	return []Diff{{Step: step, What: "inode numbers", Lines: lines}}
}

// acceptNumber accepts what the kernel does worse with links of a copied-up
// file and in a user namespace; see Accepted.
func (t *Trial) acceptNumber(kernel, subject string) bool {
	object := func(s string) (what string, other, links bool) {
		s, links = strings.CutSuffix(s, manyLinks)
		what, other = strings.CutSuffix(s, otherDIno)
		return what, other, links
	}
	what, other, links := object(kernel)
	subjectWhat, subjectOther, subjectLinks := object(subject)
	switch {
	case links != subjectLinks:
		return false
	case subjectOther && !other && !harness.InUserNamespace():
		// Where the kernel has written the links, it has not said where to
		// look for other numbers; otherwise there is no excuse.
		return false
	}
	return what == subjectWhat || what == "is=new" && (links || t.linked[subjectWhat] || harness.InUserNamespace())
}
