package main

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/mountd"
)

func newDiffCommand(a *app) *cobra.Command {
	var why, sizes, summary bool
	var r mountd.DiffRequest
	cmd := &cobra.Command{
		Use:   "diff NAME | IMAGE1 IMAGE2",
		Short: "List what a container has changed, or the difference of two images",
		Long: `List changed paths: A added, C changed, D deleted. Paths that a terminal could not
show as they are appear as quoted strings; --json gives their exact bytes (pathB64).

Of two images, every file that only one of them has is listed, and those that differ: in
type, mode, owner, size, content (compared byte for byte), target of a symbolic link,
device number, extended attributes, or in which names are hard links of one file. A
directory is also listed for what is in it. When a file was modified makes no difference,
unless --times is given. It does not matter whether the images have layers in common.

Of a container, a file is listed when it was written or touched, whatever came of it, and
a directory that was deleted as a whole has one line, with the bytes of what was in it.

Options add to the lines:
  --sizes     bytes of files: of what is added or deleted, OLD -> NEW of what is changed
  --why       in what the two differ; nothing for a directory that is listed for its content
  --times     of two images: also list what differs in nothing but the time of its last
              modification
  --summary   only count: files, directories and bytes that were added, changed, deleted.
              A file with several names (hard links) counts for each, its bytes once.

--json is a list of objects with kind and path, and of two images, or with one of the
options, type, size, oldSize, why (words) and details (the same with values); linkTo names
the first of a file's hard links. With --summary it is one object.`,
		Example: `  plyfs diff work
  plyfs diff --why work
  plyfs diff debian:12 debian:mine
  plyfs diff --why --sizes debian:12 debian:mine
  plyfs diff --summary debian:12 debian:mine
  plyfs --json diff debian:12 debian:mine | jq -r '.[] | select(.why // [] | index("mode")) | .path'`,
		Args:              rangeArgs(1, 2, "a container NAME, or two IMAGEs"),
		ValidArgsFunction: completeArgs(a.imagesAndContainers(), a.images()),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.A = args[0]
			if len(args) > 1 {
				r.B = args[1]
			} else if r.Times {
				return usagef("--times is about two images: a file that a container has touched is always listed")
			}
			r.Detail = why || sizes || summary
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				done := tellSlow("reading files to compare them …")
				changes, err := s.Diff(ctx, r)
				done()
				switch {
				case err != nil:
					return err
				case summary && a.json:
					return printJSON(summarise(changes))
				case summary:
					return printDiffSummary(summarise(changes))
				case a.json:
					return printJSON(list(changes))
				}
				return printChanges(changes, sizes, why)
			})
		},
	}
	f := cmd.Flags()
	f.BoolVar(&why, "why", false, "say in what the two differ")
	f.BoolVar(&sizes, "sizes", false, "show the bytes of files")
	f.BoolVar(&summary, "summary", false, "only count what differs")
	f.BoolVar(&r.Times, "times", false, "of two images: also list what differs in its modification time only")
	return cmd
}

func printChanges(changes []mountd.Change, sizes, why bool) error {
	w := bufio.NewWriter(os.Stdout)
	for _, c := range changes {
		_, _ = w.WriteString(c.Kind) // Flush tells
		if sizes {
			fmt.Fprintf(w, " %*s", sizeWidth, sizeChange(c))
		}
		fmt.Fprintf(w, " %s", quoted(string(c.Path)))
		if why {
			if c.LinkTo != "" {
				fmt.Fprintf(w, " = %s", quoted(string(c.LinkTo)))
			}
			if len(c.Details) > 0 {
				fmt.Fprintf(w, "  (%s)", printable(strings.Join(c.Details, "; ")))
			}
		}
		_, _ = w.WriteString("\n")
	}
	return w.Flush()
}

// sizeWidth is that of the longest common text of sizeChange.
const sizeWidth = len("1.23kB -> 1.23kB")

func sizeChange(c mountd.Change) string {
	switch {
	case c.Type != "file" && c.OldSize == 0:
		return "-"
	case c.Kind == "A" || c.Kind == "C" && c.Size == c.OldSize:
		return size(c.Size)
	case c.Kind == "D":
		return size(c.OldSize)
	}
	return size(c.OldSize) + " -> " + size(c.Size)
}

// diffCount counts changes of one kind.
type diffCount struct {
	Files       int   `json:"files"` // names of everything that is no directory
	Directories int   `json:"directories"`
	Bytes       int64 `json:"bytes"`              // of files, hard links once
	OldBytes    int64 `json:"oldBytes,omitempty"` // of what is changed, before
}

type diffSummary struct {
	Added   diffCount `json:"added"`
	Changed diffCount `json:"changed"`
	Deleted diffCount `json:"deleted"`
	// Growth is what the second image shows more than the first.
	Growth int64 `json:"growth"`
	// Why counts the reasons of what is changed.
	Why map[string]int `json:"why"`
}

func summarise(changes []mountd.Change) diffSummary {
	s := diffSummary{Why: map[string]int{}}
	for _, c := range changes {
		n, bytes := &s.Changed, c.Size
		switch c.Kind {
		case "A":
			n = &s.Added
		case "D":
			n, bytes = &s.Deleted, c.OldSize
		case "C":
			if c.Type == "directory" && len(c.Why) == 0 {
				continue // listed for what is in it
			}
			if c.OldLinkTo == "" {
				n.OldBytes += c.OldSize
			}
			for _, w := range c.Why {
				s.Why[w]++
			}
		}
		if c.Type == "directory" {
			n.Directories++
		} else {
			n.Files++
		}
		if c.LinkTo == "" {
			n.Bytes += bytes
		}
	}
	s.Growth = s.Added.Bytes - s.Deleted.Bytes + s.Changed.Bytes - s.Changed.OldBytes
	return s
}

func printDiffSummary(s diffSummary) error {
	t := newTable(os.Stdout, "", "FILES", "DIRECTORIES", "SIZE")
	for _, l := range []struct {
		name string
		n    diffCount
		size string
	}{
		{"added", s.Added, size(s.Added.Bytes)},
		{"changed", s.Changed, size(s.Changed.OldBytes) + " -> " + size(s.Changed.Bytes)},
		{"deleted", s.Deleted, size(s.Deleted.Bytes)},
	} {
		t.row(l.name, fmt.Sprint(l.n.Files), fmt.Sprint(l.n.Directories), l.size)
	}
	if err := t.flush(); err != nil {
		return err
	}
	var why []string
	for _, w := range slices.Sorted(maps.Keys(s.Why)) {
		why = append(why, fmt.Sprintf("%s %d", w, s.Why[w]))
	}
	if len(why) > 0 {
		fmt.Println("changed in:", strings.Join(why, ", "))
	}
	switch {
	case s.Growth > 0:
		fmt.Printf("%s more than before.\n", size(s.Growth))
	case s.Growth < 0:
		fmt.Printf("%s less than before.\n", size(-s.Growth))
	default:
		fmt.Println("As many bytes as before.")
	}
	return nil
}
