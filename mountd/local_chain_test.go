package mountd

import (
	"os"
	"path/filepath"
	"testing"
)

// TestMountsHaveAnIndex: a mount gets the index of its chain, a damaged one is
// made anew, and where none can be made the mount shows the same.
func TestMountsHaveAnIndex(t *testing.T) {
	f := newFixture(t)
	chains := filepath.Join(f.store.Root(), "chains")
	indexes := func() []string {
		t.Helper()
		names, err := filepath.Glob(chains + "/*.idx")
		if err != nil {
			t.Fatal(err)
		}
		return names
	}
	try := func(want int) {
		t.Helper()
		f.mount("c")
		if b, err := os.ReadFile(f.mnt + "/file"); err != nil || string(b) != "lower" {
			t.Errorf("file: %q, %v", b, err)
		}
		if names := indexes(); len(names) != want {
			t.Errorf("indexes: %v, expected %d", names, want)
		}
		if _, err := f.unmount(false); err != nil {
			t.Fatal(err)
		}
	}
	try(1)
	if err := os.Truncate(indexes()[0], 5000); err != nil {
		t.Fatal(err)
	}
	try(1)
	// A directory in whose place nothing can be written.
	if err := os.RemoveAll(chains); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(chains, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	try(0)
	if err := os.Remove(chains); err != nil {
		t.Fatal(err)
	}
	f.clean()
}
