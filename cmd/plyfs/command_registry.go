package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/layers/registry"
	"github.com/plyfs/plyfs/mountd"
)

func newPullCommand(a *app) *cobra.Command {
	var p puller
	cmd := &cobra.Command{
		Use:   "pull [flags] NAME[:TAG|@DIGEST]",
		Short: "Fetch an image from a registry",
		Long: `Fetch an image from a registry. Layers that the store has are not fetched again, and
a download that was cut off goes on where it ended. Everything is checked against the
digests of the manifest; whether somebody has signed that is not checked.

A name without a host is one of docker.io, a name without a tag means latest. Mirrors,
insecure registries, certificates and credentials come from the files of docker and
podman; see docs/registries.md.`,
		Example: `  plyfs pull debian:12
  plyfs pull --keep-blobs registry.example/team/app@sha256:…
  plyfs pull --plain-http 127.0.0.1:5000/app`,
		Args:              exactArgs(1, "one NAME"),
		ValidArgsFunction: completeArgs(a.images()),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				out := io.Writer(os.Stdout)
				if a.json || p.quiet {
					out = io.Discard
				}
				res, err := p.pull(ctx, s, args[0], out)
				switch {
				case err != nil:
					return err
				case a.json:
					return printJSON(res)
				}
				fmt.Println(printable(res.Canonical))
				return nil
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&p.platform, "platform", "", "os/arch[/variant] to take from an index (default: this machine)")
	f.BoolVar(&p.keepBlobs, "keep-blobs", false, "keep the compressed layers too, so that a push gives the same digest")
	f.BoolVar(&p.plainHTTP, "plain-http", false, "speak http with a registry on this machine")
	f.BoolVarP(&p.quiet, "quiet", "q", false, "print nothing but the full name")
	return cmd
}

// puller is how an image is to be pulled.
type puller struct {
	platform                    string
	keepBlobs, plainHTTP, quiet bool
}

// pull fetches an image, and tells out what docker pull would tell.
func (p puller) pull(ctx context.Context, s mountd.Service, name string, out io.Writer) (layers.PullResult, error) {
	ref, acc, err := discover(ctx, name, registry.DiscoverOptions{PlainHTTP: p.plainHTTP})
	if err != nil {
		return layers.PullResult{}, err
	}
	if ref.Implied {
		fmt.Fprintln(out, "Using default tag: latest")
	}
	fmt.Fprintf(out, "%s: Pulling from %s\n", ref.Version(), ref.Path())
	pr := newProgress(p.quiet)
	res, err := s.Pull(ctx, mountd.PullRequest{Name: name, Access: acc, Platform: p.platform, KeepBlobs: p.keepBlobs}, pr.orLines(out))
	pr.finish()
	if err != nil {
		return res, err
	}
	for _, n := range res.Notes {
		tell(n)
	}
	fmt.Fprintf(out, "Digest: %s\n", res.Digest)
	if res.Updated {
		fmt.Fprintf(out, "Status: Downloaded newer image for %s\n", printable(res.Ref))
	} else {
		fmt.Fprintf(out, "Status: Image is up to date for %s\n", printable(res.Ref))
	}
	return res, nil
}

// discover reads what this user has configured for a registry. A daemon is told the
// result, and reads no file for it.
func discover(ctx context.Context, name string, o registry.DiscoverOptions) (registry.Reference, registry.Access, error) {
	ref, err := registry.Parse(name)
	if err != nil {
		return ref, registry.Access{}, usage(err)
	}
	acc, err := registry.Discover(ctx, ref, registry.SystemEnv(), o)
	if errors.Is(err, registry.ErrInvalid) {
		err = usage(err)
	}
	for _, n := range acc.Notes {
		tell(n)
	}
	acc.Notes = nil
	return ref, acc, err
}

// orLines is the callback for bars, or where there are none, for one line a layer
// when it is done.
func (p *progress) orLines(out io.Writer) layers.ProgressFunc {
	if p.p != nil {
		return p.update
	}
	if out == io.Discard {
		return nil
	}
	return func(u layers.Progress) {
		switch u.Action {
		case "Downloading", "Preparing", "Pushing", "verifying":
			return // it has failed, or something follows
		}
		if u.Done {
			fmt.Fprintf(out, "%s: %s\n", printable(u.ID), printable(u.Action))
		}
	}
}

