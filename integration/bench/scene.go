package main

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// phase is a row of the tables: one kind of work.
type phase struct {
	Name  string
	Title string
	Unit  unit
	Goals []goal
	// Ref is the system that ratios refer to; empty: kernel.
	Ref string
	// growth names two phases: this one is not measured, it is how much more
	// time an operation of the second takes.
	growth [2]string
}

// step is one job, which times one phase or more, or none when it prepares.
type step struct {
	phases []phase
	job    func(f *fixture, sz *sizes) job
	// drop empties the kernel's caches before the clock starts.
	drop bool
	// special replaces the job: it measures in its own way.
	special func(ctx context.Context, e *env) ([]part, error)
}

// scene is a series of steps on one fresh mount.
type scene struct {
	name    string
	fixture string // empty: none
	// writes: the steps change the mount, so it needs an upper, and a plain
	// directory must be a copy.
	writes  bool
	options []string // of overlayfs
	// warm reads the layers' names before, warmContent small files, too.
	warm, warmContent bool
	// once: on the first place only, as no file system matters much.
	once bool
	// diskOnly: means nothing where there is no disk.
	diskOnly bool
	// unmounted: the step mounts by itself.
	unmounted bool
	// few: at most that many rounds, for what takes long.
	few int
	// only limits the systems.
	only  func(system) bool
	steps []step
}

// table is a group of scenes, shown together.
type table struct {
	Name   string
	Title  string
	scenes []scene
}

func kinds(ks ...kind) func(system) bool {
	return func(s system) bool { return slices.Contains(ks, s.kind) }
}

func named(names ...string) func(system) bool {
	return func(s system) bool { return slices.Contains(names, s.Name) }
}

// allTables are all phases. Some depend on sizes.
func allTables(sz *sizes) []table {
	return []table{
		metadataTable(sz), smallTable(), largeTable(sz), writeTable(sz), namesTable(sz), copyUpTable(sz),
		layersTable(sz), programsTable(), memoryTable(sz), imagesTable(),
	}
}

// runs says whether the scene is meant for the system and the place.
func (sc *scene) runs(t *table, s system, p *place, first bool) bool {
	switch {
	case sc.once && !first, sc.diskOnly && p.memory():
		return false
	case sc.writes && s.readOnly, s.store && sc.fixture == "big":
		return false
	case len(s.tables) > 0 && !slices.Contains(s.tables, t.Name):
		return false
	case sc.only != nil:
		return sc.only(s)
	}
	return s.kind != program
}

// choose keeps the phases that match: by their own name or that of their scene
// or table. Scenes lose the steps behind the last one that is wanted. The second
// result tells which phases are wanted.
func choose(all []table, re *regexp.Regexp) ([]table, map[string]bool) {
	wanted := map[string]bool{}
	var out []table
	for _, t := range all {
		var scenes []scene
		for _, sc := range t.scenes {
			last := 0
			for i, st := range sc.steps {
				for _, ph := range st.phases {
					if re.MatchString(ph.Name) || re.MatchString(t.Name) || re.MatchString(sc.name) {
						wanted[ph.Name] = true
						last = i + 1
					}
				}
			}
			if last > 0 {
				sc.steps = sc.steps[:last]
				scenes = append(scenes, sc)
			}
		}
		if len(scenes) > 0 {
			t.scenes = scenes
			out = append(out, t)
		}
	}
	return out, wanted
}

// listing is what -list prints.
func listing(all []table) string {
	var b strings.Builder
	for _, t := range all {
		fmt.Fprintf(&b, "%s: %s\n", t.Name, t.Title)
		for _, sc := range t.scenes {
			for _, st := range sc.steps {
				for _, ph := range st.phases {
					var goals []string
					for _, g := range ph.Goals {
						text := g.text(ph.Unit)
						if g.Place != "" {
							text += " on " + g.Place
						}
						goals = append(goals, text)
					}
					fmt.Fprintf(&b, "  %-22s %-16s %s", ph.Name, "("+sc.name+")", ph.Title)
					if len(goals) > 0 {
						fmt.Fprintf(&b, "; goal %s", strings.Join(goals, ", "))
					}
					b.WriteByte('\n')
				}
			}
		}
	}
	return b.String()
}
