package main

import (
	"fmt"
	"slices"
	"strings"
)

// goal is what is wanted of a phase in a column of the tables.
type goal struct {
	Column string // "C", "N", "R" or "S": see systems
	Place  string // "tmpfs", "disk", or "" for both
	// Exactly one is set: the least speed relative to the reference, or the
	// greatest value.
	Least  float64
	AtMost float64
}

// least wants the same of writable, no-open and read-only mounts; 0 asks for
// nothing.
func least(c, n, r float64) []goal {
	var out []goal
	for i, v := range []float64{c, n, r} {
		if v > 0 {
			out = append(out, goal{Column: "CNR"[i : i+1], Least: v})
		}
	}
	return out
}

// leastOn wants different things of a disk and of tmpfs, in writable mounts.
func leastOn(disk, tmpfs float64) []goal {
	return []goal{{Column: "C", Place: "disk", Least: disk}, {Column: "C", Place: "tmpfs", Least: tmpfs}}
}

// on says whether the goal is meant for that place.
func (g goal) on(place string) bool {
	return g.Place == "" || (g.Place == "tmpfs") == (place == "tmpfs")
}

// met compares a ratio, or a value, with the goal. What is at the goal when it
// is rounded as in the table meets it.
func (g goal) met(ratio, value float64) bool {
	if g.AtMost > 0 {
		return value <= g.AtMost
	}
	return ratio >= g.Least-0.005
}

func atMost(v float64) []goal { return []goal{{Column: "C", AtMost: v}} }

// stored wants the same of a container of the store as of a raw mount.
func stored(goals []goal) []goal {
	out := slices.Clone(goals)
	for _, g := range goals {
		g.Column = "S"
		out = append(out, g)
	}
	return out
}

func (g goal) text(u unit) string {
	if g.AtMost > 0 {
		return g.Column + "≤" + u.value(g.AtMost)
	}
	return g.Column + "≥" + strings.TrimSuffix(fmt.Sprintf("%.2f", g.Least), "0")
}

// goalsOn are those of a phase for a place.
func (p phase) goalsOn(place string) []goal {
	var out []goal
	for _, g := range p.Goals {
		if g.on(place) {
			out = append(out, g)
		}
	}
	return out
}
