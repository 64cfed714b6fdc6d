package lint

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plyfs/plyfs/integration/oracle"
)

var rewrite = flag.Bool("rewrite", false, "write docs/differences.md from the list of the oracle")

// TestDifferencesAreDocumented: what the comparison with kernel overlayfs leaves out stands in the documentation, and nothing else.
func TestDifferencesAreDocumented(t *testing.T) {
	path := filepath.Join(rootDir(t), "docs", "differences.md")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const head = "| what | why |\n|---|---|\n"
	before, rest, ok := strings.Cut(string(text), head)
	if !ok {
		t.Fatalf("docs/differences.md has no table that begins with\n%s", head)
	}
	table, after, _ := strings.Cut(rest, "\n\n")
	var want strings.Builder
	for _, d := range oracle.Accepted {
		want.WriteString("| " + strings.ReplaceAll(d.What, "|", "\\|") + " | " + strings.ReplaceAll(d.Why, "|", "\\|") + " |\n")
	}
	if table+"\n" == want.String() {
		return
	}
	if !*rewrite {
		t.Fatalf("docs/differences.md is not the list in integration/oracle/accepted.go: go test ./integration/lint -rewrite\n%s", want.String())
	}
	if err := os.WriteFile(path, []byte(before+head+want.String()+"\n"+after), 0o644); err != nil {
		t.Fatal(err)
	}
}
