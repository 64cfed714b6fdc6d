package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"time"

	"golang.org/x/term"

	"github.com/plyfs/plyfs/integration/harness"
)

func isTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

// buildPlyfs builds the binary that is measured, or copies that of PLYFS_BIN.
func buildPlyfs(ctx context.Context, module, file, version string) error {
	if bin := os.Getenv("PLYFS_BIN"); bin != "" {
		_, err := run(ctx, "cp", bin, file)
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	_, err := run(ctx, "env", "-C", module, "CGO_ENABLED=0", "go", "build", "-buildvcs=false", "-trimpath",
		"-ldflags", "-s -w -X main.version="+version, "-o", file, "./cmd/plyfs")
	return err
}

// findSystems keeps the systems that were chosen and are there.
func (r *runner) findSystems(ctx context.Context, c *config, chosen *regexp.Regexp) {
	for _, s := range systems {
		if !chosen.MatchString(s.Name) && !s.base || s.base && r.base == "" || !r.needs(s) {
			continue
		}
		if err := r.available(ctx, c, s); err != nil {
			r.res.note("%s is left out: %v", s.Name, err)
			continue
		}
		r.systems = append(r.systems, s)
		r.res.Systems = append(r.res.Systems, systemInfo{s.Name, s.version(ctx, r.binary(s))})
	}
}

// needs says whether a scene that was chosen runs on the system.
func (r *runner) needs(s system) bool {
	for _, t := range r.tables {
		for _, sc := range t.scenes {
			for _, p := range r.places {
				if sc.runs(&t, s, p, true) {
					return true
				}
			}
		}
	}
	return false
}

func (r *runner) available(ctx context.Context, c *config, s system) error {
	if s.kind == kernel {
		return probeKernel(r.places[0])
	}
	if s.tool == "" {
		return nil
	}
	if _, err := exec.LookPath(s.tool); err == nil {
		return nil
	}
	if c.quick || !c.install {
		return fmt.Errorf("%s is not installed", s.tool)
	}
	fmt.Fprintf(r.log, "installing %s\n", s.pkg)
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	apt := []string{"env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=60"}
	install := append(slices.Clone(apt), "install", "-y", "--no-install-recommends", s.pkg)
	if _, err := run(ctx, install...); err != nil {
		// The lists may be old, or there are none.
		_, uerr := run(ctx, append(slices.Clone(apt), "update")...)
		if _, err = run(ctx, install...); err != nil {
			return fmt.Errorf("%s is not installed, and cannot be: %w", s.tool, errors.Join(err, uerr))
		}
	}
	_, err := exec.LookPath(s.tool)
	return err
}

// probeKernel mounts an overlay and takes it away again.
func probeKernel(p *place) error {
	rm, err := p.newRoom()
	if err != nil {
		return err
	}
	defer removeAll(rm.dir) // it is in the work directory, which goes anyway
	lower := rm.dir + "/lower"
	if err := os.Mkdir(lower, 0o755); err != nil {
		return err
	}
	s, _ := systemNamed("kernel")
	m, err := s.mount(context.Background(), "", nil, stack{lowers: []string{lower}, upper: rm.upper, work: rm.work}, rm.target, true)
	if err != nil {
		return err
	}
	if _, ok := harness.IsMounted(rm.target); !ok {
		return fmt.Errorf("overlay on %s is not in the mount table", rm.target)
	}
	return m.unmount()
}
