package integration

import (
	"path/filepath"
	"testing"

	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// TestTimeout: with timeout=0 a mount shows what somebody changes in files of the lowers.
func TestTimeout(t *testing.T) {
	needOracle(t)
	for _, readOnly := range []bool{false, true} {
		stack, target := tempStack(t, fastTempDir(t), oracle.Layer{Entries: []oracle.Entry{
			{Path: "f", Kind: oracle.File, Text: "old", Mode: 0o644},
			{Path: "d", Kind: oracle.Dir},
		}})
		if readOnly {
			stack.Upper, stack.Work = "", ""
		}
		stack.Extra = []string{"timeout=0"}
		m, err := harness.NewMounter("drop-in")
		if err != nil {
			t.Fatal(err)
		}
		mount, err := m.Mount(stack, target)
		if err != nil {
			t.Fatal(err)
		}
		const look = "cat f; stat -c ' %a %s' f"
		got := shellIn(t, target, look)
		for _, change := range []string{"printf newer > f; chmod 600 f", "printf 2 > f", "printf 12345678 > f; chmod 644 f"} {
			shellIn(t, filepath.Clean(stack.Lowers[0]), change)
			got += shellIn(t, target, look)
		}
		if err := mount.Unmount(); err != nil {
			t.Error(err)
		}
		if want := "old 644 3\nnewer 600 5\n2 600 1\n12345678 644 8\n"; got != want {
			t.Errorf("read-only %v: %q, want %q", readOnly, got, want)
		}
	}
}
