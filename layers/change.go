package layers

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// change is one instruction of --change, which means what it means in a Dockerfile
// for docker commit and docker import.
type change struct {
	text  string
	apply func(*configEditor) error
}

// changeVerbs are the instructions, and how what follows them is read. What can be
// told without an image is an error of reading.
var changeVerbs = map[string]func(arg string) (func(*configEditor) error, error){
	"CMD":         parseCmd,
	"ENTRYPOINT":  parseEntrypoint,
	"ENV":         parseEnv,
	"EXPOSE":      parseExpose,
	"HEALTHCHECK": parseHealthcheck,
	"LABEL":       parseLabel,
	"ONBUILD":     parseOnbuild,
	"STOPSIGNAL":  parseWord("StopSignal"),
	"USER":        parseWord("User"),
	"VOLUME":      parseVolume,
	"WORKDIR":     parseWorkdir,
}

// parseChanges reads instructions, of which one text may hold several, on lines.
func parseChanges(texts []string) (out []change, err error) {
	for _, text := range texts {
		list := instructions(text)
		if len(list) == 0 {
			return nil, fmt.Errorf("%w: change %q: no instruction", ErrInvalid, text)
		}
		for _, l := range list {
			verb, arg := cutSpace(l)
			parse := changeVerbs[strings.ToUpper(verb)]
			if parse == nil {
				return nil, fmt.Errorf("%w: change %q: expected one of %s", ErrInvalid, l, strings.Join(sortedNames(changeVerbs), ", "))
			}
			c := change{text: l}
			if c.apply, err = parse(arg); err != nil {
				return nil, c.wrap(err)
			}
			out = append(out, c)
		}
	}
	return out, nil
}

func (c change) wrap(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: change %q: %w", ErrInvalid, c.text, err)
}

