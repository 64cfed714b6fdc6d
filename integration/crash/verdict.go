package crash

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/plyfs/plyfs/integration/oracle"
)

// past is a log up to a cut, as far as the marks are concerned.
type past map[string]bool

func (l Log) past(c Cut) past {
	p := make(past)
	for _, e := range l[:c.At] {
		if e.Kind == Mark {
			p[string(e.Data)] = true
		}
	}
	return p
}

// allowed returns the states of the story that a past leaves possible: the
// first and the last one.
func (s *Story) allowed(p past) (from, to int) {
	for i, st := range s.Steps {
		if p[s.begin(i)] {
			to = i + 1
		}
		if p[s.end(i)] && st.Sync {
			from = i + 1
		}
	}
	return from, to
}

// Verdict compares the directory of each story below root with what the cut
// allows and returns a report for each that is in no allowed state.
func Verdict(l Log, c Cut, stories []*Story, root string) []string {
	p := l.past(c)
	var bad []string
	for _, s := range stories {
		from, to := s.allowed(p)
		got := Look(filepath.Join(root, s.Name), s.Times)
		if s.possible(from, to, got) {
			continue
		}
		bad = append(bad, s.explain(from, to, got))
	}
	return bad
}

// possible reports whether got is one of the states, leaving aside the content
// of files whose first data has not been synced.
func (s *Story) possible(from, to int, got string) bool {
	states := slices.Clone(s.States[from : to+1])
	for _, st := range s.Steps[from:to] {
		if st.fills == "" {
			continue
		}
		content := regexp.MustCompile(`(?m)^(\./` + regexp.QuoteMeta(st.fills) + ` .*) size=.*$`)
		got = content.ReplaceAllString(got, "$1")
		for i := range states {
			states[i] = content.ReplaceAllString(states[i], "$1")
		}
	}
	return slices.Contains(states, got)
}

// What a report says, among other things.
const (
	// Never: a state that is none of the story's.
	Never = "found a state that never was"
	// Lost: a state of the story that is over, or has not come yet.
	Lost = "found the state after"
)

// explain says what is wrong with a state.
func (s *Story) explain(from, to int, got string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s:", s.Name)
	for i, st := range s.Steps {
		switch {
		case i < from:
			fmt.Fprintf(&b, " [%s: durable]", st.What)
		case i < to:
			fmt.Fprintf(&b, " [%s: may be]", st.What)
		}
	}
	if i := slices.Index(s.States, got); i >= 0 {
		fmt.Fprintf(&b, "\n  %s %d steps", Lost, i)
		return b.String()
	}
	b.WriteString("\n  " + Never + "; from the nearest one it differs in")
	var best []string
	for _, state := range s.States[from : to+1] {
		if d := oracle.DiffLines(state, got); best == nil || len(d) < len(best) {
			best = d
		}
	}
	for _, d := range best {
		b.WriteString("\n  " + d)
	}
	return b.String()
}
