package sandbox

import (
	"fmt"
	"path"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// DefaultPath is the PATH of a command whose image names none; docker's.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Process is what runs in the root.
type Process struct {
	Args []string `json:"args,omitempty"` // none: the first of Shells that the image has
	Env  []string `json:"env,omitempty"`
	Cwd  string   `json:"cwd"`  // absolute and clean
	User string   `json:"user"` // see LookupUser
}

// Shells are what is started when neither image nor user names a command.
var Shells = []string{"/bin/bash", "/bin/sh"}

// ProcessOptions are what a user wants otherwise than the image.
type ProcessOptions struct {
	Command []string // behind the entrypoint, in place of the image's Cmd
	// Entrypoint replaces the image's, and its Cmd as well; a pointer to "" is none.
	Entrypoint *string
	Env        []string // KEY=VALUE, or KEY to take it away
	User       string
	Cwd        string
}

// ProcessOf combines the configuration of an image with the wishes of a user, by
// the rules of docker run.
func ProcessOf(c ocispec.ImageConfig, o ProcessOptions) (Process, error) {
	p := Process{User: c.User, Cwd: c.WorkingDir}
	entrypoint, cmd := c.Entrypoint, c.Cmd
	if o.Entrypoint != nil {
		entrypoint, cmd = nil, nil
		if *o.Entrypoint != "" {
			entrypoint = []string{*o.Entrypoint}
		}
	}
	if len(o.Command) > 0 {
		cmd = o.Command
	}
	p.Args = slices.Concat(entrypoint, cmd)
	if len(p.Args) > 0 && p.Args[0] == "" {
		return Process{}, fmt.Errorf("the first word of the command %q is empty", p.Args)
	}
	if o.User != "" {
		p.User = o.User
	}
	if o.Cwd != "" {
		p.Cwd = o.Cwd
	}
	// By text, as the engines do: a link of the image does not change what ".." is.
	p.Cwd = path.Clean("/" + p.Cwd)
	for _, e := range c.Env {
		if name, _, ok := strings.Cut(e, "="); ok && name != "" { // the rest could not be read by anyone
			p.Env = SetEnv(p.Env, e)
		}
	}
	p.Env = defaultEnv(p.Env, "PATH", DefaultPath)
	for _, e := range o.Env {
		if name, _, ok := strings.Cut(e, "="); name == "" {
			return Process{}, fmt.Errorf("environment %q: no name", e)
		} else if ok {
			p.Env = SetEnv(p.Env, e)
		} else {
			p.Env = slices.DeleteFunc(p.Env, func(have string) bool { return envName(have) == name })
		}
	}
	for _, s := range slices.Concat(p.Args, p.Env, []string{p.Cwd, p.User}) {
		if strings.ContainsRune(s, 0) {
			return Process{}, fmt.Errorf("%q has a NUL in it: no program could be given that", s)
		}
	}
	return p, nil
}

// SetEnv sets a variable; one that is there stays where it is in the order.
func SetEnv(env []string, assignment string) []string {
	name := envName(assignment)
	for i, e := range env {
		if envName(e) == name {
			env[i] = assignment
			return env
		}
	}
	return append(env, assignment)
}

// defaultEnv sets a variable that is not there.
func defaultEnv(env []string, name, value string) []string {
	if slices.ContainsFunc(env, func(e string) bool { return envName(e) == name }) {
		return env
	}
	return append(env, name+"="+value)
}

func envName(assignment string) string {
	name, _, _ := strings.Cut(assignment, "=")
	return name
}

// Notes tells what the configuration of an image asks for and does not get: a
// sentence each.
func Notes(c ocispec.ImageConfig) []string {
	var notes []string
	if v := keys(c.Volumes); len(v) > 0 {
		notes = append(notes, "the image declares volumes ("+strings.Join(v, ", ")+
			"): they are directories of the container like all others; -v binds one of yours")
	}
	if p := keys(c.ExposedPorts); len(p) > 0 {
		notes = append(notes, "the image declares ports ("+strings.Join(p, ", ")+"): the network is that of this machine, nothing is mapped")
	}
	return notes
}

func keys(m map[string]struct{}) []string {
	var ks []string
	for k := range m {
		ks = append(ks, k)
	}
	slices.Sort(ks)
	return ks
}

// ShellOf returns the first of [Shells] that the root behind rootFd has, the last
// one if it has none.
func ShellOf(rootFd int) string {
	for _, sh := range Shells[:len(Shells)-1] {
		if fd, err := fsat.OpenInRoot(rootFd, sh, unix.O_PATH); err == nil {
			_ = unix.Close(fd)
			return sh
		}
	}
	return Shells[len(Shells)-1]
}
