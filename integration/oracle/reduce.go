package oracle

import (
	"errors"
	"strings"
	"time"
)

// Reduce looks for a smaller trial that still fails: first fewer operations,
// then fewer lowers, then fewer entries. It gives up after the limit and
// returns the smallest found.
func Reduce(t Trial, limit time.Duration, fails func(Trial) bool) Trial {
	deadline := time.Now().Add(limit)
	test := func(c Trial) bool { return time.Now().Before(deadline) && fails(c) }

	t.Ops = minimize(t.Ops, func(ops []Op) bool {
		c := t
		c.Ops = ops
		return test(c)
	})
	if len(t.Recipe.Lowers) > 1 {
		t.Recipe.Lowers = minimize(t.Recipe.Lowers, func(ls []Layer) bool {
			c := t
			c.Recipe.Lowers = ls
			return len(ls) > 0 && test(c)
		})
	}
	layers := append([]Layer(nil), t.Recipe.Lowers...)
	for i := range layers {
		layers[i].Entries = minimize(layers[i].Entries, func(es []Entry) bool {
			c := t
			c.Recipe.Lowers = append([]Layer(nil), layers...)
			c.Recipe.Lowers[i].Entries = es
			return wellFormed(es) && test(c)
		})
	}
	t.Recipe.Lowers = layers
	t.Recipe.Upper.Entries = minimize(t.Recipe.Upper.Entries, func(es []Entry) bool {
		c := t
		c.Recipe.Upper.Entries = es
		return wellFormed(es) && test(c)
	})
	return t
}

// wellFormed says whether every entry has its parent and every hard link its
// target.
func wellFormed(es []Entry) bool {
	have := map[Name]bool{"": true}
	for _, e := range es {
		if !have[parent(e.Path)] || e.Kind == Hardlink && !have[e.Target] {
			return false
		}
		have[e.Path] = true
	}
	return true
}

func parent(n Name) Name {
	for i := len(n) - 1; i >= 0; i-- {
		if n[i] == '/' {
			return n[:i]
		}
	}
	return ""
}

// minimize is delta debugging: it removes ever smaller pieces as long as the
// rest fails.
func minimize[T any](list []T, fails func([]T) bool) []T {
	for size := (len(list) + 1) / 2; size >= 1; {
		removed := false
		for i := 0; i < len(list); {
			end := min(i+size, len(list))
			rest := append(append([]T(nil), list[:i]...), list[end:]...)
			if fails(rest) {
				list, removed = rest, true
			} else {
				i = end
			}
		}
		switch {
		case size > 1:
			size = (size + 1) / 2
		case !removed:
			return list
		}
		if len(list) == 0 {
			return list
		}
	}
	return list
}

// Signature is what kind of failure a run is, so that a reduction does not end
// at another one.
func Signature(diffs []Diff, err error) string {
	switch {
	case errors.Is(err, ErrHang):
		return "hang"
	case len(diffs) == 0 && err == nil:
		return ""
	case len(diffs) == 0:
		return "error"
	case diffs[0].Lines != nil && diffs[0].What == "snapshot":
		return strings.TrimRight(diffs[0].Step, "0123456789 ")
	}
	name, _, _ := strings.Cut(diffs[0].What, " ")
	return name + " " + errPart(diffs[0].Model) + " " + errPart(diffs[0].Subject)
}

// errPart is the errno of a shown result, or "data".
func errPart(s string) string {
	word, _, _ := strings.Cut(s, ":")
	if word == strings.ToUpper(word) && strings.HasPrefix(word, "E") {
		return word
	}
	return "data"
}
