package lint

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plyfs/plyfs/integration/oracle"
)

// TestDifferencesAreDocumented: what the comparison with kernel overlayfs leaves out stands in the documentation, and nothing else.
func TestDifferencesAreDocumented(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(rootDir(t), "docs", "differences.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	documented := map[string]bool{}
	for line := range strings.Lines(table + "\n") {
		documented[strings.TrimSpace(line)] = true
	}
	for _, d := range oracle.Accepted {
		row := "| " + d.What + " | " + d.Why + " |"
		if !documented[row] {
			t.Errorf("docs/differences.md lacks the line\n%s", row)
		}
		delete(documented, row)
	}
	for row := range documented {
		t.Errorf("docs/differences.md has a line that integration/oracle/accepted.go does not have:\n%s", row)
	}
}
