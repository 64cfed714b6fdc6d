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

func newImagesCommand(a *app) *cobra.Command {
	var quiet, full, digests, sizes bool
	var format string
	var r mountd.ImagesRequest
	cmd := &cobra.Command{
		Use:   "images [REPOSITORY[:TAG]]",
		Short: "List images",
		Long: `List images, or those with a name, or a name that matches a pattern (quoted: '*/app:2*').
Filters: dangling=true or false (without, or with, a name), label=KEY or label=KEY=VALUE,
before=IMAGE and since=IMAGE (by the time they were made), reference=PATTERN. All must hold;
of several references one.`,
		Example: `  plyfs images
  plyfs images debian
  plyfs images -f label=maintainer -f since=debian:12
  plyfs images --format '{{.Repository}}:{{.Tag}} {{.ID}}'
  plyfs images --json`,
		Args:              rangeArgs(0, 1, "at most one REPOSITORY[:TAG]"),
		ValidArgsFunction: completeArgs(a.images()),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				if digests && sizes {
					return usagef("--digests and --sizes are two lists: choose one")
				}
				r.Filter = strings.Join(args, "")
				images, err := s.Images(ctx, r)
				if err != nil {
					return err
				}
				switch {
				case a.json:
					return printJSON(list(images))
				case format != "":
					return printFormat(format, imageColumns, imageRows(images, full, digests || wants(format, "Digest")))
				case quiet:
					for _, i := range images {
						fmt.Println(idText(i.ID, full))
					}
					return nil
				}
				switch {
				case digests:
					return printDigests(images, full)
				case sizes:
					return printSizes(images, full)
				}
				t := newTable(os.Stdout, "REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE")
				for _, i := range images {
					t.row(orNone(i.Repository), orNone(i.Tag), idText(i.ID, full), ago(i.Created), size(i.Size))
				}
				return t.flush()
			})
		},
	}
	cmd.Flags().BoolVarP(&r.All, "all", "a", false, "also images without a name that others were made from")
	cmd.Flags().StringArrayVarP(&r.Filters, "filter", "f", nil, "condition KEY=VALUE; may be repeated")
	_ = cmd.RegisterFlagCompletionFunc("filter", completeFilter) // the flag is there
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print IDs only")
	cmd.Flags().BoolVar(&full, "no-trunc", false, "do not shorten IDs")
	cmd.Flags().BoolVar(&digests, "digests", false, "show the digests that registries know images by, one a line")
	addFormat(cmd, &format)
	cmd.Flags().BoolVar(&sizes, "sizes", false, "show how much of the size is shared with other images")
	return cmd
}

var imageColumns = []column{
	{"Repository", "REPOSITORY"},
	{"Tag", "TAG"},
	{"ID", "IMAGE ID"},
	{"Digest", "DIGEST"},
	{"CreatedSince", "CREATED"},
	{"CreatedAt", "CREATED AT"},
	{"Size", "SIZE"},
	{"SharedSize", "SHARED SIZE"},
	{"UniqueSize", "UNIQUE SIZE"},
	{"VirtualSize", "SIZE"},
	{"Containers", "CONTAINERS"},
	{"Layers", "LAYERS"},
}

// imageRows are images for a template; with digests, a row for each.
func imageRows(images []layers.ImageSummary, full, digests bool) (rows []map[string]any) {
	for _, i := range images {
		all := []string{orNone("")}
		if digests && len(i.Digests) > 0 {
			all = all[:0]
			for _, d := range i.Digests {
				all = append(all, d.String())
			}
		}
		for _, d := range all {
			rows = append(rows, map[string]any{
				"Repository": orNone(i.Repository), "Tag": orNone(i.Tag), "ID": idText(i.ID, full), "Digest": d,
				"CreatedSince": ago(i.Created), "CreatedAt": createdAt(i.Created), "Size": size(i.Size), "VirtualSize": size(i.Size),
				"SharedSize": size(i.SharedSize), "UniqueSize": size(i.UniqueSize), "Containers": fmt.Sprint(i.Containers), "Layers": fmt.Sprint(i.Layers),
			})
		}
	}
	return rows
}

// printSizes is the list with what an image has for itself, and what others have too.
func printSizes(images []layers.ImageSummary, full bool) error {
	t := newTable(os.Stdout, "REPOSITORY", "TAG", "IMAGE ID", "LAYERS", "CONTAINERS", "SIZE", "SHARED SIZE", "UNIQUE SIZE")
	for _, i := range images {
		t.row(orNone(i.Repository), orNone(i.Tag), idText(i.ID, full), fmt.Sprint(i.Layers), fmt.Sprint(i.Containers), size(i.Size), size(i.SharedSize), size(i.UniqueSize))
	}
	return t.flush()
}

