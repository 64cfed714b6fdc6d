package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
	"github.com/plyfs/plyfs/mountd/holder"
)

// askTimeout is how long a mount server may take for an answer.
const askTimeout = 5 * time.Second

// live finds the mount that a path, or the name of a container, means.
func (a *app) live(cmd *cobra.Command, arg string) (m mountd.LiveServer, err error) {
	if !strings.Contains(arg, "/") {
		if _, serr := os.Lstat(arg); errors.Is(serr, os.ErrNotExist) { // a name, then
			return a.liveContainer(cmd, arg)
		}
	}
	return mountd.FindServer(arg)
}

// liveContainer finds a mount of a container, also that of a `plyfs shell`, which no path leads to.
func (a *app) liveContainer(cmd *cobra.Command, name string) (m mountd.LiveServer, err error) {
	err = a.with(cmd, func(ctx context.Context, s mountd.Service) error {
		all, err := s.List(ctx, mountd.Empty{})
		if err != nil {
			return err
		}
		st, err := mountOf(all, name)
		if err != nil {
			return err
		}
		m, err = mountd.FindServerOf(st)
		return err
	})
	return m, err
}

// mountOf finds a mount of the container that has a name, an ID, or the beginning of one.
func mountOf(all []mountd.Status, name string) (mountd.Status, error) {
	match := func(is func(c *layers.Container) bool) (found []mountd.Status) {
		for _, st := range all {
			if st.Container != nil && is(st.Container) {
				found = append(found, st)
			}
		}
		return found
	}
	found := match(func(c *layers.Container) bool { return c.Name == name })
	if len(found) == 0 {
		found = match(func(c *layers.Container) bool { return name != "" && strings.HasPrefix(c.ID, name) })
	}
	if len(found) == 0 {
		return mountd.Status{}, fmt.Errorf("%q is neither a path nor a container: see `plyfs ps`: %w", name, layers.ErrNotFound)
	}
	for _, st := range found {
		if st.Container.ID != found[0].Container.ID {
			return mountd.Status{}, usagef("container ID %q is ambiguous: more than one begins with it", name)
		}
	}
	for _, st := range found {
		if st.Target != "" && st.State == mountd.StateMounted {
			return st, nil
		}
	}
	return mountd.Status{}, fmt.Errorf("container %q is not mounted: %w", found[0].Container.Name, layers.ErrNotFound)
}

// control asks the server of a mount.
func control(ctx context.Context, m mountd.LiveServer, r holder.Control) (holder.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	a, err := holder.AskControl(ctx, m.RunDir, r)
	return a, controlError(m, err)
}

// controlError says what to do.
func controlError(m mountd.LiveServer, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, holder.ErrControl):
		return usagef("%v", err)
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("the mount on %q is served by a version that cannot be watched, mount it again: %w", m.Mountpoint(), err)
	}
	return fmt.Errorf("mount on %q: %w", m.Mountpoint(), err)
}
