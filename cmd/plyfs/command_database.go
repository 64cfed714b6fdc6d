package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
)

func newStoreCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "store",
		Short: "Look after the database of the store",
		Long: `Look after the database of the store. A copy of it is kept by itself once a day while
the store changes, and before a newer version changes its form; there are three.`,
		Example: `  plyfs store rebuild
  plyfs store compact`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("unknown command %q; see `%s --help`", args[0], cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newRebuildCommand(a), newCompactCommand(a), newCopyCommand(a))
	return cmd
}

func newRebuildCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "rebuild",
		Short: "Make the database anew from what lies beside it",
		Long: `Make the database anew: from the records that lie beside layers, images and containers,
from what can be read of the old database, and from the newest copy. Nothing on the disk
is removed, and the old database is kept. plyfs check --repair does the same where the
database is damaged, and then looks at everything else.`,
		Example: "  plyfs store rebuild",
		Args:    exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withDamaged(cmd, func(ctx context.Context, s mountd.Service) error {
				rep, err := s.Rebuild(ctx, mountd.Empty{})
				if err != nil {
					return err
				}
				if a.json {
					return printJSON(rep)
				}
				printRebuild(rep)
				return nil
			})
		},
	}
}

func printRebuild(rep layers.RebuildReport) {
	from := "nothing"
	if len(rep.Sources) > 0 {
		from = strings.Join(rep.Sources, ", ")
	}
	fmt.Printf("%d images, %d layers, %d containers from %s\n", rep.Images, rep.Layers, rep.Containers, printable(from))
	for _, l := range []struct {
		text string
		list []string
	}{
		{"Layers are missing, load it again", rep.Incomplete},
		{"Known by a copy of the database only, may have been removed", rep.Doubtful},
		{"Not used", rep.Unused},
	} {
		for _, x := range l.list {
			fmt.Printf("%s: %s\n", l.text, printable(x))
		}
	}
	if rep.Kept != "" {
		fmt.Printf("The old database is kept as %s\n", quoted(rep.Kept))
	}
}

func newCompactCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "compact",
		Short:   "Give back the space that the database does not use",
		Example: "  plyfs store compact",
		Args:    exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				r, err := s.Compact(ctx, mountd.Empty{})
				if err != nil {
					return err
				}
				if a.json {
					return printJSON(r)
				}
				fmt.Printf("%s before, %s after\n", size(r.Before), size(r.After))
				return nil
			})
		},
	}
}

func newCopyCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "copy",
		Short:   "Keep a copy of the database now",
		Example: "  plyfs store copy",
		Args:    exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				r, err := s.CopyDatabase(ctx, mountd.Empty{})
				if err != nil {
					return err
				}
				if a.json {
					return printJSON(r)
				}
				fmt.Println(quoted(string(r.Path)))
				return nil
			})
		},
	}
}
