package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/BurntSushi/toml"
)

// registriesFile is a registries.conf, version 2, and what is left of version 1.
type registriesFile struct {
	Registries []registryTable `toml:"registry"`
	V1         struct {
		Insecure struct{ Registries []string } `toml:"insecure"`
		Block    struct{ Registries []string } `toml:"block"`
	} `toml:"registries"`
}

type registryTable struct {
	Prefix             string        `toml:"prefix"`
	Location           string        `toml:"location"`
	Insecure           bool          `toml:"insecure"`
	Blocked            bool          `toml:"blocked"`
	MirrorByDigestOnly bool          `toml:"mirror-by-digest-only"`
	Mirrors            []mirrorTable `toml:"mirror"`
}

type mirrorTable struct {
	Location       string `toml:"location"`
	Insecure       bool   `toml:"insecure"`
	PullFromMirror string `toml:"pull-from-mirror"`
}

// registries are the tables of all files by prefix.
type registries map[string]registryTable

// place is a repository as registries.conf rewrites it.
type place struct {
	name             string // host/path
	insecure, mirror bool
}

// loadRegistries reads registries.conf, and then the files of registries.conf.d in
// the order of their names; a later table for a prefix replaces an earlier one.
func loadRegistries(env Env) (registries, error) {
	out := registries{}
	own := inHome(env.config(), "containers", "registries.conf")
	main := filepath.Join(env.Etc, "containers", "registries.conf")
	dirs := []string{main + ".d", own + ".d"}
	if p := firstOf(env.Get("CONTAINERS_REGISTRIES_CONF"), env.Get("REGISTRIES_CONFIG_PATH")); p != "" {
		main = p
		if _, err := os.Stat(p); err != nil {
			return nil, fmt.Errorf("%w: registries configuration: %w", ErrInvalid, err)
		}
	} else if own != "" {
		if _, err := os.Stat(own); err == nil {
			main = own
		}
	}
	if err := out.read(main); err != nil {
		return nil, err
	}
	for _, d := range dirs {
		if d == ".d" {
			continue // no home
		}
		entries, err := os.ReadDir(d)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("registries configuration: %w", err)
		}
		for _, e := range entries {
			if filepath.Ext(e.Name()) == ".conf" {
				if err := out.read(filepath.Join(d, e.Name())); err != nil {
					return nil, err
				}
			}
		}
	}
	return out, nil
}

func firstOf(list ...string) string {
	for _, s := range list {
		if s != "" {
			return s
		}
	}
	return ""
}

func (r registries) read(path string) error {
	raw, err := readFile(path)
	if err != nil || raw == nil {
		return err
	}
	tables, err := parseRegistries(raw)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, t := range tables {
		r[t.Prefix] = t
	}
	return nil
}

// parseRegistries decodes a file; each table has a prefix afterwards.
func parseRegistries(raw []byte) ([]registryTable, error) {
	var f registriesFile
	if err := toml.Unmarshal(raw, &f); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	for _, h := range f.V1.Insecure.Registries {
		f.Registries = append(f.Registries, registryTable{Location: h, Insecure: true})
	}
	for _, h := range f.V1.Block.Registries {
		f.Registries = append(f.Registries, registryTable{Location: h, Blocked: true})
	}
	for i := range f.Registries {
		t := &f.Registries[i]
		t.Location, t.Prefix = strings.TrimRight(t.Location, "/"), strings.TrimRight(t.Prefix, "/")
		if t.Prefix == "" {
			t.Prefix = t.Location
		}
		wild := strings.HasPrefix(t.Prefix, "*.")
		switch {
		case t.Prefix == "":
			return nil, fmt.Errorf("%w: a [[registry]] has neither prefix nor location", ErrInvalid)
		case t.Location == "" && !wild:
			t.Location = t.Prefix
		}
		for j := range t.Mirrors {
			m := &t.Mirrors[j]
			m.Location = strings.TrimRight(m.Location, "/")
			switch m.PullFromMirror {
			case "", "all", "digest-only", "tag-only":
			default:
				return nil, fmt.Errorf("%w: mirror %q of %q: pull-from-mirror %q: expected all, digest-only or tag-only", ErrInvalid, m.Location, t.Prefix, m.PullFromMirror)
			}
		}
		for _, l := range append([]string{t.Prefix, t.Location}, locations(t.Mirrors)...) {
			if strings.Contains(l, "://") {
				return nil, fmt.Errorf("%w: %q: a prefix or location is a host with a path, without %s", ErrInvalid, l, l[:strings.Index(l, "://")+3])
			}
		}
	}
	return f.Registries, nil
}

func locations(ms []mirrorTable) []string {
	out := make([]string, len(ms))
	for i, m := range ms {
		out[i] = m.Location
	}
	return out
}

// match returns how much of a name the prefix covers; -1: it is not of this table.
func (t registryTable) match(name string) int {
	if suffix, ok := strings.CutPrefix(t.Prefix, "*"); ok {
		host, _, _ := strings.Cut(name, "/")
		if bare, _, _ := strings.Cut(host, ":"); strings.HasSuffix(bare, suffix) || strings.HasSuffix(host, suffix) {
			return len(host)
		}
		return -1
	}
	rest, ok := strings.CutPrefix(name, t.Prefix)
	if !ok || rest != "" && rest[0] != '/' && rest[0] != ':' && rest[0] != '@' {
		return -1
	}
	return len(t.Prefix)
}

// places are where the repository of a reference is to be looked for.
func (r registries) places(ref Reference, push bool) ([]place, error) {
	name := ref.String()
	var best *registryTable
	covered := -1
	for _, t := range r {
		if n := t.match(name); n >= 0 && (best == nil || len(t.Prefix) > len(best.Prefix)) {
			best, covered = &t, n
		}
	}
	if best == nil {
		return []place{{name: ref.Name()}}, nil
	}
	if best.Blocked {
		return nil, fmt.Errorf("%w: registries.conf blocks %s", ErrUnsupported, best.Prefix)
	}
	rest := ""
	if covered < len(ref.Name()) {
		rest = ref.Name()[covered:]
	}
	to := func(location string) string {
		if location == "" {
			return ref.Name()
		}
		return location + rest
	}
	var out []place
	for _, m := range best.Mirrors {
		byTag := ref.Digest == ""
		if push || m.Location == "" || byTag && (best.MirrorByDigestOnly || m.PullFromMirror == "digest-only") || !byTag && m.PullFromMirror == "tag-only" {
			continue
		}
		out = append(out, place{name: to(m.Location), insecure: m.Insecure, mirror: true})
	}
	return append(out, place{name: to(best.Location), insecure: best.Insecure}), nil
}
