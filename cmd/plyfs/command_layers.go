package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
)

// layersOptions are those of `plyfs layers`.
type layersOptions struct {
	full, store, files, wasted, duplicates bool
	layer, largest                         int
}

// lists reports whether something else than the overview is asked for.
func (o layersOptions) lists() bool { return o.files || o.wasted || o.duplicates || o.largest != 0 }

// overviewLength is how many lines each list of the overview has.
const overviewLength = 5

func (o layersOptions) request(image string) mountd.AnalyzeRequest {
	r := mountd.AnalyzeRequest{Name: image}
	if !o.lists() {
		r.Largest, r.Directories, r.Wasted = overviewLength, overviewLength, overviewLength
		return r
	}
	r.Files, r.Layer = o.files, o.layer
	r.Largest, r.Directories = o.largest, o.largest
	r.Why = o.files || o.wasted
	if o.wasted {
		r.Wasted = -1
	}
	if o.duplicates {
		r.Duplicates = -1
	}
	return r
}

func newLayersCommand(a *app) *cobra.Command {
	var o layersOptions
	cmd := &cobra.Command{
		Use:   "layers [IMAGE]",
		Short: "Say what each layer of an image adds and wastes, or list all layers of the store",
		Long: `Of an image: what each layer adds, changes and deletes, bottom first, with the step that
made it (steps without a layer have no number); then where the bytes are. Without IMAGE:
the layers of the store, and where they lie.

The size of a layer is that of its files, each counted once however many hard links it has
in the layer. A file that is changed, if only its mode or owner, is in the layer as a whole
once more. Wasted are the bytes of files that no name of the image shows: a layer above
has replaced or deleted them. They are still loaded, stored and sent. Size is what shows
and what is wasted; efficiency is 1 - wasted/size (100% of an image without bytes).

Options choose lists in place of the overview; they can be combined:
  --files        what each layer does, by file: A added, C changed, D deleted. Changed is a
                 file that was there before, whatever is new about it (in brackets: mode,
                 owner, size, content, type, link, xattr, or nothing), and a directory with
                 another mode or owner. What a deleted directory had in it is listed, too.
                 --layer N shows one layer.
  --largest N    the N largest files, and directories with all that is below them, that the
                 image shows. A directory is left out if nine tenths of it are in one
                 directory below.
  --wasted       every path that wastes bytes, the costliest first, in which layer the bytes
                 are, and which layer replaced or deleted them. "same content" says that they
                 are there once more for the sake of a mode, an owner or an attribute.
  --duplicates   files with the same content, in one layer or in several. Only files with the
                 size of another one are read. Hard links are one file.

--json prints one object: size, visible, wasted, efficiency, layers (each with number, size,
createdBy, added, changed, deleted, wasted …) and history, with largest,
largestDirectories, wastedPaths, wastedDirectories, duplicates, and the files of layers as
options say; without one, the lists of the overview.`,
		Example: `  plyfs layers debian:12
  plyfs layers --largest 20 debian:12
  plyfs layers --wasted debian:12
  plyfs layers --files --layer 2 debian:12
  plyfs layers --duplicates debian:12
  plyfs --json layers debian:12 | jq '.layers[] | {number, size, wasted, createdBy}'
  plyfs layers`,
		Args:              rangeArgs(0, 1, "at most one IMAGE"),
		ValidArgsFunction: completeArgs(a.images()),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) == 0 && (o.lists() || o.store || o.layer != 0):
				return usagef("--files, --layer, --largest, --wasted, --duplicates and --store are about an image: name one")
			case o.store && o.lists():
				return usagef("--store is a list of its own: leave the other ones away")
			case o.layer != 0 && !o.files:
				return usagef("--layer goes with --files")
			case o.largest < 0 || o.layer < 0:
				return usagef("--largest and --layer take a number from 1 on")
			}
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				if len(args) == 0 || o.store {
					return printStoredLayers(ctx, a, s, args, o.full)
				}
				done := tellSlow("reading files of the image to compare them …")
				an, err := s.Analyze(ctx, o.request(args[0]))
				done()
				switch {
				case err != nil:
					return err
				case a.json:
					return printJSON(an)
				case o.lists():
					return printAnalysisLists(an, o)
				}
				return printAnalysis(an, o.full)
			})
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.full, "no-trunc", false, "do not shorten IDs and steps")
	f.BoolVar(&o.store, "store", false, "show where the layers of the image lie in the store, and how")
	f.BoolVar(&o.files, "files", false, "list what each layer does, by file")
	f.IntVar(&o.layer, "layer", 0, "with --files: of this layer only")
	f.IntVar(&o.largest, "largest", 0, "list so many of the largest files and directories")
	f.BoolVar(&o.wasted, "wasted", false, "list the paths that waste bytes, and why")
	f.BoolVar(&o.duplicates, "duplicates", false, "list files with the same content")
	return cmd
}

// printStoredLayers lists layers as the store has them: of an image, bottom first, or all.
func printStoredLayers(ctx context.Context, a *app, s mountd.Service, image []string, full bool) error {
	var r mountd.NameRequest
	if len(image) > 0 {
		r.Name = image[0]
	}
	l, err := s.Layers(ctx, r)
	if err != nil {
		return err
	}
	if a.json {
		return printJSON(list(l))
	}
	t := newTable(os.Stdout, "DIFF ID", "CHAIN ID", "DIALECT", "SIZE", "INODES", "DIRECTORY")
	for _, i := range l {
		t.row(idText(i.DiffID, full), idText(i.ChainID, full), i.Dialect.String(), size(i.Size), fmt.Sprint(i.Inodes), i.Path)
	}
	return t.flush()
}

// countText is what a layer does to files, and to directories if there is nothing else.
func countText(c layers.LayerCount) string {
	switch {
	case c.Files > 0:
		return fmt.Sprintf("%d (%s)", c.Files, size(c.Bytes))
	case c.Directories > 0:
		return plural(c.Directories, "dir", "dirs")
	}
	return "-"
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
