package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"go.uber.org/zap/zapcore"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
)

// app holds the options that all commands share.
type app struct {
	root     string
	socket   string
	json     bool
	logLevel string
	cmd      *cobra.Command // the root command
}

func newRootCommand() *cobra.Command {
	a := &app{}
	root := &cobra.Command{
		Use:   "plyfs",
		Short: "Mount container images without kernel overlayfs",
		Long: `plyfs loads container images, mounts them through a FUSE union filesystem, and
makes new images of what was changed. It needs no daemon; if one runs for the same
store (plyfs daemon), commands use it.

Exit codes: 0 ok, 1 failure, 2 usage, 3 not found, 4 conflict or in use, 5 corrupt
data, 6 locked or timed out, 7 mount failure, 8 check found problems.`,
		Example: `  plyfs pull debian:12              (or: plyfs load -i debian.tar)
  plyfs mount debian:12 /mnt        (prints the name of the new container)
  plyfs diff NAME
  plyfs commit NAME debian:mine
  plyfs umount /mnt`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       versionString(),
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			hint := ""
			if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
				hint = fmt.Sprintf(" (did you mean %s?)", strings.Join(s, " or "))
			}
			return usagef("unknown command %q%s; see `plyfs --help`", args[0], hint)
		},
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if a.logLevel == "" {
				return nil
			}
			if _, err := zapcore.ParseLevel(a.logLevel); err != nil {
				return usagef("--log-level %q: expected debug, info, warn or error", a.logLevel)
			}
			setLogLevel(a.logLevel)
			return nil
		},
	}
	a.cmd = root
	root.SuggestionsMinimumDistance = 2
	root.SetVersionTemplate("plyfs {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%v; see `%s --help`", err, cmd.CommandPath())
	})
	f := root.PersistentFlags()
	f.StringVar(&a.root, "root", "", "directory of the store (PLYFS_ROOT; default /var/lib/plyfs, or $XDG_DATA_HOME/plyfs for users)")
	f.StringVar(&a.socket, "socket", "", "socket of a daemon, or none to use no daemon (PLYFS_SOCKET; default: the daemon of the store, if one runs)")
	f.BoolVar(&a.json, "json", false, "print JSON")
	f.StringVar(&a.logLevel, "log-level", "", "debug, info, warn or error, on standard error (PLYFS_LOG_LEVEL; default warn)")

	root.AddGroup(
		&cobra.Group{ID: "images", Title: "Images:"},
		&cobra.Group{ID: "mounts", Title: "Containers and mounts:"},
		&cobra.Group{ID: "store", Title: "Store and service:"},
	)
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("images", newPullCommand(a), newPushCommand(a), newLoadCommand(a), newSaveCommand(a), newImportCommand(a), newImagesCommand(a), newTagCommand(a),
		newRmiCommand(a), newHistoryCommand(a), newInspectCommand(a), newLayersCommand(a), newBuildCacheCommand(a))
	add("mounts", newMountCommand(a), newUmountCommand(a), newRestoreCommand(a), newCreateCommand(a), newPsCommand(a), newStatsCommand(a), newTopCommand(a), newExplainCommand(a), newTraceCommand(a), newInjectCommand(a), newEventsCommand(a), newDiffCommand(a),
		newCommitCommand(a), newRmCommand(a), newExportCommand(a), newShellCommand(a), newBundleCommand(a), newOverlayCommand())
	add("store", newAdoptCommand(a), newCheckCommand(a), newGCCommand(a), newPruneCommand(a), newDfCommand(a), newStoreCommand(a), newDaemonCommand(a), newSnapshotterCommand(), newDoctorCommand(a), newVersionCommand(a))
	add("store", newCompletionCommand())
	root.AddCommand(newGenDocsCommand())
	addCompletions(root)
	return root
}

// storeRoot returns the store, and whether the user named it.
func (a *app) storeRoot() (string, bool, error) {
	if a.root != "" {
		return a.root, true, nil
	}
	if d := os.Getenv("PLYFS_ROOT"); d != "" {
		return d, true, nil
	}
	d, err := mountd.DefaultRoot()
	return d, false, err
}

func (a *app) socketPath() string {
	if a.socket != "" {
		return a.socket
	}
	return os.Getenv("PLYFS_SOCKET")
}

// open returns the service: a daemon or this process.
func (a *app) open(ctx context.Context) (mountd.Service, error) { return a.openAs(ctx, localOptions()) }

func (a *app) openAs(ctx context.Context, o mountd.LocalOptions) (mountd.Service, error) {
	root, given, err := a.storeRoot()
	if err != nil {
		return nil, err
	}
	if o.MaxMounts, err = mountd.MaxMounts(); err != nil {
		return nil, err
	}
	return mountd.OpenService(ctx, mountd.OpenOptions{Root: root, RootGiven: given, Socket: a.socketPath(), Local: o})
}

// localOptions are those of a service in this process.
func localOptions() mountd.LocalOptions {
	return mountd.LocalOptions{
		Logger: newCommandLogger(), Version: versionString(), OnLockWait: tell,
		AnyFileSystem: mountd.AnyFileSystem(), Background: true,
	}
}

// with runs f with the service.
func (a *app) with(cmd *cobra.Command, f func(ctx context.Context, s mountd.Service) error) error {
	s, err := a.open(cmd.Context())
	if err != nil {
		return err
	}
	defer s.Close() // holds nothing that could be lost
	return f(cmd.Context(), s)
}

// withDamaged is with for commands that work also on a store whose database is damaged.
func (a *app) withDamaged(cmd *cobra.Command, f func(ctx context.Context, s mountd.Service) error) error {
	o := localOptions()
	o.Damaged = true
	s, err := a.openAs(cmd.Context(), o)
	if err != nil {
		return err
	}
	defer s.Close() // holds nothing that could be lost
	return f(cmd.Context(), s)
}

// usage marks an error of the command line.
func usage(err error) error { return usageError{err} }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

type usageError struct{ error }

func (e usageError) Unwrap() []error { return []error{mountd.ErrUsage, e.error} }

// exactArgs is cobra.ExactArgs with the names of what is missing.
func exactArgs(n int, names string) cobra.PositionalArgs { return rangeArgs(n, n, names) }

// rangeArgs wants min to max arguments; max < 0 is any number.
func rangeArgs(min, max int, names string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < min || max >= 0 && len(args) > max {
			if names == "" {
				names = "no arguments"
			}
			return usagef("%s takes %s; see `%s --help`", cmd.Name(), names, cmd.CommandPath())
		}
		return nil
	}
}

// unlessGone makes a message of the error that there is nothing to remove, if that was
// forced: scripts clean up so, with docker too.
func unlessGone(force bool, err error) error {
	if force && errors.Is(err, layers.ErrNotFound) {
		tell(sentence(err))
		return nil
	}
	return err
}

// eachArg runs f for all arguments, goes on after errors, and returns the
// first one; the others are printed.
func eachArg(args []string, f func(string) error) error {
	var first error
	for _, arg := range args {
		err := f(arg)
		if errors.Is(err, context.Canceled) { // the rest would say the same
			return err
		}
		if err != nil && len(args) > 1 {
			tell(sentence(err)) // in order, and before what may take long
			err = statusError{status: exitCode(err)}
		}
		if first == nil {
			first = err
		}
	}
	return first
}