func newPushCommand(a *app) *cobra.Command {
	var r mountd.PushRequest
	var plainHTTP, quiet bool
	cmd := &cobra.Command{
		Use:   "push [flags] NAME[:TAG] | IMAGE NAME[:TAG]",
		Short: "Give an image to a registry",
		Long: `Give an image to a registry, by the name it has, or IMAGE by another name. Only what
the registry lacks is sent; what another repository of it has, as far as the store knows,
it takes from there.

The digest is that of the pull if the registry has all the layers, or they were kept
(pull --keep-blobs). Otherwise layers are compressed anew, always to the same bytes, and
the manifest is a new one; this is said.`,
		Example: `  plyfs push registry.example/team/app:1
  plyfs push debian:mine registry.example/debian:mine`,
		Args:              rangeArgs(1, 2, "NAME, or IMAGE and NAME"),
		ValidArgsFunction: completeArgs(a.images(), a.images()),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Name = args[len(args)-1]
			if len(args) == 2 {
				r.Image = args[0]
			}
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				ref, acc, err := discover(ctx, r.Name, registry.DiscoverOptions{Push: true, PlainHTTP: plainHTTP})
				if err != nil {
					return err
				}
				r.Access = acc
				out := io.Writer(os.Stdout)
				if a.json || quiet {
					out = io.Discard
				}
				if ref.Implied {
					fmt.Fprintln(out, "Using default tag: latest")
				}
				fmt.Fprintf(out, "The push refers to repository [%s]\n", ref.Name())
				pr := newProgress(quiet)
				res, err := s.Push(ctx, r, pr.orLines(out))
				pr.finish()
				if err != nil {
					return err
				}
				for _, n := range res.Notes {
					tell(n)
				}
				switch {
				case a.json:
					return printJSON(res)
				case quiet:
					fmt.Println(printable(ref.String()))
					return nil
				}
				fmt.Printf("%s: digest: %s size: %d\n", ref.Tag, res.Digest, res.Size)
				return nil
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&r.Format, "format", "", "oci (default) or docker, of a manifest that has to be made")
	f.BoolVar(&plainHTTP, "plain-http", false, "speak http with a registry on this machine")
	f.BoolVarP(&quiet, "quiet", "q", false, "print nothing but the full name")
	return cmd
}

// pullPolicy says when a command that uses an image fetches it first. The default is
// never: a typing error must not ask the internet for the name of a container, nor
// wait for it where there is none.
type pullPolicy string

const (
	pullNever   pullPolicy = "never"
	pullMissing pullPolicy = "missing"
	pullAlways  pullPolicy = "always"
)

func (p *pullPolicy) add(f *pflag.FlagSet) {
	*p = pullNever
	f.Var(p, "pull", "never, missing or always: whether to pull the image first")
}

// String implements pflag.Value.
func (p *pullPolicy) String() string { return string(*p) }

// Type implements pflag.Value.
func (*pullPolicy) Type() string { return "string" }

// Set implements pflag.Value.
func (p *pullPolicy) Set(s string) error {
	switch v := pullPolicy(s); v {
	case pullNever, pullMissing, pullAlways:
		*p = v
		return nil
	}
	return errors.New("expected never, missing or always")
}

// apply pulls the image of a name as the policy wants it. A container has its image,
// and an ID means nothing to a registry. Status goes to standard error, unless quiet.
func (p pullPolicy) apply(ctx context.Context, s mountd.Service, name string, quiet bool) error {
	if p == pullNever {
		return nil
	}
	in, err := s.Inspect(ctx, mountd.NameRequest{Name: name})
	switch {
	case err != nil && !errors.Is(err, layers.ErrNotFound):
		return err
	case err == nil && (p == pullMissing || in.Container != nil):
		return nil
	}
	ref, perr := registry.Parse(name)
	if err == nil && (perr != nil || !hasRef(in.Image, ref)) {
		return nil // it was given by its ID
	}
	if perr != nil {
		return err
	}
	out := io.Writer(os.Stderr)
	if quiet {
		out = io.Discard
	}
	_, err = puller{quiet: quiet}.pull(ctx, s, name, out)
	return err
}

func hasRef(img *layers.ImageDetail, ref registry.Reference) bool {
	for _, r := range img.Refs {
		if r == ref.Familiar() {
			return true
		}
	}
	return false
}
