package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/harness"
)

// TestMain lets the test binary be what the program starts itself as.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv(workerEnv) != "":
		exit(runWorker(os.Stdin, os.Stdout))
	case os.Getenv(harness.JanitorEnv) != "":
		exit(harness.RunJanitor(os.Stdin))
	}
	os.Exit(m.Run())
}

// TestQuick runs the program: a phase that reads and one that writes, on all
// that is installed.
func TestQuick(t *testing.T) {
	harness.NeedRoot(t)
	harness.NeedFUSE(t)
	harness.NeedKernelOverlay(t)
	dir := t.TempDir()
	c, err := parseFlags([]string{
		"-quick", "-phases", "^(walk-cold|chmod-metacopy)$", "-systems", "^(kernel|plyfs|fuse-overlayfs|native)$",
		"-dir", dir, "-out", filepath.Join(dir, "out"), "-limit", "1m",
	}, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	var out, log strings.Builder
	begin := time.Now()
	if err := bench(t.Context(), c, &out, &log); err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	t.Logf("%s\n%s", time.Since(begin), out.String())
	r, err := readResults(filepath.Join(dir, "out", "results.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, place := range r.Places {
		for _, phase := range []string{"walk-cold", "chmod-metacopy"} {
			for _, system := range []string{"kernel", "plyfs"} {
				m := r.find(place, phase, system)
				if m == nil || len(m.Values) != 1 || m.Ops == 0 || m.Values[0] <= 0 {
					t.Errorf("%s on %s, %s: got %+v", phase, place, system, m)
				}
			}
		}
	}
	if left := harness.MountsBelow(dir); len(left) > 0 {
		t.Errorf("still mounted: %q", left)
	}
}
