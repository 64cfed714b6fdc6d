package main

import (
	"context"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/plyfs/plyfs/mountd"
	"github.com/plyfs/plyfs/mountd/sandbox"
	"github.com/plyfs/plyfs/unionfs"
)

// processFlags are what shell and bundle let a user change of an image's process.
type processFlags struct {
	process         sandbox.ProcessOptions
	env             []string
	entrypoint      string
	hostname        string
	volumes         []string
	capAdd, capDrop []string
	noNewPrivileges bool
}

func (p *processFlags) add(f *pflag.FlagSet) {
	f.StringVarP(&p.process.User, "user", "u", "", "user, or user:group; names are those of the image (default: the image's)")
	f.StringVarP(&p.process.Cwd, "workdir", "w", "", "working directory (default: the image's)")
	f.StringArrayVarP(&p.env, "env", "e", nil, "NAME=VALUE, or NAME to pass on the caller's; may be repeated")
	f.StringVar(&p.entrypoint, "entrypoint", "", "program in place of the image's entrypoint and command; empty: none")
	f.StringVar(&p.hostname, "hostname", "", "host name (default: the ID of the container)")
	f.StringArrayVarP(&p.volumes, "volume", "v", nil, "HOST:INSIDE[:ro], bind a directory or file; may be repeated")
	f.StringSliceVar(&p.capAdd, "cap-add", nil, "give a capability, or ALL")
	f.StringSliceVar(&p.capDrop, "cap-drop", nil, "take a capability away, or ALL")
	f.BoolVar(&p.noNewPrivileges, "no-new-privileges", false, "set-user-id programs give nobody anything (su, sudo and apt's sandbox then fail)")
}

// parsed is what the flags say.
type parsed struct {
	process sandbox.ProcessOptions
	volumes []sandbox.Volume
	caps    sandbox.Caps
}

func (p *processFlags) parse(f *pflag.FlagSet, command []string) (out parsed, err error) {
	out.process = p.process
	out.process.Command = command
	if f.Changed("entrypoint") {
		out.process.Entrypoint = &p.entrypoint
	}
	for _, e := range p.env {
		out.process.Env = append(out.process.Env, passOn(e))
	}
	dir, err := os.Getwd()
	if err != nil {
		return out, err
	}
	for _, text := range p.volumes {
		v, err := sandbox.ParseVolume(text, dir)
		if err != nil {
			return out, usage(err)
		}
		out.volumes = append(out.volumes, v)
	}
	if out.caps, err = sandbox.ParseCaps(p.capAdd, p.capDrop); err != nil {
		return out, usage(err)
	}
	return out, nil
}

// passOn completes NAME by the caller's value, if there is one.
func passOn(e string) string {
	if value, ok := os.LookupEnv(e); ok {
		return e + "=" + value
	}
	return e
}

func newShellCommand(a *app) *cobra.Command {
	var p processFlags
	var r mountd.ShellRequest
	var pull pullPolicy
	cmd := &cobra.Command{
		Use:   "shell [flags] IMAGE|NAME [[--] CMD [ARG…]]",
		Short: "Run a program in an image or container",
		Long: `Run a program in a container, or in an image with a fresh container, which is kept
until plyfs rm (or, with --rm, until the program ends); its name is printed on standard
error. User, environment, working directory, entrypoint and command are those of the
image, combined with CMD as docker run does it. An image without any gets a shell.

The program sees the tree of the container, its own processes, and a /dev, /proc and
/sys with little in them. The network is that of this machine, and no limits are set:
this is no container engine. See docs/shell.md for what a hostile image can do.

Root keeps the ids of the machine. A user is root inside; other users exist there if
/etc/subuid and /etc/subgid give the user ids for them (plyfs doctor tells).

The exit code is that of the program, 128+N if signal N has ended it; 125 plyfs itself
failed, 126 the program cannot be executed, 127 it was not found.`,
		Example: `  plyfs shell debian:12
  plyfs shell debian:12 -- apt-get update
  plyfs shell --name work debian:12 -- bash -c 'apt-get update && apt-get -y install hello'
  plyfs shell -u www-data -w /srv work
  plyfs commit work debian:hello`,
		Args:              cobra.ArbitraryArgs, // counted below: another exit code
		ValidArgsFunction: completeArgs(a.imagesAndContainers()),
		RunE: func(cmd *cobra.Command, args []string) error {
			status, err := a.shell(cmd, args, &p, pull, r)
			if status == 0 && err == nil {
				return nil
			}
			return statusError{status, err}
		},
	}
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return statusError{sandbox.ExitOwn, usagef("%v; see `%s --help`", err, cmd.CommandPath())}
	})
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows the image belongs to the program
	f.StringVar(&r.Mount.Name, "name", "", "name of the new container (default: generated)")
	f.BoolVar(&r.Mount.AutoRemove, "rm", false, "delete the new container when the program ends")
	f.BoolVar(&r.Mount.ReadOnly, "ro", false, "nothing can be written, and an image needs no container")
	pull.add(f)
	p.add(f)
	f.TextVar(&r.Mount.IO, "io", unionfs.IOAuto, "how file data is read and written: auto, passthrough, noopen or cache")
	f.BoolVar(&r.Mount.Volatile, "volatile", false, "never sync: fast, and lost with the machine")
	f.BoolVar(&r.OneID, "one-id", false, "use no subordinate ids, though there are some")
	f.BoolVarP(&r.Quiet, "quiet", "q", false, "print nothing but errors")
	return cmd
}

// shell returns the exit status of the program that it has run.
func (a *app) shell(cmd *cobra.Command, args []string, p *processFlags, pull pullPolicy, r mountd.ShellRequest) (int, error) {
	if len(args) == 0 {
		return sandbox.ExitOwn, usagef("shell takes IMAGE or NAME, and a program; see `%s --help`", cmd.CommandPath())
	}
	command := args[1:]
	if len(command) > 0 && command[0] == "--" {
		command = command[1:]
	}
	out, err := p.parse(cmd.Flags(), command)
	if err != nil {
		return sandbox.ExitOwn, err
	}
	if r.Root, err = a.shellRoot(cmd); err != nil {
		return sandbox.ExitOwn, err
	}
	r.Mount.Source = args[0]
	if pull != pullNever {
		err := a.with(cmd, func(ctx context.Context, s mountd.Service) error { return pull.apply(ctx, s, args[0], r.Quiet) })
		if err != nil {
			return sandbox.ExitOwn, err
		}
	}
	r.Process, r.Volumes, r.Caps = out.process, out.volumes, out.caps
	r.Hostname, r.NoNewPrivileges = p.hostname, p.noNewPrivileges
	return mountd.Shell(r, newCommandLogger())
}

// shellRoot returns the store: the mount is made by processes of ours, also when
// a daemon serves it.
func (a *app) shellRoot(cmd *cobra.Command) (string, error) {
	root, given, err := a.storeRoot()
	if err != nil || given || a.socketPath() == "" || a.socketPath() == mountd.NoSocket {
		return root, err
	}
	if d := mountd.FindDaemon(cmd.Context(), mountd.OpenOptions{Root: root, Socket: a.socketPath()}); d != nil {
		return d.Root, nil
	}
	return "", usagef("no daemon answers on %q: give the store with --root", a.socketPath())
}

// shellStatus is the end of one of the processes of a shell.
func shellStatus(status int, err error) int {
	if err != nil {
		tell(sentence(err))
	}
	return status
}
