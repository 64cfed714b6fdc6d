package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/mountd"
	"github.com/plyfs/plyfs/mountd/sandbox"
	"github.com/plyfs/plyfs/unionfs"
)

func newBundleCommand(a *app) *cobra.Command {
	var p processFlags
	var r mountd.BundleRequest
	var pull pullPolicy
	cmd := &cobra.Command{
		Use:   "bundle [flags] IMAGE|NAME DIR [[--] CMD [ARG…]]",
		Short: "Mount a container as an OCI runtime bundle, for runc or crun",
		Long: `Mount a container, or an image with a fresh container, on DIR/rootfs and write
DIR/config.json, so that a runtime starts it: runc run -b DIR ID. The container stays
mounted when that has ended, until plyfs umount DIR/rootfs.

The configuration gives the program what plyfs shell gives it: the process of the image,
the network of this machine, and namespaces for all else. It can be edited. For a user
it has a user namespace in which the user is root and nobody else exists; with
--allow-other (user_allow_other in /etc/fuse.conf) the ids of /etc/subuid exist as well.

Nobody else may enter DIR: set-user-id programs of the image work in it.`,
		Example: `  plyfs bundle --name work debian:12 /tmp/work
  runc run -b /tmp/work work
  plyfs umount /tmp/work/rootfs`,
		Args:              rangeArgs(2, -1, "IMAGE or NAME, DIR, and a program"),
		ValidArgsFunction: completeArgs(a.imagesAndContainers(), completeDirs),
		RunE: func(cmd *cobra.Command, args []string) error {
			command := args[2:]
			if len(command) > 0 && command[0] == "--" {
				command = command[1:]
			}
			out, err := p.parse(cmd.Flags(), command)
			if err != nil {
				return err
			}
			r.Mount.Source, r.Dir, r.Process = args[0], args[1], out.process
			r.Options.Hostname, r.Options.NoNewPrivileges = p.hostname, p.noNewPrivileges
			r.Options.Volumes, r.Options.Caps = out.volumes, out.caps
			// Without allow_other nobody but the user gets into the mount.
			r.Options.IDs = sandbox.SingleID()
			if r.Mount.AllowOther {
				r.Options.IDs = sandbox.OwnIDs()
			}
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				if err := pull.apply(ctx, s, r.Mount.Source, a.json); err != nil {
					return err
				}
				res, err := mountd.Bundle(ctx, s, r)
				if err != nil {
					return err
				}
				for _, n := range res.Notes {
					tell(n)
				}
				if a.json {
					return printJSON(res)
				}
				if res.Mount.Container != nil {
					fmt.Println(printable(res.Mount.Container.Name))
				}
				return nil
			})
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.StringVar(&r.Mount.Name, "name", "", "name of the new container (default: generated)")
	f.BoolVar(&r.Mount.AutoRemove, "rm", false, "delete the new container when it is unmounted")
	f.BoolVar(&r.Mount.ReadOnly, "ro", false, "nothing can be written, and an image needs no container")
	f.BoolVarP(&r.Options.Terminal, "tty", "t", false, "the program gets a terminal")
	pull.add(f)
	p.add(f)
	f.TextVar(&r.Mount.IO, "io", unionfs.IOAuto, "how file data is read and written: auto, passthrough, noopen or cache")
	f.BoolVar(&r.Mount.Volatile, "volatile", false, "never sync: fast, and lost with the machine")
	f.BoolVar(&r.Mount.AllowOther, "allow-other", false, "let other users in (always for root)")
	return cmd
}
