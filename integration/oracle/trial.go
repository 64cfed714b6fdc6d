package oracle

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
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
	// ConvertUpper writes the subject's upper in another dialect than the
	// kernel's, as somebody has left it; the mount has to find that out.
	ConvertUpper string `json:"convertUpper,omitempty"`
	// ReadOnly mounts without an upper; ROFlag with one, but read-only.
	ReadOnly bool `json:"readOnly,omitempty"`
	ROFlag   bool `json:"roFlag,omitempty"`
	// Atime is as in harness.Stack.
	Atime string `json:"atime,omitempty"`
	// Agents is how many processes execute operations; 0 means 1.
	Agents int `json:"agents,omitempty"`
	// Kills is how often a mount's server of the subject is killed while it works; another
	// one has to go on, so that nobody notices.
	Kills int `json:"kills,omitempty"`
	// NoRemount skips the remounts at the end; NoTree the comparison of the
	// whole trees as well.
	NoRemount bool `json:"noRemount,omitempty"`
	NoTree    bool `json:"noTree,omitempty"`

	// ModelRecipe is what the kernel mounts instead, if it cannot mount
	// Recipe itself; it must show the same tree.
	ModelRecipe *Recipe `json:"-"`
	// LowersOn is what the lowers of each side lie on, UpperOn the upper and
	// the workdir, if not on the file system of Where; see harness.NewPlace.
	LowersOn string `json:"lowersOn,omitempty"`
	UpperOn  string `json:"upperOn,omitempty"`
	// OwnUpper says that the subject writes down in its upper what only it reads, so
	// neither side mounts the upper of the other.
	OwnUpper bool `json:"ownUpper,omitempty"`
	// SubjectUpperOn is UpperOn of the subject alone, where the kernel cannot
	// use it.
	SubjectUpperOn string `json:"subjectUpperOn,omitempty"`

	// Where, Model and Subject are the machine's part of a trial.
	Where   string          `json:"-"`
	Model   harness.Mounter `json:"-"` // the one that is right
	Subject harness.Mounter `json:"-"`
	Users   int             `json:"-"` // 0: all
	Limit   time.Duration   `json:"-"` // per operation; 0: one minute
	// Trace, if not nil, is told every operation with both results.
	Trace  func(i int, op Op, model, subject Result) `json:"-"`
	killed int                                       // so far
	// freed: the kernel refused to change an object that is unlinked and
	// was never copied up; see Accepted.
	freed bool
	// flagged: files were made immutable or append-only.
	flagged bool
	// linked: the lower objects ("is=…") that were given another name.
	linked map[string]bool
	// ended: an accepted difference left different trees behind.
	ended bool
	// Stats, if not nil, counts operation → errno of the model.
	Stats map[string]map[string]int `json:"-"`
}

// makeDir makes a directory for the trial, which every user may look into.
func (t *Trial) makeDir() (string, error) {
	if err := os.MkdirAll(t.Where, 0o755); err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(t.Where, "trial-")
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}

