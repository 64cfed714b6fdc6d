package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/mountd"
)

func newCreateCommand(a *app) *cobra.Command {
	var pull pullPolicy
	cmd := &cobra.Command{
		Use:   "create IMAGE [NAME]",
		Short: "Make a container: a writable layer on an image",
		Example: `  plyfs create debian:12 work
  plyfs mount work /mnt`,
		Args:              rangeArgs(1, 2, "IMAGE and an optional NAME"),
		ValidArgsFunction: completeArgs(a.images()),
		RunE: func(cmd *cobra.Command, args []string) error {
			r := mountd.CreateRequest{Image: args[0]}
			if len(args) > 1 {
				r.Name = args[1]
			}
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				if err := pull.apply(ctx, s, r.Image, a.json); err != nil {
					return err
				}
				c, err := s.Create(ctx, r)
				if err != nil {
					return err
				}
				if a.json {
					return printJSON(c)
				}
				fmt.Println(printable(c.Name))
				return nil
			})
		},
	}
	pull.add(cmd.Flags())
	return cmd
}

func newPsCommand(a *app) *cobra.Command {
	var quiet, full bool
	var format string
	cmd := &cobra.Command{
		Use:   "ps",
		Short: "List containers and mounts with their state",
		Long: `List containers, and read-only mounts of images. States:

  created    not mounted
  starting   about to be mounted
  mounted    in the mount table and served
  detached   unmounted lazily (umount -l), but somebody still uses it
  dead       in the mount table without a server, and it could not be detached
  broken     its data is damaged: see plyfs check
  wanted     mounted with --restart, but has ended: see plyfs restore

The state is looked up, not remembered: it is true after a crash as well.`,
		Example: `  plyfs ps
  plyfs ps --json`,
		Args: exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				all, err := s.List(ctx, mountd.Empty{})
				if err != nil {
					return err
				}
				if a.json {
					return printJSON(list(all))
				}
				if format != "" {
					var rows []map[string]any
					for _, st := range all {
						r := psRow(st, full)
						rows = append(rows, map[string]any{
							"ID": r[0], "Names": r[1], "Image": r[2], "RunningFor": r[3], "CreatedAt": createdAt(st.Since), "State": st.State, "Status": r[4], "Target": r[5],
						})
					}
					return printFormat(format, psColumns, rows)
				}
				if quiet {
					for _, st := range all {
						if st.Container != nil {
							fmt.Println(idOf(st.Container.ID, full))
						}
					}
					return nil
				}
				t := newTable(os.Stdout, "CONTAINER ID", "NAME", "IMAGE", "CREATED", "STATE", "MOUNTED ON")
				for _, st := range all {
					t.row(psRow(st, full)...)
				}
				return t.flush()
			})
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print container IDs only")
	cmd.Flags().BoolVar(&full, "no-trunc", false, "do not shorten IDs")
	addFormat(cmd, &format)
	// Containers are never hidden here; the option is a habit from docker.
	cmd.Flags().BoolP("all", "a", true, "list all (always)")
	return cmd
}

var psColumns = []column{
	{"ID", "CONTAINER ID"},
	{"Names", "NAME"},
	{"Image", "IMAGE"},
	{"RunningFor", "CREATED"},
	{"CreatedAt", "CREATED AT"},
	{"State", "STATE"},
	{"Status", "STATUS"},
	{"Target", "MOUNTED ON"},
}

func psRow(st mountd.Status, full bool) []string {
	id, name, created := "-", "-", st.Since
	if st.Container != nil {
		id, name, created = idOf(st.Container.ID, full), st.Container.Name, st.Container.Created
	}
	image := st.ImageName
	if image == "" {
		image = idText(st.ImageID, full)
	}
	state := st.State
	if st.ReadOnly {
		state += " (ro)"
	}
	if st.Elsewhere {
		state += " (other namespace)"
	}
	if st.Restarts > 0 {
		state += fmt.Sprintf(" (restarted %s)", times(uint64(st.Restarts)))
	}
	if st.Refused > 0 {
		state += fmt.Sprintf(" (%d requests refused)", st.Refused)
	}
	if st.Reason != "" {
		state += " (" + printable(st.Reason) + ")"
	}
	return []string{id, name, image, ago(created), state, quoted(string(st.Target))}
}

func idOf(id string, full bool) string {
	if full {
		return id
	}
	return shortID(id)
}

func newRmCommand(a *app) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:               "rm NAME…",
		Short:             "Delete containers with all that was written in them",
		Example:           "  plyfs rm work",
		Args:              rangeArgs(1, -1, "one NAME or more"),
		ValidArgsFunction: completeEach(a.containers()),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				removed := []string{}
				err := eachArg(args, func(name string) error {
					if _, err := s.Remove(ctx, mountd.RemoveRequest{Name: name, Force: force}); err != nil {
						return unlessGone(force, err)
					}
					removed = append(removed, name)
					if !a.json {
						fmt.Println(printable(name))
					}
					return nil
				})
				if a.json {
					if jerr := printJSON(removed); jerr != nil {
						return jerr
					}
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "unmount first if mounted; a container that is not there is no error")
	return cmd
}

func newCommitCommand(a *app) *cobra.Command {
	var r mountd.CommitRequest
	var quiet bool
	cmd := &cobra.Command{
		Use:   "commit NAME [REF]",
		Short: "Make an image of a container's image and changes",
		Example: `  plyfs commit work localhost/mine:1
  plyfs commit -m 'add curl' -c 'CMD ["/bin/bash"]' work localhost/mine:2`,
		Args:              rangeArgs(1, 2, "NAME and an optional REF"),
		ValidArgsFunction: completeArgs(a.containers(), a.images()),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Container = args[0]
			if len(args) > 1 {
				r.Ref = args[1]
			}
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				p := newProgress(quiet)
				img, err := s.Commit(ctx, r, p.callback())
				p.finish()
				if err != nil {
					return err
				}
				return a.printImage(img)
			})
		},
	}
	f := cmd.Flags()
	f.StringVarP(&r.Author, "author", "a", "", "author for the history")
	f.StringVarP(&r.Message, "message", "m", "", "comment for the history")
	f.StringArrayVarP(&r.Changes, "change", "c", nil, "Dockerfile instruction to apply to the configuration, as docker does; may be repeated")
	f.BoolVarP(&quiet, "quiet", "q", false, "no progress bars")
	return cmd
}
