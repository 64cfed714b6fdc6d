package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"
)

// grid is a table to print: the first row is the heading.
type grid struct {
	title string
	rows  [][]string
}

// noisy is the spread from which a figure is marked.
const noisy = 0.2

// grids arranges the results: one grid for each table and place.
func (r *results) grids(tables []table, goals bool) []grid {
	var out []grid
	for _, place := range r.Places {
		for _, t := range tables {
			if g, ok := r.grid(place, &t, goals); ok {
				out = append(out, g)
			}
		}
	}
	return out
}

func (r *results) grid(place string, t *table, goals bool) (grid, bool) {
	var columns []system
	for _, s := range systems {
		if slices.ContainsFunc(r.Measures, func(m *measure) bool { return m.Place == place && m.Table == t.Name && m.System == s.Name }) {
			columns = append(columns, s)
		}
	}
	g := grid{title: t.Title + ", on " + place}
	head := []string{"", "count"}
	for _, s := range columns {
		head = append(head, s.Column)
	}
	wanted := false
	for _, sc := range t.scenes {
		for _, st := range sc.steps {
			for _, ph := range st.phases {
				row, any, goal := r.row(place, ph, columns)
				if !any {
					continue
				}
				if goals {
					row = append(row, goal)
				}
				wanted = wanted || goal != ""
				g.rows = append(g.rows, row)
			}
		}
	}
	if goals {
		head = append(head, "goal")
	}
	g.rows = append([][]string{head}, g.rows...)
	if goals && !wanted {
		for i, row := range g.rows {
			g.rows[i] = row[:len(row)-1]
		}
	}
	return g, len(g.rows) > 1
}

// row is a phase. any says whether something was measured.
func (r *results) row(place string, ph phase, columns []system) (row []string, any bool, goal string) {
	ref := ph.ref()
	row = []string{ph.Title, ""}
	var met []string
	for _, s := range columns {
		m := r.find(place, ph.Name, s.Name)
		if m == nil {
			row = append(row, "")
			continue
		}
		any = true
		if row[1] == "" && (ph.Unit == perSecond || ph.Unit == perSecondBytes) {
			row[1] = volume(ph.Unit, m.Ops) // of the first, which is the kernel
		}
		row = append(row, r.cell(m, ph, ref == s.Name))
		for _, g := range ph.goalsOn(place) {
			if g.Column != s.goal {
				continue
			}
			mark := " ✗"
			if g.met(r.ratio(m, ref), median(m.Values)) {
				mark = " ✓"
			}
			met = append(met, g.text(ph.Unit)+mark)
		}
	}
	return row, any, strings.Join(met, " ")
}

func (p phase) ref() string {
	if p.Ref == "" {
		return "kernel"
	}
	return p.Ref
}

func volume(u unit, ops int64) string {
	if u == perSecondBytes {
		return memory.value(float64(ops))
	}
	return fmt.Sprint(ops)
}

// cell shows the reference, and what has none, in absolute figures, the others
// relative to it, and times both ways.
func (r *results) cell(m *measure, ph phase, isRef bool) string {
	text := ph.Unit.rate(median(m.Values), m.Ops)
	varies := m.Values
	if rel := r.ratio(m, ph.ref()); !isRef && rel > 0 && ph.Unit.timed() {
		if q := quotients(r.find(m.Place, m.Phase, ph.ref()), m); q != nil {
			varies = q
		}
		if ph.Unit == duration {
			text += " (" + ratio(rel) + ")"
		} else {
			text = ratio(rel)
		}
	}
	if spread(varies) > noisy {
		text += "~"
	}
	return text
}

// verdicts compares with all goals: how many there are for what was measured,
// and the rows of those that are missed.
func (r *results) verdicts(tables []table) (goals int, missed grid) {
	missed = grid{title: "Goals that are missed", rows: [][]string{{"", "on", "system", "goal", "measured"}}}
	for _, place := range r.Places {
		for _, t := range tables {
			for _, sc := range t.scenes {
				for _, st := range sc.steps {
					for _, ph := range st.phases {
						n, rows := r.verdict(place, &t, ph)
						goals += n
						missed.rows = append(missed.rows, rows...)
					}
				}
			}
		}
	}
	return goals, missed
}

func (r *results) verdict(place string, t *table, ph phase) (goals int, rows [][]string) {
	for _, s := range systems {
		m := r.find(place, ph.Name, s.Name)
		if m == nil {
			continue
		}
		for _, g := range ph.goalsOn(place) {
			rel := r.ratio(m, ph.ref())
			if g.Column != s.goal || g.AtMost == 0 && rel == 0 {
				continue
			}
			goals++
			if g.met(rel, median(m.Values)) {
				continue
			}
			got := ratio(rel)
			if g.AtMost > 0 {
				got = ph.Unit.value(median(m.Values))
			}
			rows = append(rows, []string{t.Title + ": " + ph.Title, place, s.Column, g.text(ph.Unit), got})
		}
	}
	return goals, rows
}

// countGrid lists the requests of each phase.
func (r *results) countGrid(tables []table) grid {
	g := grid{title: "FUSE requests", rows: [][]string{{"", "system", "per operation", "requests"}}}
	for _, t := range tables {
		for _, sc := range t.scenes {
			for _, st := range sc.steps {
				for _, ph := range st.phases {
					for _, s := range systems {
						for _, c := range r.Counts {
							if c.Phase == ph.Name && c.System == s.Name {
								g.rows = append(g.rows, c.row(ph, s))
							}
						}
					}
				}
			}
		}
	}
	return g
}

func (c count) row(ph phase, s system) []string {
	per := ""
	if ph.Unit == perSecond && c.Ops > 0 {
		per = fmt.Sprintf("%.2f", float64(c.Requests.total())/float64(c.Ops))
	}
	ops := slices.SortedFunc(maps.Keys(c.Requests), func(a, b string) int {
		if d := int64(c.Requests[b]) - int64(c.Requests[a]); d != 0 {
			return int(d)
		}
		return strings.Compare(a, b)
	})
	var list []string
	for _, op := range ops {
		list = append(list, fmt.Sprintf("%s %d", op, c.Requests[op]))
	}
	if len(list) == 0 {
		list = []string{"none"}
	}
	return []string{ph.Name, s.Column, per, strings.Join(list, ", ")}
}

// text lays the grid out for a terminal.
func (g grid) text() string {
	if len(g.rows) == 0 {
		return ""
	}
	widths := make([]int, len(g.rows[0]))
	for _, row := range g.rows {
		for i, c := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(c))
		}
	}
	var b strings.Builder
	b.WriteString(g.title + "\n")
	for _, row := range g.rows {
		var line strings.Builder
		for i, c := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c))
			if i == 0 || i == len(row)-1 {
				line.WriteString(c + pad + "  ")
			} else {
				line.WriteString(pad + c + "  ")
			}
		}
		b.WriteString("  " + strings.TrimRight(line.String(), " ") + "\n")
	}
	return b.String()
}

// markdown is the grid as a table of a document.
func (g grid) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "## %s\n\n", g.title)
	for i, row := range g.rows {
		escaped := make([]string, len(row))
		for j, c := range row {
			escaped[j] = strings.ReplaceAll(c, "|", `\|`)
		}
		b.WriteString("| " + strings.Join(escaped, " | ") + " |\n")
		if i == 0 {
			b.WriteString("|---|" + strings.Repeat("---:|", len(row)-2) + "---|\n")
		}
	}
	return b.String() + "\n"
}