// Run executes the trial. The error says that a side could not be run at all
// (a hang, a crash, a failing mount); differences are in the list.
func (t *Trial) Run() (diffs []Diff, err error) {
	dir, err := t.makeDir()
	if err != nil {
		return nil, err
	}
	model := &side{name: "model", mounter: t.Model}
	subject := &side{name: "subject", mounter: t.Subject}
	defer func() {
		for _, s := range []*side{model, subject} {
			err = errors.Join(err, s.down(), s.clear())
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
	t.freed, t.flagged, t.linked, t.ended, t.killed = false, false, nil, false, 0
	diffs, err = t.compareOps(model, subject)
	if err != nil || t.ended || t.NoTree {
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

// Reread makes operations by the model, and compares what the tree is then with
// what the subject shows of the same upper.
func (t *Trial) Reread() (diffs []Diff, err error) {
	dir, err := t.makeDir()
	if err != nil {
		return nil, err
	}
	s := &side{name: "model", mounter: t.Model}
	defer func() { err = errors.Join(err, s.down(), s.clear(), removeAll(dir)) }()
	if err := t.prepare(s, filepath.Join(dir, s.name)); err != nil {
		return nil, err
	}
	if err := s.up(t, t.Model); err != nil {
		return nil, err
	}
	for i := 0; ; i++ {
		if t.Gen != nil {
			t.generate()
		}
		if i >= len(t.Ops) {
			break
		}
		r, err := s.do(t.Ops[i])
		if err != nil {
			return nil, fmt.Errorf("op %d: %w", i, err)
		}
		if t.Gen != nil {
			t.Gen.Observe(t.Ops[i], r)
		}
	}
	var seen [2]Result
	for i, m := range []harness.Mounter{t.Model, t.Subject} {
		// The model, too, is asked after a remount: it forgets what it has not
		// written down.
		if err := errors.Join(s.down(), s.up(t, m)); err != nil {
			return nil, err
		}
		if seen[i], err = s.do(Op{Op: "snapshot"}); err != nil {
			return nil, err
		}
		// fuse-overlayfs knows of no links after a remount.
		seen[i].Out = sameName.ReplaceAllString(nlink.ReplaceAllString(seen[i].Out, ""), "")
	}
	return t.diffTrees(fmt.Sprintf("an upper of %s, mounted by %s", t.Model.Name(), t.Subject.Name()), seen[0], seen[1]), nil
}

// maxDiffs ends a run that has gone wrong for good.
const maxDiffs = 20

func (t *Trial) compareOps(model, subject *side) (diffs []Diff, err error) {
	for i := 0; ; i++ {
		if t.Gen != nil {
			t.generate()
		}
		if i >= len(t.Ops) {
			return diffs, nil
		}
		op := t.Ops[i]
		if op.Op == "remount" {
			if err := t.remount(model, subject); err != nil {
				return diffs, fmt.Errorf("op %d: %w", i, err)
			}
			continue
		}
		want, err := model.do(op)
		if err != nil {
			return diffs, fmt.Errorf("op %d: %w", i, err)
		}
		undisturbed := t.disturb(i, subject)
		got, err := subject.do(op)
		undisturbed()
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
		if t.ended, err = t.spoiledParent(op, want, got, model, subject); err != nil || t.ended {
			return diffs, err
		}
		if d, ok := t.differ(op, want, got); ok {
			if t.emptyForUs(op, want, got, model) || t.longRedirect(op, want, got) || t.farCopy(op, want, got) {
				t.ended = true
				return diffs, nil
			}
			d.Step = fmt.Sprintf("op %d", i)
			diffs = append(diffs, d)
			if len(diffs) >= maxDiffs {
				return diffs, nil
			}
		}
		if err := t.noteLink(op, want, got, subject); err != nil {
			return diffs, err
		}
		if t.Gen != nil {
			t.Gen.Observe(op, want)
		}
	}
}

// disturb kills the server of the subject now and then, a moment after an operation has
// begun. Call what it returns when that has been answered.
func (t *Trial) disturb(i int, subject *side) (done func()) {
	const oneIn = 20
	r := rand.New(rand.NewPCG(uint64(t.Seed), uint64(i)))
	if t.killed >= t.Kills || r.IntN(oneIn) != 0 {
		return func() {}
	}
	t.killed++
	killed := make(chan struct{})
	after := time.Duration(r.IntN(500)) * time.Microsecond
	m := subject.mount
	go func() {
		defer close(killed)
		if after > 100*time.Microsecond {
			<-time.After(after)
		}
		harness.KillServer(m.Pid())
	}()
	return func() { <-killed }
}

// remount is the operation of that name.
func (t *Trial) remount(model, subject *side) error {
	for _, s := range []*side{model, subject} {
		if err := s.down(); err != nil {
			return err
		}
		if err := s.up(t, s.mounter); err != nil {
			return err
		}
	}
	t.freed, t.killed = false, 0
	if t.Gen != nil {
		t.Gen.Observe(Op{Op: "remount"}, Result{})
	}
	return nil
}

// changesByFd are the operations that change an open object's attributes.
var changesByFd = map[string]bool{
	"fchmod": true, "fchown": true, "futimens": true, "fsetxattr": true, "fremovexattr": true, "ftruncate": true, "fallocate": true,
}

// generate appends the next operation to Ops. What exists is asked for by an
// operation too, since looking at everything leaves traces in a kernel.
func (t *Trial) generate() {
	if t.Gen.WantsPaths() {
		t.Ops = append(t.Ops, Op{Op: "paths"})
	} else if op, ok := t.Gen.Next(); ok {
		t.Ops = append(t.Ops, op)
	}
}

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
	ids, err := model.identities()
	if err != nil {
		return want, nil, fmt.Errorf("%s: %w", step, err)
	}
	subjectIDs, err := subject.identities()
	if err != nil {
		return want, nil, fmt.Errorf("%s: %w", step, err)
	}
	return want, append(t.diffTrees(step, want, got), t.diffNumbers(step, ids, subjectIDs)...), nil
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
// other one. Every tree must be the model's tree at the end, and every object
// have the same identity as in the model's last mount.
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
		{"the kernel's upper mounted again by the kernel", model, t.Model, false},
		{"the subject's upper mounted again by the subject", subject, t.Subject, false},
		{"the subject's upper mounted by the kernel", subject, t.Model, true},
		{"the kernel's upper mounted by the subject", model, t.Subject, true},
	}
	var ids string
	for i, st := range steps {
		if st.cross && (t.OwnUpper || st.s == subject && (t.Convert != "" || t.ConvertUpper != "" || t.ModelRecipe != nil || t.SubjectUpperOn != "")) {
			continue // the kernel cannot mount these layers
		}
		if err := st.s.up(t, st.m); err != nil {
			return diffs, fmt.Errorf("%s: %w", st.name, err)
		}
		got, err := st.s.do(Op{Op: "snapshot"})
		if err != nil {
			return diffs, fmt.Errorf("%s: %w", st.name, err)
		}
		gotIDs, err := st.s.identities()
		if err != nil {
			return diffs, fmt.Errorf("%s: %w", st.name, err)
		}
		if err := st.s.down(); err != nil {
			return diffs, fmt.Errorf("%s: %w", st.name, err)
		}
		if st.m.Name() == t.Model.Name() {
			got.Ghosts = ""
		}
		if i == 0 {
			ids = gotIDs
		}
		diffs = append(diffs, t.diffTrees(st.name, want, got)...)
		diffs = append(diffs, t.diffNumbers(st.name, ids, gotIDs)...)
	}
	return diffs, nil
}
