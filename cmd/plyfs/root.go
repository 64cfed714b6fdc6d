package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/mountd"
)

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "plyfs",
		Short:         "Mount container images without kernel overlayfs",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%v; see `%s --help`", err, cmd.CommandPath())
	})
	root.AddCommand(newOverlayCommand())
	return root
}

// usage marks an error of the command line.
func usage(err error) error { return fmt.Errorf("%w%w", silent{mountd.ErrUsage}, err) }

func usagef(format string, args ...any) error { return usage(fmt.Errorf(format, args...)) }

// silent keeps a sentinel without its text.
type silent struct{ error }

func (silent) Error() string   { return "" }
func (s silent) Unwrap() error { return s.error }

// exactArgs is cobra.ExactArgs with the names of what is missing.
func exactArgs(n int, names string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return usagef("%s needs %s; see `%s --help`", cmd.Name(), names, cmd.CommandPath())
		}
		return nil
	}
}
