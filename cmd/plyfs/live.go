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
	path := arg
	if !strings.Contains(arg, "/") {
		if _, serr := os.Lstat(arg); errors.Is(serr, os.ErrNotExist) { // a name, then
			if path, err = a.targetOf(cmd, arg); err != nil {
				return m, err
			}
		}
	}
	return mountd.FindServer(path)
}

// targetOf returns a mount point of a container.
func (a *app) targetOf(cmd *cobra.Command, name string) (target string, err error) {
	err = a.with(cmd, func(ctx context.Context, s mountd.Service) error {
		all, err := s.List(ctx, mountd.Empty{})
		if err != nil {
			return err
		}
		for _, st := range all {
			if st.Container != nil && (st.Container.Name == name || st.Container.ID == name) && st.Target != "" && st.State == mountd.StateMounted {
				target = string(st.Target)
				return nil
			}
		}
		return fmt.Errorf("%q is neither a path nor a container that is mounted: see `plyfs ps`: %w", name, layers.ErrNotFound)
	})
	return target, err
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
