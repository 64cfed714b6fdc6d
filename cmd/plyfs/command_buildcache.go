package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
)

// stepMax bounds the file that describes a step.
const stepMax = 8 << 20

func newBuildCacheCommand(a *app) *cobra.Command {
	var step layers.BuildStep
	var config, record string
	var noCache, digest bool
	cmd := &cobra.Command{
		Use:   "buildcache -c FILE | --digest PATH…",
		Short: "Find the image that a step of a build has made before",
		Long: `For those who write a builder. A step is a parent image and the configuration of the
container that it runs in, as JSON (Cmd is the command). Its image is printed if the same
step was recorded for the same parent; otherwise the exit code is 3: run the step in a
container, commit it, and record the image. --digest prints what goes into the command
of a step that copies files: names, modes and contents count, times do not.`,
		Example: `  plyfs buildcache -c step.json --parent debian:12
  plyfs buildcache -c step.json --parent debian:12 --record sha256:…
  plyfs buildcache --digest src/`,
		Args:              rangeArgs(0, -1, ""),
		ValidArgsFunction: completeEach(completeFiles),
		RunE: func(cmd *cobra.Command, args []string) error {
			if digest {
				return a.printCopyDigest(args)
			}
			if len(args) > 0 || config == "" {
				return usagef("a step needs -c FILE and no arguments; files need --digest")
			}
			raw, err := readStep(config)
			if err != nil {
				return err
			}
			step.Config = raw
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				if record != "" {
					_, err := s.RecordBuild(ctx, mountd.RecordBuildRequest{Step: step, Image: record})
					return err
				}
				if noCache {
					return notFound{errors.New("build step: not looked for (--no-cache)")}
				}
				img, err := s.FindBuild(ctx, step)
				if err != nil {
					return err
				}
				return a.printImage(img)
			})
		},
	}
	f := cmd.Flags()
	f.StringVarP(&config, "config", "c", "", "file with the configuration of the step's container, or -")
	f.StringVar(&step.Parent, "parent", "", "image that the step begins with (default: nothing)")
	f.StringVar(&step.Platform, "platform", "", "os/arch[/variant] of the build (default: this machine)")
	f.StringArrayVar(&step.From, "cache-from", nil, "image whose history may hold the step; may be repeated")
	f.StringVar(&record, "record", "", "image that the step has made")
	f.BoolVar(&noCache, "no-cache", false, "find nothing")
	f.BoolVar(&digest, "digest", false, "print the digest of what is to be copied")
	for _, name := range []string{"parent", "cache-from", "record"} {
		_ = cmd.RegisterFlagCompletionFunc(name, a.images()) // the flag is there
	}
	_ = cmd.RegisterFlagCompletionFunc("config", completeFiles)
	return cmd
}

func (a *app) printCopyDigest(paths []string) error {
	d, err := layers.CopyDigest(paths...)
	if err != nil {
		return err
	}
	if a.json {
		return printJSON(map[string]string{"digest": d})
	}
	fmt.Println(d)
	return nil
}

func readStep(name string) (json.RawMessage, error) {
	f := os.Stdin
	if name != "-" {
		var err error
		if f, err = os.Open(name); err != nil {
			return nil, err
		}
		defer f.Close() // read only
	}
	raw, err := io.ReadAll(io.LimitReader(f, stepMax+1))
	switch {
	case err != nil:
		return nil, err
	case len(raw) > stepMax:
		return nil, usagef("%q: more than %d bytes", name, stepMax)
	case !json.Valid(raw):
		return nil, usagef("%q is not JSON", name)
	}
	return raw, nil
}
