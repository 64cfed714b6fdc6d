package oracle

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Diff is one thing in which the sides differ.
type Diff struct {
	Step    string   `json:"step"`              // "op 17", "tree …", a remount
	What    string   `json:"what"`              // the operation
	Model   string   `json:"model,omitempty"`   // the kernel's result
	Subject string   `json:"subject,omitempty"` // the other one
	Lines   []string `json:"lines,omitempty"`   // of trees: - model, + subject
}

// String is for messages.
func (d Diff) String() string {
	if d.Lines == nil {
		return fmt.Sprintf("%s: %s\n\tkernel:  %s\n\tsubject: %s", d.Step, shorten(d.What), shorten(d.Model), shorten(d.Subject))
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s (- kernel, + subject):", d.Step, shorten(d.What))
	for i, l := range d.Lines {
		if i == 20 {
			fmt.Fprintf(&b, "\n\t… %d more", len(d.Lines)-i)
			break
		}
		b.WriteString("\n\t" + shorten(l))
	}
	return b.String()
}

// longRun is a part of a name that is long only to be long.
var longRun = regexp.MustCompile(`x{40,}|n{40,}|y{40,}|p{40,}|(\\u00e9){20,}`)

// shorten makes long names readable.
func shorten(s string) string {
	return longRun.ReplaceAllStringFunc(s, func(run string) string { return fmt.Sprintf("%.6s…{%d}", run, len(run)) })
}

// differ compares two results.
func (t *Trial) differ(op Op, want, got Result) (Diff, bool) {
	want.Ghosts = ""
	if t.Subject.Name() == t.Model.Name() {
		got.Ghosts = ""
	}
	if op.Expect != "" && t.Subject.Name() != t.Model.Name() {
		if got.String() == op.Expect {
			return Diff{}, false
		}
		return Diff{What: op.String() + " (a documented difference)", Model: op.Expect, Subject: got.String()}, true
	}
	gone := want.Gone || got.Gone
	want.Gone, got.Gone = false, false
	if op.Op == "snapshot" {
		got.Out = acceptLinks(want.Out, got.Out)
	}
	if op.Op == "utimens" && strings.Contains(op.Flags, "NOFOLLOW") && strings.HasSuffix(want.Out, " atime=recent") {
		got.Out = exactAtime.ReplaceAllString(got.Out, " atime=recent")
	}
	if op.Op != "utimens" || op.Mtime == "omit" {
		got.Out = t.acceptMtime(want.Out, got.Out)
	}
	t.flagged = t.flagged || op.Op == "setflags" && want.Err == "" && strings.ContainsAny(op.Flags, "ia")
	if t.flagged && want.Err == "EPERM" && (got.Err != "" || unseenByServer(op, got)) {
		return Diff{}, false
	}
	if notEmpty(op, want.Err) && notEmpty(op, got.Err) {
		return Diff{}, false
	}
	if want == got || gone && t.acceptGone(op, want, got) {
		return Diff{}, false
	}
	d := Diff{What: op.String(), Model: want.String(), Subject: got.String()}
	if strings.Contains(want.Out, "\n") && got.Ghosts == "" {
		d.Lines = DiffLines(want.Out, got.Out)
		d.Model, d.Subject = "", ""
	}
	return d, true
}

// unseenByServer says whether the kernel answers an operation on an immutable
// file without asking the FUSE server, the only one who knows that it is one.
func unseenByServer(op Op, got Result) bool {
	return op.Op == "access" || op.Op == "copyrange" && got.Out == "0"
}

// exactAtime is the access time of a symbolic link. Where the path to it leads
// through another name of the same link, the kernel has just followed that.
var exactAtime = regexp.MustCompile(` atime=\S+$`)

// notEmpty says whether an operation failed because a directory is not empty.
// File systems have two names for that.
func notEmpty(op Op, err string) bool {
	return (op.Op == "rename" && !strings.Contains(op.Flags, "NOREPLACE") || op.Op == "rmdir") && (err == "ENOTEMPTY" || err == "EEXIST")
}

// emptyForUs accepts that the kernel refuses to remove or replace a directory that
// is empty in its own listing: it holds a whiteout that hides nothing.
func (t *Trial) emptyForUs(op Op, want, got Result, model *side) bool {
	if !notEmpty(op, want.Err) || got.Err != "" {
		return false
	}
	if op.Op == "rename" {
		op.Path = op.To
	}
	op.Op, op.User = "readdir", 0
	r, err := model.do(op)
	return err == nil && r.Err == "" && r.Out == "..:dir .:dir"
}

// longRedirect accepts that the kernel cannot write down where an object with a
// long path came from.
func (t *Trial) longRedirect(op Op, want, got Result) bool {
	if want.Err != "EXDEV" || got.Err != "" && !notEmpty(op, got.Err) || !slices.Contains(t.Options, "redirect_dir=on") {
		return false
	}
	for _, l := range t.Recipe.Lowers {
		for _, e := range l.Entries {
			if len(e.Path) >= 256 {
				return true
			}
		}
	}
	return false
}

// farCopy accepts that the kernel does not copy between file systems.
func (t *Trial) farCopy(op Op, want, got Result) bool {
	return op.Op == "copyrange" && want.Err == "EXDEV" && got.Err == "" && t.LowersOn+t.UpperOn+t.SubjectUpperOn != ""
}

// spoiledParent accepts that the kernel has set the modification time of the old
// parent although it refused to rename a directory over one that is not empty.
// Both sides get one time again; where that fails, the trial has to end.
func (t *Trial) spoiledParent(op Op, want, got Result, model, subject *side) (end bool, err error) {
	if !notEmpty(op, want.Err) || !notEmpty(op, got.Err) || op.Op != "rename" || !slices.Contains(t.Options, "redirect_dir=on") {
		return false, nil
	}
	dir := Op{Op: "lstat", Path: parent(op.Path), Rel: op.Rel, User: op.User, Agent: op.Agent}
	if dir.Rel && dir.Path == "" {
		dir.Path = "."
	}
	both := func(op Op) (a, b Result, err error) {
		if a, err = model.do(op); err == nil {
			b, err = subject.do(op)
		}
		return a, b, err
	}
	a, b, err := both(dir)
	if err != nil || a == b || !strings.HasSuffix(a.Out, " mtime=recent") {
		return false, err
	}
	dir.Op, dir.Atime, dir.Mtime = "utimens", "omit", defaultTime
	a, b, err = both(dir)
	return a != b || a.Err != "", err
}

// acceptMtime removes from got the modification times that the kernel has
// spoiled by copying the data of files that had been copied up without.
func (t *Trial) acceptMtime(want, got string) string {
	if !slices.Contains(t.Options, "metacopy=on") || !strings.Contains(want, "mtime=recent") {
		return got
	}
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	if len(w) != len(g) {
		return got
	}
	for i := range g {
		if m := fileMtime.FindStringSubmatchIndex(g[i]); m != nil {
			if line := g[i][:m[2]] + "mtime=recent" + g[i][m[3]:]; line == w[i] {
				g[i] = line
			}
		}
	}
	return strings.Join(g, "\n")
}

// fileMtime finds the time of a file in the results of stat, snapshot and
// utimens.
var fileMtime = regexp.MustCompile(`(?:^|(?:^| )file .*? )(mtime=\d+\.\d+)`)

// acceptLinks makes from got what says the same of hard links as want, where the
// kernel shows several numbers for one file until the next mount (a link made
// of a file that was copied up before). The names must look alike in everything
// else, and the kernel must not take for one what the subject takes for two.
func acceptLinks(want, got string) string {
	if !strings.Contains(got, " same=") {
		return got
	}
	kernel := make(map[string]string) // name to line
	for l := range strings.SplitSeq(want, "\n") {
		name, _, _ := strings.Cut(l, " ")
		kernel[name] = l
	}
	lines := strings.Split(got, "\n")
	group := make(map[string]string) // name to the first name of the same file
	for i, l := range lines {
		name, _, _ := strings.Cut(l, " ")
		alone, first := splitSame(l, name)
		group[name] = first
		k, ok := kernel[name]
		if !ok || k == l {
			continue
		}
		if kernelAlone, kernelFirst := splitSame(k, name); kernelAlone == alone && group[kernelFirst] == first {
			lines[i] = k
		}
	}
	return strings.Join(lines, "\n")
}

// splitSame takes from a line which other name is the same file; name if none.
func splitSame(line, name string) (alone, first string) {
	if m := sameName.FindStringSubmatch(line); m != nil {
		return strings.Replace(line, m[0], "", 1), m[1]
	}
	return line, name
}

var sameName = regexp.MustCompile(` same=(\S+)`)

// acceptGone accepts what differs for an open object without a name.
func (t *Trial) acceptGone(op Op, want, got Result) bool {
	switch want.Err {
	case "EEXIST", "ENOTDIR", "ENOENT":
		if got.Err == "" {
			t.freed = true
			return true
		}
	}
	if op.Op == "fstat" {
		return t.freed || nlink.ReplaceAllString(want.Out, "") == nlink.ReplaceAllString(got.Out, "")
	}
	return t.freed
}

var nlink = regexp.MustCompile(` nlink=\d+`)
