package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
	"github.com/plyfs/plyfs/unionfs"
)

func newMountCommand(a *app) *cobra.Command {
	var r mountd.MountRequest
	var pull pullPolicy
	cmd := &cobra.Command{
		Use:   "mount [--ro] [--rm] [--restart] [--name NAME] IMAGE|NAME DIR",
		Short: "Mount an image with a fresh writable layer, or a container",
		Long: `Mount an image on DIR with a fresh writable layer, a container, which is kept until
plyfs rm (or, with --rm, until it is unmounted); its name is printed. Or mount a
container that exists. With --ro nothing can be written, and an image needs no container.

A container that is mounted already gets one more mount point (root only), be it a read-only
one: all are served by one server, and the mount ends with the last of them.

Set-user-id bits and device files in the mount have no effect unless --suid and --dev
are given: an image may come from anywhere.

With --restart the mount is wanted: after a reboot, or when all of its processes were
killed, plyfs restore and the start of plyfs daemon mount it again, with the same options
and the same container, until plyfs umount or plyfs rm.`,
		Example: `  plyfs mount debian:12 /mnt
  plyfs mount --name work debian:12 /mnt
  plyfs mount work /mnt
  plyfs mount --ro debian:12 /mnt
  plyfs mount --restart work /srv/work`,
		Args:              exactArgs(2, "IMAGE or NAME, and DIR"),
		ValidArgsFunction: completeArgs(a.imagesAndContainers(), completeDirs),
		RunE: func(cmd *cobra.Command, args []string) error {
			target, err := filepath.Abs(args[1])
			if err != nil {
				return err
			}
			r.Source, r.Target = args[0], mountd.Path(target)
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				if err := pull.apply(ctx, s, r.Source, a.json); err != nil {
					return err
				}
				res, err := s.Mount(ctx, r)
				if err != nil {
					return err
				}
				if a.json {
					return printJSON(res)
				}
				if res.Container != nil {
					fmt.Println(printable(res.Container.Name))
				}
				return nil
			})
		},
	}
	f := cmd.Flags()
	f.BoolVar(&r.ReadOnly, "ro", false, "read-only")
	f.BoolVar(&r.AutoRemove, "rm", false, "delete the new container when it is unmounted")
	f.BoolVar(&r.Restart, "restart", false, "mount it again after a reboot, or when its processes were killed (see plyfs restore)")
	f.StringVar(&r.Name, "name", "", "name of the new container (default: generated)")
	f.BoolVar(&r.Suid, "suid", false, "obey set-user-id bits and file capabilities")
	f.BoolVar(&r.Dev, "dev", false, "let device files work")
	f.BoolVar(&r.NoExec, "noexec", false, "let nothing be executed")
	f.BoolVar(&r.NoAtime, "noatime", false, "do not record access times")
	f.TextVar(&r.IO, "io", unionfs.IOAuto, "how file data is read and written: auto, passthrough, noopen or cache")
	f.BoolVar(&r.Volatile, "volatile", false, "never sync: fast, and lost with the machine")
	f.BoolVar(&r.AllowOther, "allow-other", false, "let other users in (always for root)")
	pull.add(f)
	f.Var((*byteSize)(&r.Limits.Memory), "memory", "what the mount's server keeps to in memory, as 64m or 1g (at least 16m; default: no limit)")
	f.Int64Var(&r.Limits.OpenFiles, "nofile", 0, "how many files the mount's server may have open (at least 64; default: what the system allows)")
	f.BoolVar(&r.Complete, "trace", false, "let the kernel keep nothing, so that plyfs trace shows everything; slow")
	f.BoolVar(&r.TellLayers, "layer-xattrs", false, "give files the attributes user.plyfs.layer and user.plyfs.explain, for getfattr -n")
	f.BoolVar(&r.Debug, "debug", false, "log every request (see the log in the run directory)")
	return cmd
}

// byteSize is a number of bytes on the command line, as docker writes it: 64m is 64 MiB.
type byteSize int64

func (b *byteSize) String() string {
	if *b == 0 {
		return ""
	}
	return strconv.FormatInt(int64(*b), 10)
}

func (b *byteSize) Type() string { return "SIZE" }

