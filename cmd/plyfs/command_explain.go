package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
)

func newExplainCommand(a *app) *cobra.Command {
	var r mountd.ExplainRequest
	var opts []string
	cmd := &cobra.Command{
		Use:   "explain [--tree] [IMAGE|NAME] PATH",
		Short: "Say which layer a file comes from, or what hides it",
		Long: `Say which layer serves a path, what every other layer has there, and by which rule it is
hidden. The first line is the answer; below it, the topmost layer first:

  →   serves it               =   has its data (the attributes are above: metacopy)
  +   is merged into it       x   deletes it in all layers below (whiteout)
  (nothing)  is hidden, with the reason

With one argument, PATH is one of this machine and lies in a mount of plyfs. With two, it
is a path in an image or a container, mounted or not. With -o, it is a path in the union
of these directories, as plyfs overlay would mount it.

The last component is not followed if it is a symbolic link; links before it are, inside
the image. With --tree, each name below a directory is listed with the layer that serves
it ("upper + 2" is a directory that two more layers have a part of); those that are
deleted (x) or hidden otherwise (-) too.`,
		Example: `  plyfs explain /mnt/etc/hosts
  plyfs explain debian:12 /etc/os-release
  plyfs explain work /etc/hosts
  plyfs explain --tree --depth 1 work /etc
  plyfs explain -o lowerdir=/layers/2:/layers/1 /etc/hosts`,
		Args:              rangeArgs(1, 2, "PATH in a mount, or IMAGE or NAME and a PATH in it"),
		ValidArgsFunction: completeExplain(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			if r.Depth < 0 || r.Limit < 0 {
				return usagef("--depth and --limit cannot be negative")
			}
			if !r.Tree && (cmd.Flags().Changed("depth") || cmd.Flags().Changed("limit")) {
				return usagef("--depth and --limit go with --tree")
			}
			x, err := a.explain(cmd, r, opts, args)
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(x)
			}
			return printExplanation(x)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&r.Tree, "tree", false, "list all names below a directory")
	f.IntVar(&r.Depth, "depth", 0, "with --tree: levels below the directory; 0: all")
	f.IntVar(&r.Limit, "limit", 1000, "with --tree: lines at most; 0: as many as possible")
	f.StringArrayVarP(&opts, "option", "o", nil, "mount options that describe the layers, as for plyfs overlay; may be repeated")
	return cmd
}

// completeExplain completes a name or a path of this machine.
func completeExplain(a *app) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		all, _ := a.imagesAndContainers()(cmd, args, word)
		return all, cobra.ShellCompDirectiveDefault
	}
}

// explain asks whoever knows.
func (a *app) explain(cmd *cobra.Command, r mountd.ExplainRequest, opts, args []string) (x mountd.Explanation, err error) {
	ctx := cmd.Context()
	last := args[len(args)-1]
	switch {
	case len(opts) > 0:
		if len(args) != 1 {
			return x, usagef("-o names the layers: give only the PATH in them")
		}
		o, err := mountd.ParseRawOptions(mountd.OverlayStyle, opts)
		if err != nil {
			return x, usage(err)
		}
		for _, w := range o.Warnings {
			tell(w)
		}
		r.Path = mountd.Path(last)
		return mountd.ExplainOptions(ctx, o, r)
	case len(args) == 2:
		r.Name, r.Path = args[0], mountd.Path(last)
		err = a.with(cmd, func(ctx context.Context, s mountd.Service) (e error) {
			x, e = s.Explain(ctx, r)
			return e
		})
		return x, err
	}
	at, err := mountd.FindLive(last)
	if err != nil {
		return x, err
	}
	where := at.Request()
	r.Target, r.Major, r.Minor, r.Path = where.Target, where.Major, where.Minor, where.Path
	x, err = a.explainMount(ctx, r)
	if errors.Is(err, layers.ErrNotFound) { // no mount of the store, or there is no store
		x, err = mountd.ExplainRaw(ctx, at, r)
	}
	if err == nil && !r.Tree {
		x.Live = at.Look()
	}
	return x, err
}

// explainMount asks the store about one of its mounts. It makes no store.
func (a *app) explainMount(ctx context.Context, r mountd.ExplainRequest) (x mountd.Explanation, err error) {
	root, given, err := a.storeRoot()
	if err != nil {
		return x, err
	}
	s, err := mountd.OpenService(ctx, mountd.OpenOptions{
		Root: root, RootGiven: given, Socket: a.socketPath(), MustExist: true, Local: localOptions(),
	})
	if err != nil {
		return x, err
	}
	defer s.Close() // holds nothing that could be lost
	return s.Explain(ctx, r)
}
