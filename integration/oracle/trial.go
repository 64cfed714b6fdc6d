package oracle

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/plyfs/plyfs/integration/harness"
)

// Trial is one comparison.
type Trial struct {
	Seed   int64  `json:"seed"`
	Recipe Recipe `json:"recipe"`
	Ops    []Op   `json:"-"`
	// Gen, if not nil, makes operations while the trial runs and appends
	// them to Ops.
	Gen *Generator `json:"-"`
	// Options are mount options of both sides, as in harness.Stack.
	Options []string `json:"options,omitempty"`
	// Dialect of the mounts, "" or "userxattr".
	Dialect string `json:"dialect,omitempty"`
	// Convert writes the subject's lowers in another dialect than the
	// kernel's, and mounts them with it.
	Convert string `json:"convert,omitempty"`
	// ReadOnly mounts without an upper; ROFlag with one, but read-only.
	ReadOnly bool `json:"readOnly,omitempty"`
	ROFlag   bool `json:"roFlag,omitempty"`
	// Agents is how many processes execute operations; 0 means 1.
	Agents int `json:"agents,omitempty"`
	// NoRemount skips the remounts at the end.
	NoRemount bool `json:"noRemount,omitempty"`

	// Where, Model and Subject are the machine's part of a trial.
	Where   string          `json:"-"`
	Model   harness.Mounter `json:"-"` // the one that is right
	Subject harness.Mounter `json:"-"`
	Users   int             `json:"-"` // 0: all
	Limit   time.Duration   `json:"-"` // per operation; 0: one minute
	// Trace, if not nil, is told every operation with both results.
	Trace func(i int, op Op, model, subject Result) `json:"-"`
	// freed: the kernel refused to change an object that is unlinked and
	// was never copied up; see Accepted.
	freed bool
	// ended: an accepted difference left different trees behind.
	ended bool
	// Stats, if not nil, counts operation → errno of the model.
	Stats map[string]map[string]int `json:"-"`
}

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

// side is one of the two: its directories, mount and agents.
type side struct {
	name    string
	mounter harness.Mounter
	stack   harness.Stack
	target  string
	mount   harness.Mount
	agents  []*Client
}

// Run executes the trial. The error says that a side could not be run at all
// (a hang, a crash, a failing mount); differences are in the list.
func (t *Trial) Run() (diffs []Diff, err error) {
	if err := os.MkdirAll(t.Where, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(t.Where, "trial-")
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	model := &side{name: "model", mounter: t.Model}
	subject := &side{name: "subject", mounter: t.Subject}
	defer func() {
		for _, s := range []*side{model, subject} {
			err = errors.Join(err, s.down())
		}
		err = errors.Join(err, removeAll(dir))
	}()
	for _, s := range []*side{model, subject} {
		if err := t.prepare(s, filepath.Join(dir, s.name)); err != nil {
			return nil, err
		}
		if err := s.up(t, s.mounter); err != nil {
			return nil, err
		}
	}
	t.freed, t.ended = false, false
	diffs, err = t.compareOps(model, subject)
	if err != nil || t.ended {
		return diffs, err
	}
	modelTree, d, err := t.compareTrees("tree at the end", model, subject)
	diffs = append(diffs, d...)
	if err != nil || t.NoRemount {
		return diffs, err
	}
	d, err = t.remounts(modelTree, model, subject)
	return append(diffs, d...), err
}

// removeAll removes the directory of a trial, whose modes are anything.
func removeAll(dir string) error {
	if m := harness.MountsBelow(dir); len(m) > 0 {
		return fmt.Errorf("still mounted: %v", m)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove trial: %w", err)
	}
	return nil
}

// prepare builds the layers of one side.
func (t *Trial) prepare(s *side, dir string) error {
	s.stack.Dialect, s.stack.Options = t.Dialect, t.Options
	convert := ""
	if s.name == "subject" && t.Convert != "" {
		convert = t.Convert
		s.stack.Dialect = t.Convert
	}
	build := func(name string, l Layer, convert string) (string, error) {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(p, 0o755); err != nil {
			return "", err
		}
		l.Dialect = t.Dialect
		if convert != "" && convert != "auto" {
			l.Dialect = convert
		}
		if convert == "auto" {
			l.Dialect = "aufs"
		}
		return p, l.Build(p)
	}
	for i, l := range t.Recipe.Lowers {
		p, err := build(fmt.Sprintf("lower%d", i), l, convert)
		if err != nil {
			return err
		}
		s.stack.Lowers = append(s.stack.Lowers, p)
	}
	if !t.ReadOnly {
		p, err := build("upper", t.Recipe.Upper, "")
		if err != nil {
			return err
		}
		s.stack.Upper, s.stack.Work = p, filepath.Join(dir, "work")
		if err := os.Mkdir(s.stack.Work, 0o755); err != nil {
			return err
		}
		s.stack.ReadOnly = t.ROFlag
	}
	s.target = filepath.Join(dir, "merged")
	return os.Mkdir(s.target, 0o755)
}

// up mounts a side and starts its agents.
func (s *side) up(t *Trial, m harness.Mounter) (err error) {
	if s.mount, err = m.Mount(s.stack, s.target); err != nil {
		return fmt.Errorf("%s: %w", s.name, err)
	}
	limit := t.Limit
	if limit == 0 {
		limit = time.Minute
	}
	users := t.Users
	if users == 0 {
		users = len(Users)
	}
	for range max(1, t.Agents) {
		c, err := StartAgent(s.target, users, limit)
		if err != nil {
			return err
		}
		s.agents = append(s.agents, c)
	}
	return nil
}

// down ends agents and mount, also after a hang.
func (s *side) down() (err error) {
	var hang bool
	for _, c := range s.agents {
		if e := c.Close(); e != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", s.name, e))
			hang = hang || errors.Is(e, ErrHang)
		}
	}
	s.agents = nil
	if s.mount == nil {
		return err
	}
	m := s.mount
	s.mount = nil
	if hang {
		return errors.Join(err, fmt.Errorf("%s was aborted; it said: %s", s.name, m.Abort()))
	}
	if e := m.Unmount(); e != nil {
		err = errors.Join(err, fmt.Errorf("%s: %w", s.name, e))
	}
	return err
}

