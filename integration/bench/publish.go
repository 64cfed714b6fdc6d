package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// publish prints the tables and writes the files.
func (r *runner) publish(c *config, old *results, out io.Writer) error {
	tables := allTables(r.sizes)
	fmt.Fprintln(out, r.res.header())
	for _, g := range r.res.grids(tables, c.goals) {
		fmt.Fprintln(out, g.text())
	}
	if n, missed := r.res.verdicts(tables); c.goals && n > 0 {
		fmt.Fprintf(out, "%d of %d goals are met\n\n", n-len(missed.rows)+1, n)
	}
	if len(r.res.Counts) > 0 {
		fmt.Fprintln(out, r.res.countGrid(tables).text())
	}
	for _, n := range r.res.Notes {
		fmt.Fprintln(out, "note:", n)
	}
	if old != nil {
		fmt.Fprintln(out, compare(old, r.res, tables).text())
	}
	dir, name := c.out, "results"
	if c.save {
		dir, name = "docs", "benchmarks"
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	base := filepath.Join(dir, name)
	err := errors.Join(r.res.write(base+".json"), r.res.writeDocument(base, tables))
	if err == nil {
		fmt.Fprintf(out, "the results are in %s, as %s.*\n", dir, name)
	}
	return err
}

// header says what was measured where.
func (r *results) header() string {
	var b strings.Builder
	fmt.Fprintf(&b, "plyfs %s, %s, %d rounds", r.Revision, r.Date, r.Rounds)
	if r.Quick {
		b.WriteString(", quick: the figures mean nothing")
	}
	fmt.Fprintf(&b, "\n%s\n", r.Machine.text())
	for _, s := range r.Systems {
		if s.Version != "" {
			fmt.Fprintf(&b, "%s: %s\n", s.Name, s.Version)
		}
	}
	if len(r.Options) > 0 {
		fmt.Fprintf(&b, "additional options of plyfs: %s\n", strings.Join(r.Options, ","))
	}
	return b.String()
}

// writeDocument writes the tables as a document, with a plot for each place.
func (r *results) writeDocument(base string, tables []table) error {
	var b strings.Builder
	b.WriteString("# Benchmarks\n\nWritten by `make bench`; how it measures is in the package comment of `integration/bench`.\n\n")
	for line := range strings.Lines(r.header()) {
		if s := strings.TrimSpace(line); s != "" {
			fmt.Fprintf(&b, "- %s\n", s)
		}
	}
	b.WriteString("\nThe column `kernel` shows absolute figures. The others show speed relative to it: 2 is twice as fast. `~` marks what differs by more than\na fifth between rounds (distance of the quartiles). Goals are for the columns C, N, R and S of plyfs; ✗ is one that is missed.\n\n")
	if n, missed := r.verdicts(tables); n > 0 {
		fmt.Fprintf(&b, "%d of %d goals are met.\n\n", n-len(missed.rows)+1, n)
		if len(missed.rows) > 1 {
			b.WriteString(missed.markdown())
		}
	}
	for _, place := range r.Places {
		p := r.plotOf(place, tables)
		if len(p.groups) == 0 {
			continue
		}
		file := base + "-" + place + ".svg"
		if err := os.WriteFile(file, []byte(p.svg()), 0o644); err != nil {
			return err
		}
		fmt.Fprintf(&b, "![%s](%s)\n\n", p.title, filepath.Base(file))
	}
	for _, g := range r.grids(tables, true) {
		b.WriteString(g.markdown())
	}
	if len(r.Counts) > 0 {
		b.WriteString(r.countGrid(tables).markdown())
	}
	if len(r.Notes) > 0 {
		b.WriteString("## Notes\n\n")
		for _, n := range r.Notes {
			fmt.Fprintf(&b, "- %s\n", n)
		}
	}
	return os.WriteFile(base+".md", []byte(b.String()), 0o644)
}
