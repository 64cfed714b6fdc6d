package oracle

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/plyfs/plyfs/integration/harness"
)

// Parse reads a named case:
//
//	# comment
//	[upper]                     entries of the upper directory
//	[lower]                     entries of a lower; the first is the topmost
//	d dir mode=01777 uid=0 gid=0 mtime=1000000000.5 fill=100
//	o dir                       opaque directory
//	f file text="some text" x:user.a=1
//	f file size=4096 seed=1 sparse=1 flags=i
//	l link target
//	h hardlink target           target is a path in the same layer
//	p fifo    s socket    c char 1:3    b block 4095:77
//	w whiteout    x xwhiteout
//	[options]
//	readonly    roflag    agents=2    noremount    notree    userxattr
//	noatime    nodiratime    strictatime
//	lowers=xfs    upper=tmpfs:1000000              what they lie on, see harness.NewPlace
//	index=on    redirect_dir=on    metacopy=on     of the mounts, see harness.Defaults
//	[ops]
//	mkdir dir mode=0755
//	u1 rename from to flags=EXCHANGE     as Users[1]
//	p1 flock fd=1 flags=EX               by the second process
//	fstat fd=0 expect="…"                the subject differs from the kernel
//
// Words are separated by spaces and may be quoted as in Go; in a name, \x20 is
// a space. The first word after the operation is Path, the second To.
func Parse(r io.Reader) (*Trial, error) {
	t := &Trial{}
	section := ""
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if strings.HasPrefix(line, "[") {
			section = strings.Trim(line, "[]")
			if section == "lower" {
				t.Recipe.Lowers = append(t.Recipe.Lowers, Layer{})
			}
			continue
		}
		words, err := splitWords(line)
		if err == nil {
			err = t.parseLine(section, words)
		}
		if err != nil {
			return nil, fmt.Errorf("line %d: %q: %w", n, line, err)
		}
	}
	return t, sc.Err()
}

func (t *Trial) parseLine(section string, words []string) error {
	switch section {
	case "upper":
		e, err := parseEntry(words)
		t.Recipe.Upper.Entries = append(t.Recipe.Upper.Entries, e)
		return err
	case "lower":
		e, err := parseEntry(words)
		l := &t.Recipe.Lowers[len(t.Recipe.Lowers)-1]
		l.Entries = append(l.Entries, e)
		return err
	case "options":
		for _, w := range words {
			switch key, value, _ := strings.Cut(w, "="); key {
			case "readonly":
				t.ReadOnly = true
			case "roflag":
				t.ROFlag = true
			case "noremount":
				t.NoRemount = true
			case "notree":
				t.NoTree = true
			case "noatime", "nodiratime", "strictatime":
				t.Atime = w
			case "lowers":
				t.LowersOn = value
			case "upper":
				t.UpperOn = value
			case "userxattr":
				t.Dialect = w
			case "agents":
				n, err := strconv.Atoi(value)
				if err != nil {
					return err
				}
				t.Agents = n
			default:
				if _, ok := harness.Defaults[key]; ok {
					t.Options = append(t.Options, w)
					continue
				}
				return fmt.Errorf("unknown option %q", w)
			}
		}
		return nil
	case "ops":
		op, err := parseOp(words)
		t.Ops = append(t.Ops, op)
		return err
	}
	return fmt.Errorf("outside of [lower], [upper], [options] and [ops]")
}

// splitWords splits at spaces outside of double quotes, and removes quotes
// that surround a word or a value.
func splitWords(line string) ([]string, error) {
	var words []string
	for line != "" {
		end, quoted := 0, false
		for end < len(line) && (quoted || line[end] != ' ' && line[end] != '\t') {
			if line[end] == '\\' && quoted {
				end++
			} else if line[end] == '"' {
				quoted = !quoted
			}
			end++
		}
		if quoted || end > len(line) {
			return nil, fmt.Errorf("quote without end")
		}
		w := line[:end]
		if i := strings.IndexByte(w, '"'); i >= 0 {
			v, err := strconv.Unquote(w[i:])
			if err != nil {
				return nil, fmt.Errorf("word %s: %w", w, err)
			}
			w = w[:i] + v
		}
		words = append(words, w)
		line = strings.TrimLeft(line[end:], " \t")
	}
	return words, nil
}