// abort breaks a side that hangs or died, and reports what its server said.
func (s *side) abort(cause error) error {
	out := ""
	if s.mount != nil {
		out = s.mount.Abort()
		s.mount = nil
	}
	for _, c := range s.agents {
		c.Kill()
	}
	s.agents = nil
	return fmt.Errorf("%s: %w\nserver: %s", s.name, cause, out)
}

// do executes op on one side.
func (s *side) do(op Op) (Result, error) {
	r, err := s.agents[min(op.Agent, len(s.agents)-1)].Do(op)
	if err != nil {
		return r, s.abort(err)
	}
	return r, nil
}

// maxDiffs ends a run that has gone wrong for good.
const maxDiffs = 20

func (t *Trial) compareOps(model, subject *side) (diffs []Diff, err error) {
	for i := 0; ; i++ {
		if t.Gen != nil {
			if err := t.generate(model); err != nil {
				return diffs, err
			}
		}
		if i >= len(t.Ops) {
			return diffs, nil
		}
		op := t.Ops[i]
		want, err := model.do(op)
		if err != nil {
			return diffs, fmt.Errorf("op %d: %w", i, err)
		}
		got, err := subject.do(op)
		if err != nil {
			return diffs, fmt.Errorf("op %d: %w", i, err)
		}
		t.count(op, want)
		if t.Trace != nil {
			t.Trace(i, op, want, got)
		}
		if got.Gone && !want.Gone && changesByFd[op.Op] {
			// A lower object that was unlinked: the kernel copies it up
			// under its old name or refuses.
			t.ended = true
			return diffs, nil
		}
		if d, ok := t.differ(op, want, got); ok {
			if t.emptyForUs(op, want, got, model) {
				t.ended = true
				return diffs, nil
			}
			d.Step = fmt.Sprintf("op %d", i)
			diffs = append(diffs, d)
			if len(diffs) >= maxDiffs {
				return diffs, nil
			}
		}
		if t.Gen != nil {
			t.Gen.Observe(op, want)
		}
	}
}

// changesByFd are the operations that change an open object's attributes.
var changesByFd = map[string]bool{
	"fchmod": true, "fchown": true, "futimens": true, "fsetxattr": true, "fremovexattr": true, "ftruncate": true, "fallocate": true,
}

