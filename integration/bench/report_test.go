package main

import (
	"encoding/xml"
	"errors"
	"io"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// sample are results of two phases, with growth between two more.
func sample() *results {
	r := &results{Format: resultsFormat, Revision: "v1", Date: "2024-01-02", Rounds: 3, Places: []string{"ext4"}}
	add := func(table, phase string, u unit, system string, ops int64, values ...float64) {
		r.Measures = append(r.Measures, &measure{Place: "ext4", Table: table, Phase: phase, System: system, Unit: u, Ops: ops, Values: values})
	}
	add("metadata", "walk-cold", perSecond, "kernel", 1000, 0.1, 0.11, 0.1)
	add("metadata", "walk-cold", perSecond, "plyfs", 1000, 0.2, 0.22, 0.4)
	add("metadata", "walk-cold", perSecond, "mergerfs", 2000, 0.2, 0.22, 0.2)
	add("layers", "mount-1", duration, "kernel", 1, 0.001, 0.001, 0.001)
	add("layers", "mount-1", duration, "plyfs-store", 1, 0.01, 0.01, 0.011)
	add("layers", "walk-1", perSecond, "plyfs-store", 100, 1, 1, 1)
	add("layers", "walk-40", perSecond, "plyfs-store", 200, 2, 2.4, 2.1)
	r.Counts = []count{{Table: "metadata", Phase: "walk-cold", System: "plyfs", Ops: 1000, Requests: requests{"READDIRPLUS": 420, "LOOKUP": 80}}}
	return r
}

func TestGrids(t *testing.T) {
	r := sample()
	tables := allTables(&quickSizes)
	r.derive(tables)
	var b strings.Builder
	for _, g := range append(r.grids(tables, true), r.countGrid(tables)) {
		b.WriteString(g.text())
	}
	n, missed := r.verdicts(tables)
	b.WriteString(missed.text())
	if n != 3 {
		t.Errorf("%d goals", n)
	}
	const want = `Names and attributes, on ext4
                            count   kernel  plyfs C  mergerfs  goal
  walk + lstat, fresh mount  1000  10.0k/s    0.50~      1.00  C≥1.0 ✗
Number of layers, on ext4
                                               count   kernel         plyfs S  goal
  mount, to the first listing, 1 layer                1.00 ms  10.0 ms (0.10)  S≤80.0 ms ✓
  walk + lstat, fresh mount, 1 layer             100                    100/s
  walk + lstat, fresh mount, 40 layers           200                   95.2/s
  walk, fresh mount: time with 40 layers / with 1                       1.05×  S≤1.10× ✓
FUSE requests
              system  per operation  requests
  walk-cold  plyfs C           0.50  READDIRPLUS 420, LOOKUP 80
Goals that are missed
                                               on    system   goal   measured
  Names and attributes: walk + lstat, fresh mount  ext4  plyfs C  C≥1.0  0.50
`
	squeeze := regexp.MustCompile(` +`)
	if diff := cmp.Diff(squeeze.ReplaceAllString(want, " "), squeeze.ReplaceAllString(b.String(), " ")); diff != "" {
		t.Errorf("%s\n%s", diff, b.String())
	}
}

func TestMarkdown(t *testing.T) {
	g := grid{title: "T", rows: [][]string{{"", "a", "b"}, {"x|y", "1", "2"}}}
	const want = "## T\n\n|  | a | b |\n|---|---:|---|\n| x\\|y | 1 | 2 |\n\n"
	if diff := cmp.Diff(want, g.markdown()); diff != "" {
		t.Error(diff)
	}
}

func TestCompare(t *testing.T) {
	old, now := sample(), sample()
	now.find("ext4", "walk-cold", "plyfs").Values = []float64{0.1, 0.1, 0.1}
	g := compare(old, now, allTables(&quickSizes))
	if len(g.rows) != 2 {
		t.Fatalf("want one change:\n%s", g.text())
	}
	want := []string{"walk-cold", "ext4", "plyfs", "4.55k/s", "10.0k/s", "2.20", "0.50", "1.00", "sure"}
	if diff := cmp.Diff(want, g.rows[1]); diff != "" {
		t.Error(diff)
	}
}

// TestPlot: the plot is well-formed, all bars lie in the picture, and names are
// escaped.
func TestPlot(t *testing.T) {
	r := sample()
	r.find("ext4", "walk-cold", "plyfs").Values = []float64{100, 100, 100}
	p := r.plotOf("ext4", allTables(&quickSizes))
	p.title += " <&>"
	dec := xml.NewDecoder(strings.NewReader(p.svg()))
	bars := 0
	for {
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if s, ok := tok.(xml.StartElement); ok && s.Name.Local == "rect" {
			bars++
			for _, a := range s.Attr {
				if strings.HasPrefix(a.Value, "-") || a.Value == "NaN" {
					t.Errorf("%s of a bar is %s", a.Name.Local, a.Value)
				}
			}
		}
	}
	// One for each series in the legend, one for the value.
	if bars != len(plotted)+1 {
		t.Errorf("%d bars", bars)
	}
}

func TestResultsFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "r.json")
	want := sample()
	if err := want.write(file); err != nil {
		t.Fatal(err)
	}
	got, err := readResults(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want.Measures, got.Measures); diff != "" {
		t.Error(diff)
	}
	want.Format = 99
	if err := want.write(file); err != nil {
		t.Fatal(err)
	}
	if _, err := readResults(file); err == nil {
		t.Error("took results of an unknown format")
	}
}

// TestPhases: names of phases are unique, and each can be chosen by its name
// alone, with the steps before it and none behind it.
func TestPhases(t *testing.T) {
	all := allTables(&fullSizes)
	seen := map[string]bool{}
	for _, tb := range all {
		for _, sc := range tb.scenes {
			for i, st := range sc.steps {
				for _, ph := range st.phases {
					if seen[ph.Name] {
						t.Errorf("phase %s exists twice", ph.Name)
					}
					seen[ph.Name] = true
					got, wanted := choose(all, regexp.MustCompile("^"+regexp.QuoteMeta(ph.Name)+"$"))
					found := false
					for _, g := range got {
						for _, s := range g.scenes {
							found = found || s.name == sc.name && len(s.steps) == i+1
						}
					}
					if !found || !wanted[ph.Name] {
						t.Errorf("phase %s cannot be chosen", ph.Name)
					}
				}
			}
		}
	}
	if text := listing(all); strings.Count(text, "\n") != len(seen)+len(all) {
		t.Errorf("the listing does not have a line for each of %d phases:\n%s", len(seen), text)
	}
}
