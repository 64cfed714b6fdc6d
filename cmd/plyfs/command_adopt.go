package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
)

func newAdoptCommand(a *app) *cobra.Command {
	var r mountd.AdoptRequest
	var reference, cp, quiet bool
	cmd := &cobra.Command{
		Use:   "adopt [--reference|--copy] PATH",
		Short: "Take over the images and containers of another engine's store",
		Long: `Take over images, names and containers from the store of another engine, in which
nothing is changed: the root of Docker (/var/lib/docker; drivers overlay2, fuse-overlayfs,
aufs, overlay and vfs, also of Docker before 1.10), of podman and buildah
(/var/lib/containers/storage, ~/.local/share/containers/storage), of containerd, or the
directory of a registry of version 1. IDs of images and containers stay.

By reference, which is the default, content stays where it is, as long as it belongs to
root or the caller and nobody else can change it. With --copy it is unpacked into this
store and verified. A stopped container becomes one here, with a fresh writable layer on
top of what it has written.

What is damaged is reported and left out.`,
		Example: `  plyfs adopt --dry-run /var/lib/docker
  plyfs adopt /var/lib/docker
  podman unshare plyfs --root ~/.local/share/plyfs adopt --copy ~/.local/share/containers/storage`,
		Args:              exactArgs(1, "the PATH of a store"),
		ValidArgsFunction: completeArgs(completeDirs),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case reference && cp:
				return usagef("--reference and --copy exclude each other")
			case reference:
				r.Mode = layers.AdoptReference
			case cp:
				r.Mode = layers.AdoptCopy
			}
			r.Path = args[0]
			return a.local(cmd, func(ctx context.Context, s *mountd.Local) error {
				p := newProgress(quiet)
				rep, err := s.Adopt(ctx, r, p.callback())
				p.finish()
				if rep != nil && (err == nil || !a.json) {
					if perr := a.printAdopted(rep); err == nil {
						err = perr
					}
				}
				return err
			})
		},
	}
	f := cmd.Flags()
	f.BoolVar(&reference, "reference", false, "leave content where it is (default)")
	f.BoolVar(&cp, "copy", false, "unpack content into this store")
	f.BoolVar(&r.Verify, "verify", false, "read the content of referenced layers and compare it with its digests")
	f.BoolVarP(&r.DryRun, "dry-run", "n", false, "only say what would be taken over")
	f.BoolVarP(&quiet, "quiet", "q", false, "no progress bars")
	return cmd
}

// local runs f with the service in this process, also when a daemon serves the store:
// for what a daemon must not do for its clients.
func (a *app) local(cmd *cobra.Command, f func(ctx context.Context, s *mountd.Local) error) error {
	root, err := a.shellRoot(cmd)
	if err != nil {
		return err
	}
	s, err := mountd.OpenLocal(cmd.Context(), root, localOptions())
	if err != nil {
		return err
	}
	defer s.Close() // holds nothing that could be lost
	return f(cmd.Context(), s)
}

// printAdopted prints what was taken over, and on standard error what was not.
func (a *app) printAdopted(rep *layers.AdoptReport) error {
	if a.json {
		return printJSON(rep)
	}
	for _, w := range rep.Warnings {
		tell("warning: " + printable(w))
	}
	for _, s := range rep.Skipped {
		fmt.Fprintf(os.Stderr, "Skipped %s %s: %s\n", s.Kind, printable(s.Object), printable(s.Reason))
	}
	verb := "Adopted"
	if rep.DryRun {
		verb = "Would adopt"
	}
	for _, i := range rep.Images {
		name := i.ID.String()
		if name == "" {
			name = i.Source
		}
		line := fmt.Sprintf("%s image: %s", verb, name)
		if len(i.Refs) > 0 {
			line += " (" + printable(strings.Join(i.Refs, ", ")) + ")"
		}
		fmt.Println(line + already(i.Present))
	}
	for _, c := range rep.Containers {
		fmt.Printf("%s container: %s%s\n", verb, printable(c.Name), already(c.Present))
	}
	fmt.Printf("%s: %d images, %d containers; layers: %d referenced, %d copied, %d present; %d skipped\n",
		printable(rep.Source), len(rep.Images), len(rep.Containers), rep.Referenced, rep.Copied, rep.Present, len(rep.Skipped))
	return nil
}

func already(present bool) string {
	if present {
		return ", already here"
	}
	return ""
}