// generate appends the next operation to Ops.
func (t *Trial) generate(model *side) error {
	if t.Gen.WantsPaths() {
		r, err := model.do(Op{Op: "paths"})
		if err != nil {
			return err
		}
		t.Gen.SetPaths(r.Out)
	}
	if op, ok := t.Gen.Next(); ok {
		t.Ops = append(t.Ops, op)
	}
	return nil
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

// emptyForUs accepts that the kernel refuses to remove a directory that is
// empty in its own listing: it holds a whiteout that hides nothing.
func (t *Trial) emptyForUs(op Op, want, got Result, model *side) bool {
	if op.Op != "rmdir" || want.Err != "ENOTEMPTY" || got.Err != "" {
		return false
	}
	op.Op, op.User = "readdir", 0
	r, err := model.do(op)
	return err == nil && r.Err == "" && r.Out == "..:dir .:dir"
}

// acceptLinks removes from got what says that two names are one file, where the
// kernel shows two numbers for it until the next mount (a link made of a file
// that was copied up before). Both names must look alike in everything else.
func acceptLinks(want, got string) string {
	if !strings.Contains(got, " same=") {
		return got
	}
	kernel, first := make(map[string]bool), make(map[string]string)
	for l := range strings.SplitSeq(want, "\n") {
		kernel[l] = true
	}
	lines := strings.Split(got, "\n")
	for i, l := range lines {
		name, attrs, _ := strings.Cut(l, " ")
		first[name] = attrs
		if m := sameName.FindStringSubmatch(l); m != nil && !kernel[l] {
			if alone := strings.Replace(l, m[0], "", 1); kernel[alone] && first[m[1]] == strings.Replace(attrs, m[0], "", 1) {
				lines[i] = alone
			}
		}
	}
	return strings.Join(lines, "\n")
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

// count fills Stats.
func (t *Trial) count(op Op, r Result) {
	if t.Stats == nil {
		return
	}
	if t.Stats[op.Op] == nil {
		t.Stats[op.Op] = make(map[string]int)
	}
	t.Stats[op.Op][r.Err]++
}

// compareTrees takes a snapshot on both sides.
func (t *Trial) compareTrees(step string, model, subject *side) (Result, []Diff, error) {
	op := Op{Op: "snapshot"}
	want, err := model.do(op)
	if err != nil {
		return want, nil, fmt.Errorf("%s: %w", step, err)
	}
	got, err := subject.do(op)
	if err != nil {
		return want, nil, fmt.Errorf("%s: %w", step, err)
	}
	return want, t.diffTrees(step, want, got), nil
}

func (t *Trial) diffTrees(step string, want, got Result) []Diff {
	d, ok := t.differ(Op{Op: "snapshot"}, want, got)
	if !ok {
		return nil
	}
	d.Step = step
	return []Diff{d}
}

// remounts mounts what was written again: by the same mounter, then by the
// other one. Every tree must be the model's tree at the end.
func (t *Trial) remounts(want Result, model, subject *side) (diffs []Diff, err error) {
	if err := errors.Join(model.down(), subject.down()); err != nil {
		return nil, err
	}
	type step struct {
		name  string
		s     *side
		m     harness.Mounter
		cross bool
	}
	steps := []step{
		{"the subject's upper mounted again by the subject", subject, t.Subject, false},
		{"the subject's upper mounted by the kernel", subject, t.Model, true},
		{"the kernel's upper mounted by the subject", model, t.Subject, true},
		{"the kernel's upper mounted again by the kernel", model, t.Model, false},
	}
	for _, st := range steps {
		if st.s == subject && st.cross && t.Convert != "" {
			continue // the kernel cannot read these lowers
		}
		if err := st.s.up(t, st.m); err != nil {
			return diffs, fmt.Errorf("%s: %w", st.name, err)
		}
		got, err := st.s.do(Op{Op: "snapshot"})
		if err != nil {
			return diffs, fmt.Errorf("%s: %w", st.name, err)
		}
		if err := st.s.down(); err != nil {
			return diffs, fmt.Errorf("%s: %w", st.name, err)
		}
		if st.m.Name() == t.Model.Name() {
			got.Ghosts = ""
		}
		diffs = append(diffs, t.diffTrees(st.name, want, got)...)
	}
	return diffs, nil
}
