package crash

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fault"
	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// Trial is a story on a union whose server is killed at a step of its own.
type Trial struct {
	Story   *Story
	Subject harness.FUSE
	Dir     string // a directory for everything, empty at first
	Options []string
	// Litter lies in the workdir at the start.
	Litter bool
	// Lame: the upper's file system has no RENAME_WHITEOUT.
	Lame bool

	runs int
}

// Arrival is the Nth arrival at a fault point.
type Arrival struct {
	Point string
	N     int
}

func (a Arrival) String() string { return fmt.Sprintf("%s:%d", a.Point, a.N) }

// run is one use of a fresh upper.
type run struct {
	*Trial
	stack, real harness.Stack // as the subject sees it; without the lame file system
	target      string
	done        func() error // takes the lame file system away, or nil
}

// start makes directories for a run.
func (t *Trial) start() (*run, error) {
	if t.runs == 0 {
		for _, d := range []string{t.lower(), t.path("scratch")} {
			if err := os.Mkdir(d, 0o755); err != nil {
				return nil, fmt.Errorf("trial: %w", err)
			}
		}
		if err := t.Story.Prepare(t.lower(), t.path("scratch")); err != nil {
			return nil, err
		}
	}
	t.runs++
	r := &run{Trial: t}
	dir := t.path(fmt.Sprint(t.runs))
	r.target = filepath.Join(dir, "merged")
	r.real = harness.Stack{
		Lowers: []string{t.lower()}, Upper: filepath.Join(dir, "rw", "upper"), Work: filepath.Join(dir, "rw", "work"), Options: t.Options,
	}
	for _, d := range []string{r.target, r.real.Upper, r.real.Work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, fmt.Errorf("trial: %w", err)
		}
	}
	if err := t.Story.buildUpper(r.real.Upper); err != nil {
		return nil, err
	}
	if t.Litter {
		l := oracle.Layer{Entries: []oracle.Entry{
			{Path: "#1", Kind: oracle.File, Size: 10}, {Path: "#2", Kind: oracle.Dir}, {Path: "#2/x", Kind: oracle.Whiteout}, {Path: "whiteout", Kind: oracle.Whiteout},
		}}
		work := filepath.Join(r.real.Work, "work")
		if err := errors.Join(os.Mkdir(work, 0o700), l.Build(work)); err != nil {
			return nil, fmt.Errorf("trial: %w", err)
		}
	}
	r.stack = r.real
	if !t.Lame {
		return r, nil
	}
	lame := filepath.Join(dir, "lame")
	if err := os.Mkdir(lame, 0o755); err != nil {
		return nil, fmt.Errorf("trial: %w", err)
	}
	var err error
	if r.done, err = MountLame(filepath.Join(dir, "rw"), lame); err != nil {
		return nil, err
	}
	r.stack.Upper, r.stack.Work = filepath.Join(lame, "upper"), filepath.Join(lame, "work")
	return r, nil
}

func (t *Trial) path(name string) string { return filepath.Join(t.Dir, name) }
func (t *Trial) lower() string           { return t.path("lower") }

// end takes the lame file system away.
func (r *run) end() error {
	if r.done == nil {
		return nil
	}
	err := r.done()
	r.done = nil
	return err
}

// mount mounts the union with the subject and a fault.
func (r *run) mount(value string) (harness.Mount, error) {
	sub := r.Subject
	sub.Env = append(slices.Clone(sub.Env), fault.Env+"="+value)
	return sub.Mount(r.stack, r.target)
}

// play executes the story from a step on and returns the number of the step
// that failed, or the number of steps.
func (r *run) play(from int) (int, error) {
	for i := from; i < len(r.Story.Steps); i++ {
		if err := r.Story.Steps[i].do(filepath.Join(r.target, r.Story.Name)); err != nil {
			return i, fmt.Errorf("%s: %w", r.Story.Steps[i].What, err)
		}
	}
	return len(r.Story.Steps), nil
}

// playLimit is how long a story may take before its mount is aborted.
const playLimit = 30 * time.Second

// watch aborts a mount that hangs; call the function it returns.
func watch(m harness.Mount) (stop func() error) {
	said := make(chan string, 1)
	timer := time.AfterFunc(playLimit, func() { said <- m.Abort() })
	return func() error {
		if timer.Stop() {
			return nil
		}
		return fmt.Errorf("hangs for %s; the server says: %s", playLimit, <-said)
	}
}

// Trace executes the story without a fault and returns all arrivals in order.
func (t *Trial) Trace() (arrivals []Arrival, err error) {
	r, err := t.start()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.end()) }()
	file := t.path("trace")
	m, err := r.mount("trace:" + file)
	if err != nil {
		return nil, err
	}
	stop := watch(m)
	_, err = r.play(0)
	if got := r.look(); err == nil && got != r.Story.States[len(r.Story.Steps)] {
		err = errors.New("without a fault: " + r.Story.explain(len(r.Story.Steps), len(r.Story.Steps), got))
	}
	if err := errors.Join(err, stop(), m.Unmount()); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("no fault point reached: %w", err)
	}
	count := make(map[string]int)
	for name := range strings.FieldsSeq(string(b)) {
		count[name]++
		arrivals = append(arrivals, Arrival{name, count[name]})
	}
	return arrivals, nil
}

