package snapshotter

import (
	"regexp"
	"strconv"
	"strings"
	"unicode"

	"github.com/plyfs/plyfs/layers"
)

// Filters are those of containerd (its package filters):
//
//	filter   := selector ("," selector)*             all of them must match
//	selector := path (operator value)?               without: the field is there
//	path     := field ("." field)*
//	field    := quoted | [A-Za-z0-9_]+
//	operator := "==" | "!=" | "~="                   the last: a regular expression
//	value    := quoted | [^\s,]+
//	quoted   := a Go string; after ~= also between / / or | |
//
// Fields are name, parent, kind (view, active or committed) and labels.KEY. Of several
// filters one must match.
type filter []selector

type selector struct {
	path  []string
	op    string // "" if there is none
	value string
	re    *regexp.Regexp
}

// parseFilters reads filters; none, or an empty one, lets everything pass.
func parseFilters(texts []string) (func(Info) bool, error) {
	var all []filter
	for _, s := range texts {
		p := &filterParser{text: s, rest: s}
		f, err := p.filter()
		if err != nil {
			return nil, err
		}
		all = append(all, f)
	}
	return func(in Info) bool {
		for _, f := range all {
			if f.match(in) {
				return true
			}
		}
		return len(all) == 0
	}, nil
}

func (f filter) match(in Info) bool {
	for _, s := range f {
		if !s.match(in) {
			return false
		}
	}
	return true
}

func (s selector) match(in Info) bool {
	v, present := field(in, s.path)
	switch s.op {
	case "==":
		return present && v == s.value
	case "!=":
		return v != s.value
	case "~=":
		return s.re.MatchString(v)
	}
	return present
}

// field is how filters see a snapshot.
func field(in Info, path []string) (value string, present bool) {
	switch path[0] {
	case "kind":
		return string(in.Kind), true
	case "name":
		return in.Name, true
	case "parent":
		return in.Parent, true
	case "labels":
		v, ok := in.Labels[strings.Join(path[1:], ".")]
		return v, ok
	}
	return "", false
}

// filterParser reads one filter from left to right.
type filterParser struct {
	text, rest string
}

func (p *filterParser) errorf(what string) error {
	return markedf(layers.ErrInvalid, "filter %q: %s at byte %d", p.text, what, len(p.text)-len(p.rest))
}

func (p *filterParser) space() { p.rest = strings.TrimLeftFunc(p.rest, unicode.IsSpace) }

// take removes s from the front, if it is there.
func (p *filterParser) take(s string) bool {
	rest, ok := strings.CutPrefix(p.rest, s)
	if ok {
		p.rest = rest
	}
	return ok
}

func (p *filterParser) filter() (f filter, err error) {
	if p.text == "" {
		return nil, nil
	}
	for {
		s, err := p.selector()
		if err != nil {
			return nil, err
		}
		f = append(f, s)
		if p.space(); p.rest == "" {
			return f, nil
		}
		if !p.take(",") {
			return nil, p.errorf("a comma is expected")
		}
	}
}

func (p *filterParser) selector() (s selector, err error) {
	for {
		p.space()
		f, err := p.field()
		if err != nil {
			return s, err
		}
		s.path = append(s.path, f)
		if p.space(); !p.take(".") {
			break
		}
	}
	if p.rest == "" || p.rest[0] == ',' {
		return s, nil
	}
	for _, op := range []string{"==", "!=", "~="} {
		if p.take(op) {
			s.op = op
			break
		}
	}
	if s.op == "" {
		return s, p.errorf("one of == != ~= is expected")
	}
	p.space()
	if s.value, err = p.value(s.op == "~="); err != nil {
		return s, err
	}
	if s.op == "~=" {
		if s.re, err = regexp.Compile(s.value); err != nil {
			return s, p.errorf("no regular expression (" + err.Error() + ")")
		}
	}
	return s, nil
}

func (p *filterParser) field() (string, error) {
	if strings.HasPrefix(p.rest, `"`) {
		return p.quoted('"')
	}
	n := 0
	for n < len(p.rest) && (p.rest[n] == '_' || isAlnum(p.rest[n])) {
		n++
	}
	if n == 0 {
		return "", p.errorf("a field is expected")
	}
	f := p.rest[:n]
	p.rest = p.rest[n:]
	return f, nil
}

func isAlnum(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

func (p *filterParser) value(regex bool) (string, error) {
	if p.rest != "" && (p.rest[0] == '"' || regex && (p.rest[0] == '/' || p.rest[0] == '|')) {
		return p.quoted(p.rest[0])
	}
	n := strings.IndexFunc(p.rest, func(r rune) bool { return r == ',' || unicode.IsSpace(r) })
	if n < 0 {
		n = len(p.rest)
	}
	if n == 0 {
		return "", p.errorf("a value is expected")
	}
	v := p.rest[:n]
	p.rest = p.rest[n:]
	return v, nil
}

// quoted reads a string between two quotation marks, with the escapes of Go.
func (p *filterParser) quoted(mark byte) (string, error) {
	var b strings.Builder
	for s := p.rest[1:]; s != ""; {
		if s[0] == mark {
			p.rest = s[1:]
			return b.String(), nil
		}
		if len(s) > 1 && s[0] == '\\' && s[1] == mark {
			b.WriteByte(mark)
			s = s[2:]
			continue
		}
		quote := byte(0)
		if mark == '"' {
			quote = mark
		}
		c, _, tail, err := strconv.UnquoteChar(s, quote)
		if err != nil {
			return "", p.errorf("a string with a wrong escape")
		}
		b.WriteRune(c)
		s = tail
	}
	return "", p.errorf("a string without an end")
}
