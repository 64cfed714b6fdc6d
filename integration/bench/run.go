package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// runner executes the rounds.
type runner struct {
	bin     string
	base    string   // another binary of plyfs
	options []string // additional options of plyfs
	systems []system
	places  []*place
	tables  []table
	wanted  map[string]bool // phases
	rounds  int
	counts  bool
	limit   time.Duration
	sizes   *sizes
	res     *results
	log     io.Writer // progress
	failed  map[string]int
}

// binary is the plyfs that a system runs.
func (r *runner) binary(s system) string {
	if s.base {
		return r.base
	}
	return r.bin
}

// maxFailures is after how many failures a scene is given up on a system.
const maxFailures = 2

// run executes everything. An error means that it cannot go on; what fails on
// one system becomes a note.
func (r *runner) run(ctx context.Context) error {
	r.failed = map[string]int{}
	if r.counts {
		if err := r.count(ctx); err != nil {
			return err
		}
	}
	for round := range r.rounds {
		if err := r.each(ctx, round, r.places, nil); err != nil {
			return err
		}
	}
	return nil
}

// count is the round that counts requests. They depend little on the file
// system below, so it takes the last, which is tmpfs if there is one.
func (r *runner) count(ctx context.Context) error {
	tr, err := newTracer()
	if err != nil {
		r.res.note("requests are not counted: %v", err)
		return nil
	}
	defer func() {
		if err := tr.close(); err != nil {
			r.res.note("%v", err)
		}
	}()
	return r.each(ctx, -1, r.places[len(r.places)-1:], tr)
}

// each goes through places, scenes and systems. The order of systems differs
// from round to round.
func (r *runner) each(ctx context.Context, round int, places []*place, tr *tracer) error {
	for i, p := range places {
		for _, t := range r.tables {
			for _, sc := range t.scenes {
				if sc.few > 0 && round >= sc.few {
					continue
				}
				for n := range r.systems {
					s := r.systems[(n+max(round, 0))%len(r.systems)]
					if !sc.runs(&t, s, p, i == 0) || tr != nil && (!s.fuse() || !sc.countable()) {
						continue
					}
					if err := r.one(ctx, round, p, &t, &sc, s, tr); err != nil {
						return err
					}
				}
			}
		}
	}
	return nil
}

// countable says whether the scene has a job whose requests can be counted.
func (sc *scene) countable() bool {
	return slices.ContainsFunc(sc.steps, func(st step) bool { return st.job != nil && len(st.phases) > 0 })
}

func (r *runner) one(ctx context.Context, round int, p *place, t *table, sc *scene, s system, tr *tracer) error {
	key := p.Name + " " + sc.name + " " + s.Name
	if r.failed[key] >= maxFailures {
		return nil
	}
	what := fmt.Sprintf("round %d/%d", round+1, r.rounds)
	if tr != nil {
		what = "counting"
	}
	begin := time.Now()
	out, err := r.scene(ctx, p, sc, s, tr)
	fmt.Fprintf(r.log, "%s: %s: %.1f s\n", what, key, time.Since(begin).Seconds())
	if out != nil {
		r.keep(p, t, sc, s, out, tr != nil)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, errUnfit) {
		r.failed[key] = maxFailures
		r.res.note("%s: %v", key, err)
		return nil
	}
	if err != nil {
		r.failed[key]++
		fmt.Fprintf(r.log, "%s: %s: %v\n", what, key, err)
		r.res.note("%s: %v", key, err)
	}
	return nil
}

// errUnfit means that a system cannot do what a scene wants, and need not be
// asked again.
var errUnfit = errors.New("cannot be measured here")

func (r *runner) keep(p *place, t *table, sc *scene, s system, out *outcome, counted bool) {
	for _, st := range sc.steps {
		for _, ph := range st.phases {
			if !r.wanted[ph.Name] {
				continue
			}
			pt, ok := out.parts[ph.Name]
			if !ok {
				continue
			}
			if !counted {
				r.res.add(p.Name, t.Name, ph, s, pt)
			} else if c, ok := out.counts[ph.Name]; ok {
				r.res.Counts = append(r.res.Counts, count{Table: t.Name, Phase: ph.Name, System: s.Name, Ops: pt.Ops, Requests: c})
			}
		}
	}
}

// warned notes what a server of plyfs complained about at its start.
func (r *runner) warned(s system, log string) {
	for line := range strings.Lines(log) {
		if strings.Contains(line, "warning") {
			r.res.note("%s: %s", s.Name, strings.TrimSpace(line))
		}
	}
}