// completeFilter offers the keys.
func completeFilter(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	out := []cobra.Completion{"dangling=true", "dangling=false"}
	for _, k := range layers.FilterKeys {
		if k != "dangling" {
			out = append(out, k+"=")
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}

// printDigests is the list with a line for each digest.
func printDigests(images []layers.ImageSummary, full bool) error {
	t := newTable(os.Stdout, "REPOSITORY", "TAG", "DIGEST", "IMAGE ID", "CREATED", "SIZE")
	for _, i := range images {
		all := []string{orNone("")}
		if len(i.Digests) > 0 {
			all = all[:0]
		}
		for _, d := range i.Digests {
			all = append(all, d.String())
		}
		for _, d := range all {
			t.row(orNone(i.Repository), orNone(i.Tag), d, idText(i.ID, full), ago(i.Created), size(i.Size))
		}
	}
	return t.flush()
}

func orNone(s string) string {
	if s == "" {
		return "<none>"
	}
	return s
}

func newTagCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "tag SOURCE TARGET",
		Short:             "Give an image one more name",
		Example:           "  plyfs tag debian:12 localhost/base:latest",
		Args:              exactArgs(2, "SOURCE and TARGET"),
		ValidArgsFunction: completeArgs(a.images(), a.images()),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				_, err := s.Tag(ctx, mountd.TagRequest{Source: args[0], Target: args[1]})
				return err
			})
		},
	}
}

func newRmiCommand(a *app) *cobra.Command {
	var force, noPrune bool
	cmd := &cobra.Command{
		Use:   "rmi IMAGE…",
		Short: "Remove names of images, and what nothing needs then",
		Long: `Remove a name of an image. With the last name the image goes, and every layer
that no other image, container or mount needs; and the images without a name that it was
made from. By its ID an image is removed if it has no more than one name.`,
		Example:           "  plyfs rmi debian:12 localhost/base",
		Args:              rangeArgs(1, -1, "one IMAGE or more"),
		ValidArgsFunction: completeEach(a.images()),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				all := []layers.RemoveAction{}
				err := eachArg(args, func(name string) error {
					done, err := s.RemoveImage(ctx, mountd.RemoveImageRequest{Name: name, Force: force, NoPrune: noPrune})
					all = append(all, done...)
					if !a.json {
						for _, d := range done {
							fmt.Printf("%s: %s\n", d.Kind, printable(d.Ref))
						}
					}
					return unlessGone(force, err)
				})
				if a.json {
					if jerr := printJSON(all); jerr != nil {
						return jerr
					}
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "remove all names of an image given by its ID; an image that is not there is no error")
	cmd.Flags().BoolVar(&noPrune, "no-prune", false, "keep untagged parents")
	return cmd
}

func newHistoryCommand(a *app) *cobra.Command {
	var quiet, full bool
	var format string
	cmd := &cobra.Command{
		Use:               "history IMAGE",
		Short:             "Show the steps that made an image, newest first",
		Example:           "  plyfs history --no-trunc debian:12",
		Args:              exactArgs(1, "one IMAGE"),
		ValidArgsFunction: completeArgs(a.images()),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				h, err := s.History(ctx, mountd.NameRequest{Name: args[0]})
				if err != nil {
					return err
				}
				if a.json {
					return printJSON(list(h))
				}
				short := func(id string) string {
					if full || strings.HasPrefix(id, "<") {
						return id
					}
					return shortID(id)
				}
				if format != "" {
					return printFormat(format, historyColumns, historyRows(h, short, full))
				}
				if quiet {
					for _, e := range h {
						fmt.Println(printable(short(e.ID)))
					}
					return nil
				}
				t := newTable(os.Stdout, "IMAGE", "CREATED", "CREATED BY", "SIZE", "COMMENT")
				for _, e := range h {
					t.row(short(e.ID), ago(e.Created), createdBy(e, full), size(e.Size), e.Comment)
				}
				return t.flush()
			})
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print IDs only")
	cmd.Flags().BoolVar(&full, "no-trunc", false, "do not shorten")
	addFormat(cmd, &format)
	return cmd
}

// createdBy is the text of a step on one line.
func createdBy(e layers.HistoryEntry, full bool) string {
	by := strings.Join(strings.Fields(e.CreatedBy), " ")
	if !full {
		by = shorten(by, 45)
	}
	return by
}

var historyColumns = []column{
	{"ID", "IMAGE"}, {"CreatedSince", "CREATED"}, {"CreatedAt", "CREATED AT"}, {"CreatedBy", "CREATED BY"}, {"Size", "SIZE"}, {"Comment", "COMMENT"},
}

func historyRows(h []layers.HistoryEntry, short func(string) string, full bool) (rows []map[string]any) {
	for _, e := range h {
		rows = append(rows, map[string]any{
			"ID": short(e.ID), "CreatedSince": ago(e.Created), "CreatedAt": createdAt(e.Created), "CreatedBy": printable(createdBy(e, full)),
			"Size": size(e.Size), "Comment": printable(e.Comment),
		})
	}
	return rows
}

// addFormat adds the option of lists that are printed by a template.
func addFormat(cmd *cobra.Command, format *string) {
	cmd.Flags().StringVar(format, "format", "", "print each row by a Go template with docker's names: '{{.ID}}', 'table {{.ID}}', json")
}

func newInspectCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "inspect NAME…",
		Short: "Show everything known of images and containers, as JSON",
		Example: `  plyfs inspect debian:12
  plyfs inspect mycontainer`,
		Args:              rangeArgs(1, -1, "one NAME or more"),
		ValidArgsFunction: completeEach(a.imagesAndContainers()),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				all := []any{}
				err := eachArg(args, func(name string) error {
					i, err := s.Inspect(ctx, mountd.NameRequest{Name: name})
					switch {
					case err != nil:
					case i.Container != nil:
						all = append(all, i.Container)
					default:
						all = append(all, i.Image)
					}
					return err
				})
				if jerr := printJSON(all); jerr != nil { // as docker, also when a name is missing
					return jerr
				}
				return err
			})
		},
	}
}