var kindLetters = map[string]Kind{
	"d": Dir, "o": Opaque, "f": File, "l": Symlink, "h": Hardlink, "p": Fifo, "s": Socket, "c": Char, "b": Block,
	"w": Whiteout, "x": XWhiteout,
}

func parseEntry(words []string) (Entry, error) {
	var e Entry
	k, ok := kindLetters[words[0]]
	if !ok || len(words) < 2 {
		return e, fmt.Errorf("expected a letter and a path")
	}
	p, err := unquoteName(words[1])
	if err != nil {
		return e, err
	}
	e.Kind = k
	if p != "." {
		e.Path = p
	}
	for _, w := range words[2:] {
		key, value, ok := strings.Cut(w, "=")
		if !ok {
			if e.Kind == Char || e.Kind == Block {
				if _, err := fmt.Sscanf(w, "%d:%d", &e.Rdev[0], &e.Rdev[1]); err != nil {
					return e, err
				}
			} else if e.Target, err = unquoteName(w); err != nil {
				return e, err
			}
			continue
		}
		if a, ok := strings.CutPrefix(key, "x:"); ok {
			if e.Xattrs == nil {
				e.Xattrs = make(map[string]string)
			}
			e.Xattrs[a] = value
			continue
		}
		switch key {
		case "text":
			e.Text = value
			continue
		case "mtime":
			e.Mtime = value
			continue
		case "flags":
			e.Flags = value
			continue
		}
		n, err := strconv.ParseInt(value, 0, 64)
		if err != nil {
			return e, fmt.Errorf("%s: %w", w, err)
		}
		switch key {
		case "mode":
			e.Mode = uint32(n)
		case "uid":
			e.UID = int(n)
		case "gid":
			e.GID = int(n)
		case "size":
			e.Size = n
		case "seed":
			e.Seed = n
		case "fill":
			e.Fill = int(n)
		case "sparse":
			e.Sparse = n != 0
		default:
			return e, fmt.Errorf("unknown key %q", key)
		}
	}
	return e, nil
}

// ParseOp reads one operation in text form.
func ParseOp(line string) (Op, error) {
	words, err := splitWords(line)
	if err != nil {
		return Op{}, err
	}
	return parseOp(words)
}

func parseOp(words []string) (Op, error) {
	var op Op
	for len(words) > 0 && len(words[0]) == 2 && (words[0][0] == 'u' || words[0][0] == 'p') {
		n := int(words[0][1] - '0')
		if words[0][0] == 'u' {
			op.User = n
		} else {
			op.Agent = n
		}
		words = words[1:]
	}
	if len(words) == 0 {
		return op, fmt.Errorf("no operation")
	}
	op.Op = words[0]
	if ops[op.Op] == nil {
		return op, fmt.Errorf("unknown operation %q", op.Op)
	}
	place := 0
	for _, w := range words[1:] {
		key, value, ok := strings.Cut(w, "=")
		if !ok {
			key, value = "path", w
			if place > 0 {
				key = "to"
			}
			place++
		}
		if err := op.set(key, value); err != nil {
			return op, fmt.Errorf("%s: %w", w, err)
		}
	}
	return op, nil
}

func (o *Op) set(key, value string) (err error) {
	switch key {
	case "path":
		o.Path, err = unquoteName(value)
		if o.Path == "/" {
			o.Path = ""
		}
	case "to":
		o.To, err = unquoteName(value)
	case "flags":
		o.Flags = value
	case "expect":
		o.Expect = value
	case "text":
		o.Text = value
	case "attr":
		o.Attr = value
	case "value":
		o.Value = value
	case "atime":
		o.Atime = value
	case "mtime":
		o.Mtime = value
	default:
		var n int64
		if n, err = strconv.ParseInt(value, 0, 64); err != nil {
			return err
		}
		switch key {
		case "mode":
			o.Mode = uint32(n)
		case "uid":
			o.UID = int(n)
		case "gid":
			o.GID = int(n)
		case "fd":
			o.FD = int(n)
		case "fd2":
			o.FD2 = int(n)
		case "off":
			o.Off = n
		case "off2":
			o.Off2 = n
		case "len":
			o.Len = n
		case "seed":
			o.Seed = n
		case "rel":
			o.Rel = n != 0
		default:
			return fmt.Errorf("unknown key %q", key)
		}
	}
	return err
}
