package layers

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
)

// expandMax bounds what a word can become: a variable that names itself twice doubles
// with every instruction.
const expandMax = 1 << 20

// noRune is no character of any text.
const noRune = rune(-1)

// expandWord replaces variables and takes quotes away, as in a Dockerfile: $A, ${A}, and
// with a word ${A:-word} (if it is empty), ${A:+word} (if it is not), ${A:?word} (an error
// if it is); without the colon it counts whether there is such a variable. Nothing is
// replaced between single quotes, and no character behind a backslash means anything.
func expandWord(word string, env []string) (string, error) {
	x := expander{[]rune(word), env}
	return x.until(noRune)
}

type expander struct {
	rest []rune
	env  []string
}

func (x *expander) peek() rune {
	if len(x.rest) == 0 {
		return noRune
	}
	return x.rest[0]
}

func (x *expander) next() rune {
	c := x.peek()
	if c != noRune {
		x.rest = x.rest[1:]
	}
	return c
}

// until reads to a character, which is taken away.
func (x *expander) until(stop rune) (string, error) {
	var b strings.Builder
	for {
		c := x.next()
		if c == stop {
			return b.String(), nil
		}
		var s string
		var err error
		switch c {
		case noRune:
			return "", fmt.Errorf("a %c is missing", stop)
		case '\'':
			s, err = x.single()
		case '"':
			s, err = x.double()
		case '$':
			s, err = x.variable()
		case '\\':
			if c = x.next(); c == noRune {
				continue
			}
			s = string(c)
		default:
			s = string(c)
		}
		if err != nil {
			return "", err
		}
		if b.WriteString(s); b.Len() > expandMax {
			return "", fmt.Errorf("a word becomes longer than %d bytes", expandMax)
		}
	}
}

func (x *expander) single() (string, error) {
	for i, c := range x.rest {
		if c == '\'' {
			s := string(x.rest[:i])
			x.rest = x.rest[i+1:]
			return s, nil
		}
	}
	return "", errors.New("a quote is not closed")
}

func (x *expander) double() (string, error) {
	var b strings.Builder
	for {
		s := ""
		switch c := x.next(); c {
		case noRune:
			return "", errors.New("a quote is not closed")
		case '"':
			return b.String(), nil
		case '$':
			var err error
			if s, err = x.variable(); err != nil {
				return "", err
			}
		case '\\': // before anything else it stands for itself
			switch x.peek() {
			case noRune:
			case '"', '$', '\\':
				s = string(x.next())
			default:
				s = `\`
			}
		default:
			s = string(c)
		}
		if b.WriteString(s); b.Len() > expandMax {
			return "", fmt.Errorf("a word becomes longer than %d bytes", expandMax)
		}
	}
}

// variable reads what follows a dollar.
func (x *expander) variable() (string, error) {
	if x.peek() != '{' {
		name := x.name()
		if name == "" {
			return "$", nil
		}
		value, _ := x.lookup(name)
		return value, nil
	}
	x.next()
	name := x.name()
	if name == "" {
		return "", errors.New("no name after ${")
	}
	value, set := x.lookup(name)
	op := x.next()
	if op == '}' {
		return value, nil
	}
	if op == ':' {
		op, set = x.next(), value != ""
	}
	if !strings.ContainsRune("-+?", op) {
		return "", fmt.Errorf("expected }, :-, :+ or :? after ${%s", name)
	}
	word, err := x.until('}')
	switch {
	case err != nil:
		return "", err
	case op == '?' && !set:
		return "", fmt.Errorf("the variable %s is not set: %s", name, word)
	case op == '-' && !set, op == '+' && set:
		return word, nil
	case op == '+':
		return "", nil
	}
	return value, nil
}

// name is that of a variable: letters, digits and underscores, or digits alone, or one of
// the characters that are variables of a shell, which are never set here.
func (x *expander) name() string {
	if strings.ContainsRune("@*#?-$!", x.peek()) {
		return string(x.next())
	}
	digits := unicode.IsDigit(x.peek())
	n := 0
	for n < len(x.rest) && (unicode.IsDigit(x.rest[n]) || !digits && (unicode.IsLetter(x.rest[n]) || x.rest[n] == '_')) {
		n++
	}
	name := string(x.rest[:n])
	x.rest = x.rest[n:]
	return name
}

func (x *expander) lookup(name string) (value string, ok bool) {
	for _, e := range x.env {
		if k, v, _ := strings.Cut(e, "="); k == name {
			return v, true
		}
	}
	return "", false
}