func (b *byteSize) Set(text string) error {
	digits := strings.TrimRight(strings.ToLower(text), "bkmgi")
	factor, ok := map[string]int64{
		"": 1, "b": 1, "k": 1 << 10, "kb": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mb": 1 << 20, "mib": 1 << 20,
		"g": 1 << 30, "gb": 1 << 30, "gib": 1 << 30,
	}[strings.ToLower(text)[len(digits):]]
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || !ok || n < 0 || n > math.MaxInt64/2/factor {
		return errors.New("expected a size in bytes, or with k, m or g")
	}
	*b = byteSize(n * factor)
	return nil
}

func newUmountCommand(a *app) *cobra.Command {
	var lazy bool
	cmd := &cobra.Command{
		Use:     "umount [-l] DIR|NAME…",
		Aliases: []string{"unmount"},
		Short:   "Unmount, and wait until everything written is on disk",
		Long: `Unmount a mount point or a container. A busy mount is refused, with the processes
that use it. With -l it disappears from the tree at once, and the rest follows when
its last user has ended.

A mount made with --restart is not made again after that, whether it was mounted or has
ended.`,
		Example: `  plyfs umount /mnt
  plyfs umount work`,
		Args:              rangeArgs(1, -1, "one DIR or NAME, or more"),
		ValidArgsFunction: completeEach(a.mounted()),
		RunE: func(cmd *cobra.Command, args []string) error {
			results := []mountd.UnmountResult{}
			err := eachArg(args, func(name string) error {
				target, err := filepath.Abs(name)
				if err != nil {
					return err
				}
				r := mountd.UnmountRequest{Name: mountd.Path(name), Target: mountd.Path(target), Lazy: lazy}
				res, err := a.unmount(cmd.Context(), r)
				if err != nil {
					return err
				}
				results = append(results, res)
				if res.StillInUse && !a.json {
					fmt.Fprintf(os.Stderr, "plyfs: %s is unmounted, but still in use by %s\n", quoted(string(res.Target)), printable(res.By))
				}
				return nil
			})
			if a.json {
				if jerr := printJSON(results); jerr != nil {
					return jerr
				}
			}
			return err
		},
	}
	cmd.Flags().BoolVarP(&lazy, "lazy", "l", false, "detach now, finish when nobody uses it any more")
	return cmd
}

func newRestoreCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "restore",
		Short: "Mount again what was mounted with --restart and has ended",
		Long: `Mount again what was mounted with plyfs mount --restart and is not mounted any more: after
a reboot, or because all processes of a mount were killed. What is mounted stays as it is,
and what another program has unmounted stays so until the next boot. A mount that cannot be
made is reported, here and by plyfs ps, and does not keep the others from being made; the exit
code is that of the first one.

plyfs daemon does the same when it starts.`,
		Example: `  plyfs restore
  systemctl enable plyfs-restore`,
		Args: exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				all, err := s.Restore(ctx, mountd.Empty{})
				if err != nil {
					return err
				}
				if a.json {
					if err := printJSON(list(all)); err != nil {
						return err
					}
				}
				var first error
				for _, r := range all {
					switch err := r.Err(); {
					case err != nil:
						tell(sentence(fmt.Errorf("%s is not mounted again: %w", quoted(string(r.Target)), err)))
						if first == nil {
							first = statusError{status: exitCode(err)}
						}
					case r.Restored && !a.json:
						fmt.Println(quoted(string(r.Target)))
					case r.Reason != "" && !a.json:
						tell(quoted(string(r.Target)) + ": " + r.Reason)
					}
				}
				return first
			})
		},
	}
}

// unmount asks the service. A raw mount needs no store, so a store that cannot
// be opened does not keep anybody from unmounting one.
func (a *app) unmount(ctx context.Context, r mountd.UnmountRequest) (mountd.UnmountResult, error) {
	s, err := a.open(ctx)
	if err != nil {
		res, rerr := mountd.UnmountRaw(ctx, r)
		if errors.Is(rerr, layers.ErrNotFound) {
			return res, err
		}
		return res, rerr
	}
	defer s.Close() // holds nothing that could be lost
	return s.Unmount(ctx, r)
}
