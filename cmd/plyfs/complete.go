package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
	"github.com/plyfs/plyfs/mountd/holder"
)

// What a shell offers when TAB is pressed: names of the store, mount points,
// words. Whatever goes wrong means that nothing is offered: a message in the
// middle of a command line helps nobody. No store is made for it.

// completionLimit is how long a key press may wait for a store that is locked.
const completionLimit = time.Second

// listing returns names of a store, each with a description (see
// [cobra.CompletionWithDesc]).
type listing func(ctx context.Context, s mountd.Service) ([]cobra.Completion, error)

// completeArgs completes the first argument by the first of kinds, and so on.
// Where it is nil, as for a name that is yet to be made, nothing is offered.
func completeArgs(kinds ...cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) >= len(kinds) || kinds[len(args)] == nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return kinds[len(args)](cmd, args, word)
	}
}

// completeEach completes every argument by kind, and leaves out those that
// are there already.
func completeEach(kind cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
		all, directive := kind(cmd, args, word)
		return slices.DeleteFunc(all, func(c cobra.Completion) bool { return slices.Contains(args, nameOf(c)) }), directive
	}
}

// nameOf is a completion without its description.
func nameOf(c cobra.Completion) string {
	name, _, _ := strings.Cut(c, "\t")
	return name
}

func completeFiles(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveDefault
}

func completeDirs(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveFilterDirs
}

func completeWords(words ...string) cobra.CompletionFunc {
	return cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)
}

// flagValues completes the values of flags. A flag means the same in all
// commands that have it; those that are not here take free text.
var flagValues = map[string]cobra.CompletionFunc{
	"root": completeDirs, "socket": completeFiles, "log-level": completeWords("debug", "info", "warn", "error"),
	"input": completeFiles, "output": completeFiles, "format": completeWords(layers.FormatDocker, layers.FormatOldDocker, layers.FormatOCI, formatLayout),
	"pull": completeWords("never", "missing", "always"),
	"io":   completeWords("auto", "passthrough", "noopen", "cache"),
}

// addCompletions says how the flags of all commands are completed. Arguments
// are the commands' own: see their ValidArgsFunction.
func addCompletions(root *cobra.Command) {
	root.CompletionOptions.DisableDefaultCmd = true // ours is shorter
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	for _, cmd := range append(root.Commands(), root) {
		cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if complete := flagValues[f.Name]; complete != nil {
				_ = cmd.RegisterFlagCompletionFunc(f.Name, complete) // fails for unknown flags, and if done twice
			}
		})
	}
}

// fromStore asks the service.
func (a *app) fromStore(lists ...listing) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		const directive = cobra.ShellCompDirectiveNoFileComp
		ctx, cancel := context.WithTimeout(cmd.Context(), completionLimit)
		defer cancel()
		root, given, err := a.storeRoot()
		if err != nil {
			return nil, directive
		}
		s, err := mountd.OpenService(ctx, mountd.OpenOptions{Root: root, RootGiven: given, Socket: a.socketPath(), MustExist: true})
		if err != nil {
			return nil, directive
		}
		defer s.Close() // holds nothing that could be lost
		var all []cobra.Completion
		for _, list := range lists {
			names, err := list(ctx, s)
			if err != nil {
				return nil, directive
			}
			all = append(all, names...)
		}
		return all, directive
	}
}

func listImages(ctx context.Context, s mountd.Service) ([]cobra.Completion, error) {
	images, err := s.Images(ctx, mountd.ImagesRequest{})
	var all []cobra.Completion
	for _, i := range images {
		name := i.Repository + ":" + i.Tag
		if orNone(i.Tag) == orNone("") {
			name = shortID(i.ID.String())
		}
		all = append(all, cobra.CompletionWithDesc(name, "image, "+size(i.Size)))
	}
	return all, err
}

func listContainers(ctx context.Context, s mountd.Service) ([]cobra.Completion, error) {
	return listStates(ctx, s, func(mountd.Status) bool { return true })
}

func listMounted(ctx context.Context, s mountd.Service) ([]cobra.Completion, error) {
	return listStates(ctx, s, func(st mountd.Status) bool {
		return st.State == mountd.StateMounted || st.State == mountd.StateWanted
	})
}

func listStates(ctx context.Context, s mountd.Service, want func(mountd.Status) bool) ([]cobra.Completion, error) {
	states, err := s.List(ctx, mountd.Empty{})
	var all []cobra.Completion
	for _, st := range states {
		if st.Container != nil && want(st) {
			all = append(all, cobra.CompletionWithDesc(st.Container.Name, st.State+", of "+printable(st.ImageName)))
		}
	}
	return all, err
}

func (a *app) images() cobra.CompletionFunc     { return a.fromStore(listImages) }
func (a *app) containers() cobra.CompletionFunc { return a.fromStore(listContainers) }
func (a *app) imagesAndContainers() cobra.CompletionFunc {
	return a.fromStore(listContainers, listImages)
}

// mounted completes what can be unmounted: containers and mount points. The
// latter need no store, like the raw mounts among them.
func (a *app) mounted() cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
		all, directive := a.fromStore(listMounted)(cmd, args, word)
		table, err := holder.MountTable(0)
		if err != nil {
			return all, directive
		}
		for _, m := range table {
			ours := m.FSType == "fuse.plyfs" || m.FSType == "fuse.fuse-overlayfs"
			// One line a name is all that the shells understand.
			if ours && isPrintable(m.Mountpoint) {
				all = append(all, cobra.CompletionWithDesc(m.Mountpoint, "mount point"))
			}
		}
		return all, directive
	}
}
