package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
)

func newCheckCommand(a *app) *cobra.Command {
	var r mountd.CheckRequest
	cmd := &cobra.Command{
		Use:   "check [--deep] [--repair]",
		Short: "Verify the store",
		Long: `Verify the invariants of the store. With --deep all content is read and compared with
its digests and with the tars it came from. With --repair what can be cured is: rows are
made anew, also the whole database, damaged layers unpacked again where their contents
are whole. Containers' data is never removed; what belongs to nobody is moved to lost/ in
the store. For a layer whose content is lost the image has to be loaded again, which
puts it in its place. Exit code 8: problems remain; warnings (SEVERITY warning in the
JSON form) do not count.`,
		Example: `  plyfs check
  plyfs check --deep --repair`,
		Args: exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withDamaged(cmd, func(ctx context.Context, s mountd.Service) error {
				p := startProgress()
				rep, err := s.Check(ctx, r, p.callback())
				p.finish()
				if err != nil {
					return err
				}
				rep.Findings = list(rep.Findings)
				if a.json {
					err = printJSON(rep)
				} else {
					err = printReport(rep)
				}
				if err != nil {
					return err
				}
				for _, f := range rep.Findings {
					if f.Open() {
						return errFindings
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&r.Deep, "deep", false, "read all content")
	cmd.Flags().BoolVar(&r.Repair, "repair", false, "cure what can be cured")
	return cmd
}

func printReport(rep layers.Report) error {
	if len(rep.Findings) > 0 {
		t := newTable(os.Stdout, "RULE", "OBJECT", "PROBLEM", "REPAIR")
		for _, f := range rep.Findings {
			cure, rule := f.Repair, f.Invariant
			switch {
			case f.Fixed:
				cure = "done: " + cure
			case f.Severity == layers.SeverityWarning:
				rule += " warning"
			}
			t.row(rule, f.Object, f.Problem, cure)
		}
		if err := t.flush(); err != nil {
			return err
		}
	}
	fmt.Printf("%d images, %d layers, %d containers checked", rep.Images, rep.Layers, rep.Containers)
	if rep.Bytes > 0 {
		fmt.Printf(", %s read", size(rep.Bytes))
	}
	open, fixed, warnings := 0, 0, 0
	for _, f := range rep.Findings {
		switch {
		case f.Fixed:
			fixed++
		case f.Open():
			open++
		default:
			warnings++
		}
	}
	text := ": no problems"
	switch {
	case open == 1:
		text = ": 1 problem"
	case open > 1:
		text = fmt.Sprintf(": %d problems", open)
	}
	if fixed > 0 {
		text += fmt.Sprintf(", %d repaired", fixed)
	}
	if warnings > 0 {
		text += fmt.Sprintf(", %d warnings", warnings)
	}
	fmt.Println(text)
	return nil
}

func newGCCommand(a *app) *cobra.Command {
	var r mountd.GCRequest
	cmd := &cobra.Command{
		Use:     "gc",
		Short:   "Remove what nothing needs: unnamed images, unused layers, leftovers",
		Example: "  plyfs gc --dry-run",
		Args:    exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				rep, err := s.GC(ctx, r)
				if err != nil {
					return err
				}
				if a.json {
					return printJSON(rep)
				}
				printGC(rep)
				return nil
			})
		},
	}
	cmd.Flags().BoolVarP(&r.DryRun, "dry-run", "n", false, "only say what would be removed")
	return cmd
}

func printGC(rep layers.GCReport) {
	verb, total := "Deleted", "Total reclaimed space"
	if rep.DryRun {
		verb, total = "Would delete", "Reclaimable space"
	}
	for _, r := range rep.Untagged {
		fmt.Printf("%s name: %s\n", verb, printable(r))
	}
	for _, d := range rep.Images {
		fmt.Printf("%s image: %s\n", verb, d)
	}
	for _, d := range rep.Layers {
		fmt.Printf("%s layer: %s\n", verb, d)
	}
	for _, p := range append(rep.Stages, rep.Paths...) {
		fmt.Printf("%s: %s\n", verb, quoted(p))
	}
	fmt.Printf("%s: %s\n", total, size(rep.Reclaimed))
}

func newPruneCommand(a *app) *cobra.Command {
	var r mountd.PruneRequest
	cmd := &cobra.Command{
		Use:   "prune [--all]",
		Short: "Remove images without a name, or all that nothing uses",
		Long: `Remove images without a name (a digest is none), and with --all those with names too,
that no container and no mount uses and from which no other image was made, with the layers
that only they have. plyfs gc removes leftovers; it leaves images alone that never had a name.`,
		Example: `  plyfs prune --dry-run
  plyfs prune --all`,
		Args: exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				rep, err := s.Prune(ctx, r)
				if err != nil {
					return err
				}
				if a.json {
					return printJSON(rep)
				}
				printGC(rep)
				return nil
			})
		},
	}
	cmd.Flags().BoolVarP(&r.All, "all", "a", false, "also images that have a name")
	cmd.Flags().BoolVarP(&r.DryRun, "dry-run", "n", false, "only say what would be removed")
	return cmd
}

func newDfCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "df",
		Short:   "Show where the bytes of the store are",
		Example: "  plyfs df --json",
		Args:    exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				du, err := s.DiskUsage(ctx, mountd.Empty{})
				if err != nil {
					return err
				}
				if a.json {
					return printJSON(du)
				}
				t := newTable(os.Stdout, "TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE")
				for _, l := range []struct {
					name string
					u    layers.Usage
				}{{"Images", du.Images}, {"Layers", du.Layers}, {"Containers", du.Containers}} {
					t.row(l.name, fmt.Sprint(l.u.Count), fmt.Sprint(l.u.Active), size(l.u.Size), reclaimable(l.u))
				}
				for _, l := range []struct {
					name string
					n    int64
				}{
					{"Chain indexes", du.Chains},
					{"Kept blobs", du.Blobs},
					{"Init layers", du.Init},
					{"Unfinished work", du.Stage},
					{"Trash", du.Trash},
					{"Database", du.Database},
					{"Sidecars and copies", du.Records},
					{"Other", du.Other},
					{"Total", du.Total},
				} {
					t.row(l.name, "", "", size(l.n), "")
				}
				if du.Adopted > 0 {
					t.row("Adopted, elsewhere", "", "", size(du.Adopted), "")
				}
				return t.flush()
			})
		},
	}
}

func reclaimable(u layers.Usage) string {
	if u.Size <= 0 {
		return size(u.Reclaimable)
	}
	return fmt.Sprintf("%s (%d%%)", size(u.Reclaimable), u.Reclaimable*100/u.Size)
}
