package trace

import (
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Filter says which events somebody wants. An empty field wants all.
type Filter struct {
	// Ops are names of operations, or of groups of them (see [Groups]).
	Ops []string `json:"ops,omitempty"`
	// Path is a pattern for Path or To, see [MatchPath].
	Path string `json:"path,omitempty"`
	// Pids are processes or threads.
	Pids []uint32 `json:"pids,omitempty"`
	// Commands are names of processes, as in /proc/PID/comm.
	Commands []string `json:"commands,omitempty"`
	// Errors are names as ENOENT; "any" is each error, "none" none.
	Errors []string `json:"errors,omitempty"`
	// Slower leaves out what took less.
	Slower time.Duration `json:"slower,omitempty"`
	// Layers are as in Event.Layer or Event.Label; "lower" is each of the lowers.
	Layers []string `json:"layers,omitempty"`
	// CopyUps leaves out what has copied nothing up.
	CopyUps bool `json:"copyUps,omitempty"`
}

// Groups are operations that belong together.
var Groups = map[string][]string{
	"name":   {"lookup", "create", "mknod", "mkdir", "symlink", "link", "unlink", "rmdir", "rename", "rename2", "tmpfile"},
	"attr":   {"getattr", "statx", "setattr", "getxattr", "setxattr", "listxattr", "removexattr"},
	"data":   {"read", "write", "copy_file_range", "fallocate", "lseek"},
	"dir":    {"opendir", "readdir", "readdirplus", "releasedir"},
	"sync":   {"fsync", "fsyncdir", "syncfs", "flush"},
	"change": {"create", "mknod", "mkdir", "symlink", "link", "unlink", "rmdir", "rename", "rename2", "tmpfile", "setattr", "setxattr", "removexattr", "write", "copy_file_range", "fallocate"},
}

// layerWords are the forms of Event.Label.
var layerWords = regexp.MustCompile(`^(layer \d+ of \d+|init layer)$`)

// Validate reports what can never match. ops are the names of all operations.
func (f *Filter) Validate(ops []string) error {
	for _, o := range f.Ops {
		if !slices.Contains(ops, o) && Groups[o] == nil {
			return fmt.Errorf("unknown operation %q: expected one of %s, or a group: %s", o, strings.Join(ops, ", "), strings.Join(groupNames(), ", "))
		}
	}
	for _, l := range f.Layers {
		if layerWords.MatchString(l) {
			continue
		}
		n, numbered := strings.CutPrefix(l, "lower:")
		if i, err := strconv.Atoi(n); l != "upper" && l != "lower" && (!numbered || err != nil || i < 1) {
			return fmt.Errorf("unknown layer %q: expected upper, lower, lower:N (lower:1 is the topmost), or a name as layer 2 of 3", l)
		}
	}
	for _, n := range f.Errors {
		if n != "any" && n != "none" && ErrnoOf(n) == 0 {
			return fmt.Errorf("unknown error %q: expected a name as ENOENT, any or none", n)
		}
	}
	if f.Slower < 0 {
		return errors.New("a negative time")
	}
	return ValidatePath(f.Path)
}

func groupNames() []string {
	var names []string
	for n := range Groups {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// same are requests that come in another one's place, as the kernel likes.
var same = map[string]string{"rename2": "rename", "readdirplus": "readdir", "statx": "getattr"}

// HasOp reports whether op is in a list of operations and groups. An empty one has all.
// Who says rename, readdir or getattr means the newer forms as well.
func HasOp(list []string, op string) bool {
	return len(list) == 0 || slices.ContainsFunc(list, func(o string) bool {
		return o == op || o == same[op] || slices.Contains(Groups[o], op)
	})
}

// Match reports whether e is wanted.
func (f *Filter) Match(e *Event) bool {
	return HasOp(f.Ops, e.Op) &&
		(f.Path == "" || e.MatchPath(f.Path)) &&
		(len(f.Pids) == 0 || slices.Contains(f.Pids, e.Pid) || slices.Contains(f.Pids, e.Thread)) &&
		(len(f.Commands) == 0 || slices.Contains(f.Commands, e.Command)) &&
		(len(f.Errors) == 0 || slices.ContainsFunc(f.Errors, func(n string) bool {
			return n == "any" && e.Error != "" || n == "none" && e.Error == "" || strings.EqualFold(n, e.Error) && n != ""
		})) &&
		e.Latency >= f.Slower &&
		(len(f.Layers) == 0 || slices.ContainsFunc(f.Layers, func(l string) bool {
			return l == e.Layer || l == e.Label && l != "" || l == "lower" && strings.HasPrefix(e.Layer, "lower:")
		})) &&
		(!f.CopyUps || e.CopiedUp)
}

// MatchPath reports whether a pattern matches the path of e, or its new one. What a symbolic
// link leads to is no path in the mount.
func (e *Event) MatchPath(pattern string) bool {
	return MatchPath(pattern, e.Path) || e.Op != "symlink" && e.Op != "readlink" && MatchPath(pattern, e.To)
}

// ValidatePath reports a pattern that no path can match.
func ValidatePath(pattern string) error {
	if pattern == "" {
		return nil
	}
	if !strings.HasPrefix(pattern, "/") && strings.Contains(strings.TrimSuffix(pattern, "/**"), "/") {
		return fmt.Errorf("pattern %q: begin it with / (the root of the mount), or give a name without any", pattern)
	}
	if _, err := path.Match(strings.TrimSuffix(pattern, "/**"), ""); err != nil {
		return fmt.Errorf("pattern %q: %w", pattern, err)
	}
	return nil
}

// MatchPath reports whether a path in the mount matches a pattern: as path.Match, "*" and "?"
// not matching a slash; with /** at its end the directory and all that is below; and without
// any slash the last name of the path alone. What is no path from the root matches nothing.
func MatchPath(pattern, p string) bool {
	if !strings.HasPrefix(p, "/") {
		return false
	}
	dir, below := strings.CutSuffix(pattern, "/**")
	if !strings.HasPrefix(pattern, "/") {
		dir = "/" + dir
		for p != "/" {
			base, rest := "/"+path.Base(p), path.Dir(p)
			if ok, _ := path.Match(dir, base); ok { // the pattern was looked at
				return true
			}
			if !below {
				return false
			}
			p = rest
		}
		return false
	}
	if dir == "" {
		return true // "/**"
	}
	for {
		if ok, _ := path.Match(dir, p); ok {
			return true
		}
		if !below || p == "/" {
			return false
		}
		p = path.Dir(p)
	}
}