// instructions gives the lines of a text without comments, those that end with a
// backslash with what follows them.
func instructions(text string) (out []string) {
	var line string
	for l := range strings.Lines(text) {
		l = strings.TrimRightFunc(l, unicode.IsSpace)
		if t := strings.TrimSpace(l); t == "" || t[0] == '#' {
			continue
		}
		body, more := strings.CutSuffix(l, `\`)
		if more && strings.HasSuffix(body, `\`) { // it stands for itself
			body, more = l, false
		}
		if line += body; !more {
			out, line = append(out, strings.TrimSpace(line)), ""
		}
	}
	if line = strings.TrimSpace(line); line != "" {
		out = append(out, line)
	}
	return out
}

// cutSpace is what is before and after the first white space.
func cutSpace(s string) (first, rest string) {
	i := strings.IndexFunc(s, unicode.IsSpace)
	if i < 0 {
		return s, ""
	}
	return s[:i], strings.TrimSpace(s[i:])
}

// configEditor changes the "config" object of an image config.
type configEditor struct {
	config map[string]json.RawMessage
	cmdSet bool // by one of these changes
}

func (e *configEditor) get(key string, v any) error {
	raw := e.config[key]
	if raw == nil {
		return nil
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return fmt.Errorf("the image's %s: %w", key, err)
	}
	return nil
}

func (e *configEditor) set(key string, v any) error {
	raw, err := json.Marshal(v)
	e.config[key] = raw
	return err
}

// add puts names into an object whose keys alone count.
func (e *configEditor) add(key string, names []string) error {
	m := map[string]struct{}{}
	if err := e.get(key, &m); err != nil {
		return err
	}
	if m == nil {
		m = map[string]struct{}{}
	}
	for _, n := range names {
		m[n] = struct{}{}
	}
	return e.set(key, m)
}

// expand replaces the variables of words, and takes their quotes away.
func (e *configEditor) expand(words ...string) ([]string, error) {
	var env []string
	if err := e.get("Env", &env); err != nil {
		return nil, err
	}
	out := make([]string, len(words))
	for i, w := range words {
		var err error
		if out[i], err = expandWord(w, env); err != nil {
			return nil, err
		}
	}
	return out, nil
}

var errNothing = errors.New("nothing after the instruction")

// jsonList reads the form ["a", "b"]; nil if it is none.
func jsonList(s string) ([]string, error) {
	var any []any
	if !strings.HasPrefix(s, "[") || json.Unmarshal([]byte(s), &any) != nil {
		return nil, nil
	}
	list := []string{}
	for _, v := range any {
		s, ok := v.(string)
		if !ok {
			return nil, errors.New("a list in JSON may hold nothing but strings")
		}
		list = append(list, s)
	}
	return list, nil
}

// command is the exec form, or the shell form run by a shell. Without anything it is
// the empty list.
func command(s string) ([]string, error) {
	if l, err := jsonList(s); l != nil || err != nil {
		return l, err
	}
	if s == "" {
		return []string{}, nil
	}
	return []string{"/bin/sh", "-c", s}, nil
}

func parseCmd(arg string) (func(*configEditor) error, error) {
	cmd, err := command(arg)
	return func(e *configEditor) error { e.cmdSet = true; return e.set("Cmd", cmd) }, err
}

// parseEntrypoint: arguments that were meant for another program go with it.
func parseEntrypoint(arg string) (func(*configEditor) error, error) {
	cmd, err := command(arg)
	return func(e *configEditor) error {
		if !e.cmdSet && len(cmd) > 0 {
			delete(e.config, "Cmd")
		}
		return e.set("Entrypoint", cmd)
	}, err
}

func parseEnv(arg string) (func(*configEditor) error, error) {
	words, err := keyValues(arg)
	return func(e *configEditor) error {
		words, err := e.expand(words...) // with the values before this instruction
		if err != nil {
			return err
		}
		var env []string
		if err := e.get("Env", &env); err != nil {
			return err
		}
		for i := 0; i < len(words); i += 2 {
			key, value := words[i], words[i+1]
			if key == "" {
				return errors.New("a name is empty")
			}
			at := slices.IndexFunc(env, func(v string) bool { return strings.HasPrefix(v, key+"=") })
			if at < 0 {
				at, env = len(env), append(env, "")
			}
			env[at] = key + "=" + value
		}
		return e.set("Env", env)
	}, err
}

func parseLabel(arg string) (func(*configEditor) error, error) {
	words, err := keyValues(arg)
	return func(e *configEditor) error {
		words, err := e.expand(words...)
		if err != nil {
			return err
		}
		labels := map[string]string{}
		if err := e.get("Labels", &labels); err != nil {
			return err
		}
		if labels == nil {
			labels = map[string]string{}
		}
		for i := 0; i < len(words); i += 2 {
			if words[i] == "" {
				return errors.New("a name is empty")
			}
			labels[words[i]] = words[i+1]
		}
		return e.set("Labels", labels)
	}, err
}

func parseExpose(arg string) (func(*configEditor) error, error) {
	if arg == "" {
		return nil, errNothing
	}
	return func(e *configEditor) error {
		words, err := e.expand(strings.Fields(arg)...)
		if err != nil {
			return err
		}
		var all []string
		for _, spec := range strings.Fields(strings.Join(words, " ")) {
			ports, err := portRange(spec)
			if err != nil {
				return err
			}
			all = append(all, ports...)
		}
		return e.add("ExposedPorts", all)
	}, nil
}

// portRange reads [[IP:]PORTS:]PORT[-PORT][/PROTOCOL], of which the image has the ports
// of the container alone.
func portRange(spec string) (out []string, err error) {
	ports, proto, _ := strings.Cut(spec, "/")
	if proto = strings.ToLower(proto); proto == "" {
		proto = "tcp"
	}
	if !slices.Contains([]string{"tcp", "udp", "sctp"}, proto) {
		return nil, fmt.Errorf("port %q: expected tcp, udp or sctp behind the slash", spec)
	}
	first, last, isRange := strings.Cut(ports[strings.LastIndex(ports, ":")+1:], "-")
	if !isRange {
		last = first
	}
	from, err := strconv.ParseUint(first, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("port %q: expected a number up to 65535, or two with a dash", spec)
	}
	to, err := strconv.ParseUint(last, 10, 16)
	if err != nil || to < from {
		return nil, fmt.Errorf("port %q: expected a number from %d to 65535 behind the dash", spec, from)
	}
	for p := from; p <= to; p++ {
		out = append(out, strconv.FormatUint(p, 10)+"/"+proto)
	}
	return out, nil
}

func parseVolume(arg string) (func(*configEditor) error, error) {
	list, err := jsonList(arg)
	if list == nil {
		list = strings.Fields(arg)
	}
	if err == nil && len(list) == 0 {
		err = errNothing
	}
	return func(e *configEditor) error {
		names, err := e.expand(list...)
		if err != nil {
			return err
		}
		for i, n := range names {
			if names[i] = strings.TrimSpace(n); names[i] == "" {
				return errors.New("a volume has an empty name")
			}
		}
		return e.add("Volumes", names)
	}, err
}

// parseWord is an instruction whose whole argument is one word.
func parseWord(key string) func(string) (func(*configEditor) error, error) {
	return func(arg string) (func(*configEditor) error, error) {
		if arg == "" {
			return nil, errNothing
		}
		return func(e *configEditor) error {
			words, err := e.expand(arg)
			if err != nil {
				return err
			}
			return e.set(key, words[0])
		}, nil
	}
}

func parseWorkdir(arg string) (func(*configEditor) error, error) {
	if arg == "" {
		return nil, errNothing
	}
	return func(e *configEditor) error {
		words, err := e.expand(arg)
		if err != nil {
			return err
		}
		dir, was := words[0], ""
		if dir == "" {
			return errors.New("an empty name")
		}
		if err := e.get("WorkingDir", &was); err != nil {
			return err
		}
		if !path.IsAbs(dir) {
			dir = path.Join("/", was, dir)
		}
		return e.set("WorkingDir", dir)
	}, nil
}

func parseOnbuild(arg string) (func(*configEditor) error, error) {
	if arg == "" {
		return nil, errNothing
	}
	switch verb, _ := cutSpace(arg); strings.ToUpper(verb) {
	case "ONBUILD", "FROM", "MAINTAINER":
		return nil, fmt.Errorf("%s cannot wait for another build", verb)
	}
	return func(e *configEditor) error {
		var list []string
		if err := e.get("OnBuild", &list); err != nil {
			return err
		}
		return e.set("OnBuild", append(list, arg))
	}, nil
}

// healthcheck is a check of a container as docker has it. Times are nanoseconds.
type healthcheck struct {
	Test        []string      `json:",omitempty"`
	Interval    time.Duration `json:",omitempty"`
	Timeout     time.Duration `json:",omitempty"`
	StartPeriod time.Duration `json:",omitempty"`
	Retries     int           `json:",omitempty"`
}

func parseHealthcheck(arg string) (func(*configEditor) error, error) {
	h := healthcheck{}
	flags := map[string]bool{}
	for strings.HasPrefix(arg, "--") {
		var flag string
		flag, arg = cutSpace(arg)
		name, value, _ := strings.Cut(flag[2:], "=")
		if flags[name] {
			return nil, fmt.Errorf("--%s twice", name)
		}
		flags[name] = true
		if err := h.flag(name, value); err != nil {
			return nil, err
		}
	}
	switch kind, rest := cutSpace(arg); strings.ToUpper(kind) {
	case "NONE":
		if rest != "" {
			return nil, errors.New("NONE takes no arguments")
		}
		h = healthcheck{Test: []string{"NONE"}}
	case "CMD":
		list, err := jsonList(rest)
		if err != nil {
			return nil, err
		}
		if rest == "" || list != nil && len(list) == 0 {
			return nil, errors.New("no command after CMD")
		}
		if h.Test = append([]string{"CMD"}, list...); list == nil {
			h.Test = []string{"CMD-SHELL", rest}
		}
	default:
		return nil, errors.New("expected [--interval=T] [--timeout=T] [--start-period=T] [--retries=N] CMD COMMAND, or NONE")
	}
	return func(e *configEditor) error {
		var was healthcheck
		if err := e.get("Healthcheck", &was); err != nil {
			return err
		}
		now := h // what it does not say stays
		if now.Interval == 0 {
			now.Interval = was.Interval
		}
		if now.Timeout == 0 {
			now.Timeout = was.Timeout
		}
		if now.StartPeriod == 0 {
			now.StartPeriod = was.StartPeriod
		}
		if now.Retries == 0 {
			now.Retries = was.Retries
		}
		return e.set("Healthcheck", now)
	}, nil
}

func (h *healthcheck) flag(name, value string) error {
	times := map[string]*time.Duration{"interval": &h.Interval, "timeout": &h.Timeout, "start-period": &h.StartPeriod}
	t := times[name]
	switch {
	case t == nil && name != "retries":
		return fmt.Errorf("unknown option --%s", name)
	case value == "":
		return fmt.Errorf("--%s: expected --%s=VALUE", name, name)
	case t == nil:
		n, err := strconv.Atoi(value)
		if err != nil || n < 1 {
			return fmt.Errorf("--retries=%s: expected a number of at least 1", value)
		}
		h.Retries = n
	default:
		d, err := time.ParseDuration(value)
		if err != nil || d < time.Millisecond {
			return fmt.Errorf("--%s=%s: expected a time of at least 1ms, as 30s", name, value)
		}
		*t = d
	}
	return nil
}

// keyValues reads K=V K2="v w", and the old form K V. Keys and values alternate, and
// have their quotes and variables still.
func keyValues(s string) ([]string, error) {
	words := quotedWords(s)
	if len(words) == 0 {
		return nil, errNothing
	}
	if !strings.Contains(words[0], "=") {
		k, v := cutSpace(s)
		if v == "" {
			return nil, errors.New("expected KEY=VALUE")
		}
		return []string{k, v}, nil
	}
	var out []string
	for _, w := range words {
		k, v, ok := strings.Cut(w, "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("%q: expected KEY=VALUE", w)
		}
		out = append(out, k, v)
	}
	return out, nil
}

// quotedWords splits at white space that is neither quoted nor behind a backslash. The
// words stay as they are written.
func quotedWords(s string) (out []string) {
	var word strings.Builder
	var quote rune
	escaped := false
	for _, c := range s {
		switch {
		case escaped:
			escaped = false
		case c == '\\' && quote != '\'':
			escaped = true
		case quote != 0 && c == quote:
			quote = 0
		case quote != 0:
		case c == '\'' || c == '"':
			quote = c
		case unicode.IsSpace(c):
			if word.Len() > 0 {
				out = append(out, word.String())
				word.Reset()
			}
			continue
		}
		word.WriteRune(c)
	}
	if word.Len() > 0 {
		out = append(out, word.String())
	}
	return out
}
