package main

import (
	"context"
	"fmt"
	"os/exec"
	"strings"

	"github.com/plyfs/plyfs/integration/harness"
)

// kind is how a system mounts.
type kind int

const (
	plyfs kind = iota
	kernel
	fuseOverlayfs
	unionfsFuse
	mergerfs
	native  // the plain merged directory
	program // no mount: podman, skopeo
)

// system is one column of the tables.
type system struct {
	Name   string
	Column string // heading
	About  string
	kind   kind
	// store: the image is loaded into a store of plyfs, and a container of it
	// is mounted.
	store bool
	// base: the binary is the one that -base names.
	base bool
	// io is the policy of plyfs for contents of files; empty: the default.
	io string
	// readOnly: mounted without an upper.
	readOnly bool
	// extra systems run only in the tables named, to save time.
	tables []string
	// goal is the letter under which the system has goals.
	goal string
	// pkg is the Debian package to install when the program tool is missing.
	tool, pkg string
}

// systems are all that can be compared. The order is that of the columns.
var systems = []system{
	{Name: "kernel", Column: "kernel", About: "kernel overlayfs: what the ratios refer to", kind: kernel},
	{Name: "plyfs", Column: "plyfs C", About: "plyfs, writable, default I/O policy", kind: plyfs, goal: "C"},
	{Name: "plyfs-base", Column: "base", About: "as plyfs, with the binary of -base", kind: plyfs, base: true},
	{Name: "plyfs-noopen", Column: "plyfs N", About: "plyfs, writable, io=noopen", kind: plyfs, io: "noopen", goal: "N"},
	{Name: "plyfs-ro", Column: "plyfs R", About: "plyfs without an upper, default I/O policy", kind: plyfs, readOnly: true, goal: "R"},
	{Name: "plyfs-store", Column: "plyfs S", About: "container of plyfs' store, with its index and metacopy; default I/O policy", kind: plyfs, store: true, tables: []string{"metadata", "small", "copyup", "layers"}, goal: "S"},
	{Name: "plyfs-cache", Column: "plyfs io=cache", About: "plyfs, writable, io=cache", kind: plyfs, io: "cache", tables: []string{"small", "large"}},
	{Name: "plyfs-passthrough", Column: "plyfs io=passthrough", About: "plyfs, writable, io=passthrough", kind: plyfs, io: "passthrough", tables: []string{"small", "large"}},
	{Name: "fuse-overlayfs", Column: "fuse-overlayfs", About: "fuse-overlayfs", kind: fuseOverlayfs, tool: "fuse-overlayfs", pkg: "fuse-overlayfs"},
	{Name: "unionfs-fuse", Column: "unionfs-fuse", About: "unionfs-fuse, read-only", kind: unionfsFuse, readOnly: true, tables: []string{"metadata", "small", "large"}, tool: "unionfs", pkg: "unionfs-fuse"},
	{Name: "mergerfs", Column: "mergerfs", About: "mergerfs, read-only; it has no whiteouts", kind: mergerfs, readOnly: true, tables: []string{"metadata", "small", "large"}, tool: "mergerfs", pkg: "mergerfs"},
	{Name: "native", Column: "native", About: "the plain merged directory, no union", kind: native},
	{Name: "podman", Column: "podman", About: "podman load and save", kind: program, tool: "podman", pkg: "podman"},
	{Name: "skopeo", Column: "skopeo", About: "skopeo copy", kind: program, tool: "skopeo", pkg: "skopeo"},
}

func systemNamed(name string) (system, bool) {
	for _, s := range systems {
		if s.Name == name {
			return s, true
		}
	}
	return system{}, false
}

// fuse says whether requests of the system can be counted.
func (s system) fuse() bool { return s.kind != kernel && s.kind != native && s.kind != program }

// stack is what gets mounted.
type stack struct {
	lowers      []string // topmost first
	upper, work string   // empty: read-only
	options     []string // options of overlayfs, as metacopy=on
}

// argv is the command that mounts st on target. It stays in the foreground, or
// returns when the mount is there.
func (s system) argv(bin string, more []string, st stack, target string, foreground bool) ([]string, error) {
	var o, argv []string
	front := func(flag string) {
		if foreground {
			argv = append(argv, flag)
		}
	}
	switch s.kind {
	case plyfs:
		argv = []string{bin, "overlay"}
		front("-f")
		for _, l := range st.lowers {
			o = append(o, "lowerdir+="+harness.EscapeOption(l))
		}
		if s.io != "" {
			o = append(o, "io="+s.io)
		}
		o = append(o, more...)
	case fuseOverlayfs:
		argv = []string{s.tool}
		front("-f")
		o = append(o, "lowerdir="+strings.Join(st.lowers, ":"))
	case unionfsFuse:
		argv = []string{s.tool}
		front("-f")
		// It may hold as many files open as it has branches times many.
		return append(argv, "-o", "cow,ro,allow_other,use_ino", strings.Join(st.lowers, "=RO:")+"=RO", target), nil
	case mergerfs:
		argv = []string{s.tool}
		front("-f")
		return append(argv, "-o", "allow_other,use_ino,cache.files=auto-full", strings.Join(st.lowers, "=RO:")+"=RO", target), nil
	default:
		return nil, fmt.Errorf("%s is not mounted by a program", s.Name)
	}
	if st.upper != "" {
		o = append(o, "upperdir="+st.upper, "workdir="+st.work)
	}
	o = append(o, st.options...)
	return append(argv, "-o", strings.Join(o, ","), target), nil
}

// version asks the program for its version.
func (s system) version(ctx context.Context, bin string) string {
	argv := []string{s.tool, "--version"}
	switch s.kind {
	case plyfs:
		argv = []string{bin, "version"}
	case kernel, native:
		return ""
	}
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	if err != nil && len(out) == 0 {
		return "unknown"
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	for _, l := range lines { // fusermount's version may come first
		if strings.HasPrefix(l, s.tool) {
			return l
		}
	}
	return lines[0]
}