func (r *run) look() string { return Look(filepath.Join(r.target, r.Story.Name), r.Story.Times) }

// Kill executes the story on a fresh upper with a server that is killed at an
// arrival, and expects from both mounters in turn the state before or after the
// step that was under way; the first plays the story to its end.
func (t *Trial) Kill(a Arrival, by ...harness.Mounter) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s killed at %s: %w", t.Story.Name, a, err)
		}
	}()
	r, err := t.start()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.end()) }()
	at, err := r.die(a)
	if err != nil {
		return err
	}
	if err := r.end(); err != nil {
		return err
	}
	for i, m := range by {
		if at, err = r.inspect(m, at); err != nil {
			return fmt.Errorf("mounted by %s (%d): %w", m.Name(), i, err)
		}
	}
	return Swept(r.real.Work)
}

// Survive executes the story on a fresh upper with a server that is killed at an
// arrival, and expects that nothing shows of that: another one goes on. by looks at what
// is left.
func (t *Trial) Survive(a Arrival, by harness.Mounter) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s goes on after %s: %w", t.Story.Name, a, err)
		}
	}()
	r, err := t.start()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.end()) }()
	m, err := r.mount(a.String())
	if err != nil {
		return err
	}
	stop := watch(m)
	first := harness.Family(m.Pid())
	i, err := r.play(0)
	if got := r.look(); err == nil && got != r.Story.States[i] {
		err = errors.New(r.Story.explain(i, i, got))
	}
	if err == nil && slices.Equal(first, harness.Family(m.Pid())) {
		err = errors.New("the point was not reached")
	}
	if err := errors.Join(err, stop(), m.Unmount(), r.end()); err != nil {
		return err
	}
	if _, err := r.inspect(by, span{i, i}); err != nil {
		return fmt.Errorf("mounted by %s: %w", by.Name(), err)
	}
	return Swept(r.real.Work)
}

// span are the states that are possible: from the number of steps that were
// done to that of those that had begun.
type span struct{ from, to int }

// die runs the story into its fault.
func (r *run) die(a Arrival) (span, error) {
	m, err := r.mount("mount:" + a.String())
	if err != nil {
		if _, mounted := harness.IsMounted(r.target); mounted {
			return span{}, err
		}
		return span{0, 0}, nil // died before it was there
	}
	stop := watch(m)
	i, failed := r.play(0)
	if failed == nil {
		// What is left is the end of the mount.
		if err := m.Unmount(); err == nil {
			return span{}, errors.Join(errors.New("the point was not reached"), stop())
		}
		return span{i, i}, errors.Join(stop(), gone(m))
	}
	if err := gone(m); err != nil {
		return span{}, errors.Join(failed, err, stop())
	}
	return span{i, i + 1}, stop()
}

// gone waits until the processes of a mount have ended, and takes the mount away.
func gone(m harness.Mount) error {
	for end := time.Now().Add(10 * time.Second); ; {
		if err := unix.Kill(m.Pid(), 0); errors.Is(err, unix.ESRCH) {
			if _, mounted := harness.IsMounted(m.Target()); !mounted {
				return nil
			}
			return unix.Unmount(m.Target(), unix.MNT_DETACH)
		}
		if time.Now().After(end) {
			return fmt.Errorf("the mount lives on: %s", m.Abort())
		}
		time.Sleep(time.Millisecond) // polling: the mount table has no event for one mount
	}
}

// inspect mounts what is left, compares it with the possible states and plays
// the story to its end. It returns the only state that is possible then.
func (r *run) inspect(by harness.Mounter, at span) (_ span, err error) {
	m, err := by.Mount(r.real, r.target)
	if err != nil {
		return at, err
	}
	stop := watch(m)
	defer func() { err = errors.Join(err, stop(), m.Unmount()) }()
	if err := r.root(); err != nil {
		return at, err
	}
	got := r.look()
	// Of equal states the last one counts: a step that shows nothing, like an
	// fsync, need not be done again.
	i := at.to
	for i >= at.from && r.Story.States[i] != got {
		i--
	}
	if i < at.from {
		if r.Lame && got == r.Story.also {
			return at, nil
		}
		return at, errors.New(r.Story.explain(at.from, at.to, got))
	}
	if i, err = r.play(i); err != nil {
		return at, err
	}
	if got := r.look(); got != r.Story.States[i] {
		return at, errors.New("played to the end: " + r.Story.explain(i, i, got))
	}
	return span{i, i}, nil
}

// root checks that the mount shows the story and nothing else.
func (r *run) root() error {
	ents, err := os.ReadDir(r.target)
	if err != nil {
		return err
	}
	if len(ents) != 1 || ents[0].Name() != r.Story.Name {
		return fmt.Errorf("the root of the union shows %v", ents)
	}
	return nil
}

// Swept checks that nothing is left of what was being built in a workdir.
func Swept(work string) error {
	dir := filepath.Join(work, "work")
	return filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err == nil && p != dir {
			err = fmt.Errorf("left in the workdir: %s", p)
		}
		return err
	})
}
