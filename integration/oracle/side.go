package oracle

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
)

// side is one of the two: its directories, mount and agents.
type side struct {
	name    string
	mounter harness.Mounter
	stack   harness.Stack
	target  string
	mount   harness.Mount
	agents  []*Client
	remove  []func() error // takes away what the layers lie on
}

// removeAll removes the directory of a trial, whose modes are anything.
func removeAll(dir string) error {
	if m := harness.MountsBelow(dir); len(m) > 0 {
		return fmt.Errorf("still mounted: %v", m)
	}
	if err := os.RemoveAll(dir); errors.Is(err, unix.EPERM) {
		unprotect(dir)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove trial: %w", err)
	}
	return nil
}

// unprotect takes the flags from all files that forbid their removal. What
// fails shows at the removal.
func unprotect(dir string) {
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && (d.IsDir() || d.Type().IsRegular()) {
			_ = setFileFlags(p, "")
		}
		return nil
	})
}

// prepare builds the layers of one side.
func (t *Trial) prepare(s *side, dir string) error {
	s.stack.Dialect, s.stack.Options, s.stack.Atime = t.Dialect, t.Options, t.Atime
	recipe, upperOn, convert := t.Recipe, t.UpperOn, ""
	switch {
	case s.name == "subject":
		if t.Convert != "" {
			convert, s.stack.Dialect = t.Convert, t.Convert
		}
		if t.SubjectUpperOn != "" {
			upperOn = t.SubjectUpperOn
		}
	case t.ModelRecipe != nil:
		recipe = *t.ModelRecipe
	}
	err := s.place(t.LowersOn, dir, "lowers", func(dir string) error {
		for i, l := range recipe.Lowers {
			l.Dialect = t.Dialect
			switch convert {
			case "":
			case "auto":
				l.Dialect = "aufs"
			default:
				l.Dialect = convert
			}
			p := filepath.Join(dir, strconv.Itoa(i))
			if err := errors.Join(os.Mkdir(p, 0o755), l.Build(p)); err != nil {
				return err
			}
			s.stack.Lowers = append(s.stack.Lowers, p)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if !t.ReadOnly {
		err := s.place(upperOn, dir, "rw", func(dir string) error {
			s.stack.Upper, s.stack.Work = filepath.Join(dir, "upper"), filepath.Join(dir, "work")
			recipe.Upper.Dialect = t.Dialect
			if s.name == "subject" && t.ConvertUpper != "" {
				recipe.Upper.Dialect = t.ConvertUpper
			}
			return errors.Join(os.Mkdir(s.stack.Upper, 0o755), os.Mkdir(s.stack.Work, 0o755), recipe.Upper.Build(s.stack.Upper))
		})
		if err != nil {
			return err
		}
		s.stack.ReadOnly = t.ROFlag
	}
	s.target = filepath.Join(dir, "merged")
	return os.Mkdir(s.target, 0o755)
}

// place makes a directory in dir, on a file system of its own or not, and fills
// it.
func (s *side) place(on, dir, name string, fill func(dir string) error) error {
	p := filepath.Join(dir, name)
	if err := os.MkdirAll(p, 0o755); err != nil {
		return err
	}
	if on == "" {
		return fill(p)
	}
	place, err := harness.NewPlace(on)
	if err != nil {
		return err
	}
	remove, err := place(p, func() error { return fill(p) })
	if remove != nil {
		s.remove = append(s.remove, remove)
	}
	return err
}

// clear takes away what the layers of a side lie on.
func (s *side) clear() (err error) {
	for _, remove := range s.remove {
		err = errors.Join(err, remove())
	}
	return err
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
