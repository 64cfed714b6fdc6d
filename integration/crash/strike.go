package crash

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
)

// held is a mount whose server is held up at each system call that changes its upper or
// workdir.
type held struct {
	target string
	done   chan error
	cancel func()
	log    bytes.Buffer

	mu     sync.Mutex
	armed  bool            // calls count; guarded by mu
	n      int             // how many have come since; guarded by mu
	decide func(Call) Fate // guarded by mu
}

// onUpper reports whether a call is about the upper or the workdir. A server that has a
// private copy of their mount sees them from its root.
func onUpper(c Call) bool {
	for _, dir := range []string{"upper", "work"} {
		if c.Path == dir || strings.HasPrefix(c.Path, dir+"/") || strings.Contains(c.Path, "/rw/"+dir+"/") {
			return true
		}
	}
	return false
}

// mountHeld mounts the union of a run and then hands each call to decide, counted from 1.
func (r *run) mountHeld(decide func(Call) Fate) (*held, error) {
	h := &held{target: r.target, done: make(chan error, 1), decide: decide}
	args := r.Subject.Args(r.stack, r.target)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = &h.log, &h.log
	cmd.Env = append(os.Environ(), r.Subject.Env...)
	ctx, cancel := context.WithTimeout(context.Background(), 2*playLimit)
	h.cancel = cancel
	go func() { h.done <- Calls(ctx, cmd, "", h.fate) }()
	for {
		select {
		case err := <-h.done:
			cancel()
			return nil, fmt.Errorf("mount: %w: %s", err, &h.log)
		case <-time.After(time.Millisecond): // polling: mountinfo of a directory has no other event
		}
		if _, mounted := harness.IsMounted(r.target); mounted {
			break
		}
	}
	if _, err := r.playApart(len(r.Story.Steps)); err != nil { // it answers
		return nil, errors.Join(err, h.unmount())
	}
	h.arm(true)
	return h, nil
}

// PlayEnv, set to the name of a story, makes this binary play it in the directory of its
// last argument but one, from the step of the last one on. Call [RunPlay].
const PlayEnv = "PLYFS_TEST_PLAY"

// played is how far a story has come, and what is there then.
type played struct {
	At    int
	Errno unix.Errno // of the step that has failed
	Text  string
	Look  string
}

// RunPlay plays a story and says on standard output how that went.
func RunPlay(name string) error {
	if len(os.Args) < 3 {
		return errors.New("no directory")
	}
	from, err := strconv.Atoi(os.Args[len(os.Args)-1])
	if err != nil {
		return err
	}
	for _, s := range append(Stories(0), NameStories()...) {
		if s.Name != name {
			continue
		}
		r := &run{Trial: &Trial{Story: s}, target: os.Args[len(os.Args)-2]}
		at, err := r.play(from)
		p := played{At: at}
		if err != nil {
			p.Text, p.Errno = err.Error(), unix.EREMOTEIO
			_ = errors.As(err, &p.Errno)
		}
		// To look comes last: it changes access times.
		p.Look = r.look()
		return json.NewEncoder(os.Stdout).Encode(p)
	}
	return fmt.Errorf("no story %q", name)
}

// playApart plays the story in another process: one in Go that waits for an answer of a
// mount can wait with all that it does, and who holds up the calls of the mount's server
// must not.
func (r *run) playApart(from int) (p played, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), playLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run=^$", r.target, strconv.Itoa(from))
	cmd.Env = append(os.Environ(), PlayEnv+"="+r.Story.Name)
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err == nil {
		err = json.Unmarshal(out, &p)
	}
	if err != nil {
		return p, fmt.Errorf("play: %w: %s", err, out)
	}
	return p, nil
}

// arm says whether calls count from now on.
func (h *held) arm(on bool) {
	h.mu.Lock()
	h.armed = on
	h.mu.Unlock()
}

func (h *held) fate(c Call) Fate {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.armed || !onUpper(c) {
		return Passes
	}
	h.n++
	c.N = h.n
	return h.decide(c)
}

func (h *held) unmount() error {
	defer h.cancel()
	h.arm(false)
	err := unix.Unmount(h.target, 0)
	select {
	case e := <-h.done:
		if e != nil {
			err = errors.Join(err, fmt.Errorf("%w: %s", e, &h.log))
		}
	case <-time.After(playLimit):
		err = errors.Join(err, errors.New("the mount does not end"), unix.Unmount(h.target, unix.MNT_DETACH))
	}
	return err
}

// Calls executes the story undisturbed and returns the calls by which its server changes
// the upper and the workdir.
func (t *Trial) Calls() (calls []Call, err error) {
	_, err = t.strike(func(c Call) Fate {
		calls = append(calls, c)
		return Passes
	}, nil)
	return calls, err
}

// Strike executes the story on a fresh upper. At the call with the number n the server is
// killed, which nobody may notice; or the call, and with on all later ones that grow says
// need room, fails with an error: then the step that fails has happened or not, for those
// who look at the mount then, and can be repeated when calls no longer fail. by looks at
// what is left.
func (t *Trial) Strike(n int, fate Fate, on bool, grow func(Call) bool, by harness.Mounter) (err error) {
	struck, lifted := Call{}, false
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s, %d at %s: %w", t.Story.Name, fate, struck, err)
		}
	}()
	var mu sync.Mutex
	decide := func(c Call) Fate {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case c.N == n:
			struck = c
			return fate
		case on && c.N > n && !lifted && grow(c):
			return fate
		}
		return Passes
	}
	var lift func(error) error
	if fate != Kills {
		lift = func(err error) error {
			mu.Lock()
			lifted = true
			mu.Unlock()
			if !errors.Is(err, unix.Errno(fate)) {
				return fmt.Errorf("another error: %w", err)
			}
			return nil
		}
	}
	r, err := t.strike(decide, lift)
	if err != nil {
		return err
	}
	if struck.N == 0 {
		return errors.New("the call was not reached")
	}
	last := len(t.Story.Steps)
	if _, err := r.inspect(by, span{last, last}); err != nil {
		return fmt.Errorf("mounted by %s: %w", by.Name(), err)
	}
	return Swept(r.real.Work)
}

// strike plays the story in a mount that is held up. lift is told the error of a step that
// fails, and says what is wrong with it; nil: none may fail.
func (t *Trial) strike(decide func(Call) Fate, lift func(error) error) (r *run, err error) {
	if r, err = t.start(); err != nil {
		return nil, err
	}
	h, err := r.mountHeld(decide)
	if err != nil {
		return nil, err
	}
	stuck := time.AfterFunc(playLimit, func() { _ = unix.Unmount(r.target, unix.MNT_FORCE) })
	defer stuck.Stop()
	for at, failures := 0, 0; ; failures++ {
		p, e := r.playApart(at)
		if err = e; err != nil {
			break
		}
		i, got, states := p.At, p.Look, t.Story.States
		failed := error(nil)
		if p.Errno != 0 {
			failed = fmt.Errorf("%s: %w", p.Text, p.Errno)
		}
		if failed == nil {
			if got != states[i] {
				err = errors.New(t.Story.explain(i, i, got))
			}
			break
		}
		if lift == nil || failures == 3 {
			err = failed
			break
		}
		if err = lift(failed); err != nil {
			break
		}
		if !slices.Contains(states[i:i+2], got) {
			err = fmt.Errorf("after %w: %s", failed, t.Story.explain(i, i+1, got))
			break
		}
		if at = i; got != states[i] {
			at = i + 1
		}
	}
	return r, errors.Join(err, h.unmount())
}
