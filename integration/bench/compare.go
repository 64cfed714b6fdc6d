package main

import (
	"fmt"
	"slices"
)

// changed is the relative change of a ratio that is worth a line.
const changed = 0.05

// sureRounds is how many rounds of each run it takes to be sure of anything.
const sureRounds = 3

// compare lists what differs from old results: time per operation, and speed
// relative to the reference. A change is sure when all rounds of one run are on
// the same side of all rounds of the other.
func compare(old, now *results, tables []table) grid {
	g := grid{title: "Compared with " + old.Revision + " of " + old.Date, rows: [][]string{{"", "on", "system", "before", "now", "speed", "ratio before", "ratio now", ""}}}
	for _, t := range tables {
		for _, sc := range t.scenes {
			for _, st := range sc.steps {
				for _, ph := range st.phases {
					for _, m := range now.Measures {
						if m.Phase == ph.Name {
							if o := old.find(m.Place, m.Phase, m.System); o != nil {
								g.rows = append(g.rows, compareRow(old, now, ph, o, m)...)
							}
						}
					}
				}
			}
		}
	}
	if len(g.rows) == 1 {
		g.rows = append(g.rows, []string{"nothing has changed", "", "", "", "", "", "", "", ""})
	}
	return g
}

func compareRow(old, now *results, ph phase, o, m *measure) [][]string {
	if len(o.Values) == 0 || len(m.Values) == 0 || m.perOp() == 0 {
		return nil
	}
	speed := o.perOp() / m.perOp()
	if speed > 1-changed && speed < 1+changed {
		return nil
	}
	sure := ""
	if o.Ops == m.Ops && min(len(o.Values), len(m.Values)) >= sureRounds && (slices.Max(o.Values) < slices.Min(m.Values) || slices.Max(m.Values) < slices.Min(o.Values)) {
		sure = "sure"
	}
	return [][]string{{
		ph.Name, m.Place, m.System,
		ph.Unit.rate(median(o.Values), o.Ops), ph.Unit.rate(median(m.Values), m.Ops), fmt.Sprintf("%.2f", speed),
		ratio(old.ratio(o, ph.ref())), ratio(now.ratio(m, ph.ref())), sure,
	}}
}
