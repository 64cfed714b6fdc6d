package crash

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/plyfs/plyfs/integration/oracle"
)

// Step is one thing that a program does, as one system call or such that only
// the last one shows.
type Step struct {
	What string
	// Sync: when the step has returned, it and all before it are durable.
	Sync bool
	// fills is a file of which the step writes blocks that it has not had
	// before. Until they are synced they may be zeros, since ext4 commits
	// the size of a file as soon as it has given the data to the disk.
	fills string
	do    func(dir string) error
}

// Story is a sequence of steps in a directory of its own.
type Story struct {
	Name  string
	Lower []oracle.Entry // what is there at the start
	Upper []oracle.Entry // whiteouts that are in the upper already
	Times bool           // modification times of files are compared
	Steps []Step
	// Also are steps that lead from the start to one more state that the
	// death of the server may leave where the upper's file system cannot
	// make a whiteout in the same step as a rename.
	Also []Step
	// States are the descriptions of the directory at the start and after
	// each step; see Prepare.
	States []string
	also   string // the state that Also leads to, or ""
}

// Prepare builds the start of the story in dir/NAME, as part of a lower, and
// finds out the story's states by executing it in scratch.
func (s *Story) Prepare(dir, scratch string) error {
	if err := s.build(filepath.Join(dir, s.Name)); err != nil {
		return err
	}
	var err error
	if s.States, err = s.execute(filepath.Join(scratch, s.Name), s.Steps); err != nil || s.Also == nil {
		return err
	}
	states, err := s.execute(filepath.Join(scratch, s.Name+"-also"), s.Also)
	if err == nil {
		s.also = states[len(states)-1]
	}
	return err
}

func (s *Story) build(at string) error {
	if err := os.Mkdir(at, 0o755); err != nil {
		return fmt.Errorf("story %s: %w", s.Name, err)
	}
	if err := (oracle.Layer{Entries: s.Lower}).Build(at); err != nil {
		return fmt.Errorf("story %s: %w", s.Name, err)
	}
	return nil
}

// execute carries out steps in the new directory plain and returns its states.
func (s *Story) execute(plain string, steps []Step) ([]string, error) {
	if err := s.build(plain); err != nil {
		return nil, err
	}
	for _, e := range s.Upper {
		if err := os.RemoveAll(filepath.Join(plain, string(e.Path))); err != nil {
			return nil, fmt.Errorf("story %s: %w", s.Name, err)
		}
	}
	states := []string{Look(plain, s.Times)}
	for _, st := range steps {
		if err := st.do(plain); err != nil {
			return nil, fmt.Errorf("story %s on a plain directory: %s: %w", s.Name, st.What, err)
		}
		states = append(states, Look(plain, s.Times))
	}
	return states, nil
}

// buildUpper writes what the story wants in an upper.
func (s *Story) buildUpper(upper string) error {
	if len(s.Upper) == 0 {
		return nil
	}
	l := oracle.Layer{Entries: []oracle.Entry{{Path: oracle.Name(s.Name), Kind: oracle.Dir}}}
	for _, e := range s.Upper {
		e.Path = oracle.Name(s.Name) + "/" + e.Path
		l.Entries = append(l.Entries, e)
	}
	if err := l.Build(upper); err != nil {
		return fmt.Errorf("story %s: %w", s.Name, err)
	}
	return nil
}

// Marks before and after step i of a story.
func (s *Story) begin(i int) string { return fmt.Sprintf("%s %d begin", s.Name, i) }
func (s *Story) end(i int) string   { return fmt.Sprintf("%s %d end", s.Name, i) }

// Started is the mark before the first step of a run.
const Started = "started"

// Run executes the stories in root, several at a time and otherwise in random
// order, and marks every step. It stops at the first error.
func Run(root string, stories []*Story, workers int, rng *rand.Rand, mark func(string) error) error {
	if err := mark(Started); err != nil {
		return err
	}
	todo := make(chan *Story, len(stories))
	for _, i := range rng.Perm(len(stories)) {
		todo <- stories[i]
	}
	close(todo)
	errs := make(chan error, workers)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for s := range todo {
				if err := s.run(root, mark); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	return <-errs
}

func (s *Story) run(root string, mark func(string) error) error {
	dir := filepath.Join(root, s.Name)
	for i, st := range s.Steps {
		if err := mark(s.begin(i)); err != nil {
			return err
		}
		if err := st.do(dir); err != nil {
			return fmt.Errorf("story %s: %s: %w", s.Name, st.What, err)
		}
		if err := mark(s.end(i)); err != nil {
			return err
		}
	}
	return nil
}

// Neighbour writes a file and syncs it, again and again until stop is closed:
// so the file system commits its journal, with all names in it, at moments that
// nobody who uses the union has asked for. A lazy one makes pauses, in which only
// what the union syncs is synced.
func Neighbour(path string, lazy bool, rng *rand.Rand, stop <-chan struct{}) error {
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("neighbour: %w", err)
	}
	defer f.Close()
	for i := 0; ; i++ {
		pause := time.Duration(0)
		if lazy {
			pause = time.Duration(rng.IntN(4)) * time.Millisecond
		}
		if lazy && rng.IntN(20) == 0 {
			pause = 100 * time.Millisecond
		}
		select {
		case <-stop:
			return nil
		case <-time.After(pause):
		}
		if _, err := fmt.Fprintf(f, "%d\n", i); err != nil {
			return fmt.Errorf("neighbour: %w", err)
		}
		if err := f.Sync(); err != nil {
			return fmt.Errorf("neighbour: %w", err)
		}
	}
}
