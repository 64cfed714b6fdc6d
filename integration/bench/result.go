package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
)

// results are all that a run gives. They are kept as JSON.
type results struct {
	Format   int // 1
	Date     string
	Revision string // of the sources
	Rounds   int
	Quick    bool
	Machine  machine
	Places   []string
	Options  []string // additional options of plyfs
	Systems  []systemInfo
	Notes    []string // what was left out, and why
	Measures []*measure
	Counts   []count

	hide []string // directories of this machine, left out of notes
}

const resultsFormat = 1

// systemInfo describes a system that took part.
type systemInfo struct {
	Name    string
	Version string
}

// measure is a phase on one system and one file system.
type measure struct {
	Place, Table, Phase, System string
	Unit                        unit
	Ops                         int64     // in each round
	Values                      []float64 // one for each round: seconds, or bytes
}

// count is how many requests a phase caused.
type count struct {
	Table, Phase, System string
	Ops                  int64
	Requests             requests
}

func (r *results) note(format string, args ...any) {
	n := fmt.Sprintf(format, args...)
	for _, dir := range r.hide {
		n = strings.ReplaceAll(n, dir, "DIR")
	}
	if !slices.Contains(r.Notes, n) {
		r.Notes = append(r.Notes, n)
	}
}

func (r *results) add(place, table string, ph phase, s system, p part) {
	m := r.find(place, ph.Name, s.Name)
	if m == nil {
		m = &measure{Place: place, Table: table, Phase: ph.Name, System: s.Name, Unit: ph.Unit}
		r.Measures = append(r.Measures, m)
	}
	m.Ops = p.Ops
	if ph.Unit.timed() {
		m.Values = append(m.Values, p.Seconds)
	} else {
		m.Values = append(m.Values, p.Value)
	}
}

// find returns nil if there is no such measure.
func (r *results) find(place, phase, system string) *measure {
	for _, m := range r.Measures {
		if m.Place == place && m.Phase == phase && m.System == system {
			return m
		}
	}
	return nil
}

// perOp is the median time, or value, of one operation.
func (m *measure) perOp() float64 {
	v := median(m.Values)
	if m.Unit.timed() && m.Ops > 0 {
		v /= float64(m.Ops)
	}
	return v
}

// each is the time, or value, of one operation in each round.
func (m *measure) each() []float64 {
	out := slices.Clone(m.Values)
	if m.Unit.timed() && m.Ops > 0 {
		for i := range out {
			out[i] /= float64(m.Ops)
		}
	}
	return out
}

// quotients divides round by round: two systems that were measured one after
// the other have met the same noise. It needs as many rounds of both; nil
// otherwise.
func quotients(a, b *measure) []float64 {
	x, y := a.each(), b.each()
	if len(x) != len(y) {
		return nil
	}
	for i := range x {
		if y[i] == 0 {
			return nil
		}
		x[i] /= y[i]
	}
	return x
}

// ratio is the speed relative to the reference, per operation: the median of
// the ratios of all rounds. 0 without a reference.
func (r *results) ratio(m *measure, ref string) float64 {
	o := r.find(m.Place, m.Phase, ref)
	if o == nil || m.perOp() == 0 {
		return 0
	}
	if q := quotients(o, m); len(q) > 0 {
		return median(q)
	}
	return o.perOp() / m.perOp()
}

// derive adds the phases that follow from others.
func (r *results) derive(tables []table) {
	for _, t := range tables {
		for _, sc := range t.scenes {
			for _, st := range sc.steps {
				for _, ph := range st.phases {
					r.grow(t.Name, ph)
				}
			}
		}
	}
}

func (r *results) grow(table string, ph phase) {
	if ph.growth[0] == "" {
		return
	}
	for _, place := range r.Places {
		for _, s := range systems {
			from, to := r.find(place, ph.growth[0], s.Name), r.find(place, ph.growth[1], s.Name)
			if from == nil || to == nil {
				continue
			}
			if q := quotients(to, from); len(q) > 0 {
				r.Measures = append(r.Measures, &measure{Place: place, Table: table, Phase: ph.Name, System: s.Name, Unit: factor, Ops: 1, Values: q})
			}
		}
	}
}

func (r *results) write(file string) error {
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return fmt.Errorf("encode results: %w", err)
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}

func readResults(file string) (*results, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var r results
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("read results %s: %w", file, err)
	}
	if r.Format != resultsFormat {
		return nil, fmt.Errorf("results %s have format %d, expected %d", file, r.Format, resultsFormat)
	}
	return &r, nil
}
