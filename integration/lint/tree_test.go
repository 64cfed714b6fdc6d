package lint

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// topDirs are the directories beside the module's root; names that begin with a dot are free.
var topDirs = []string{"cmd", "cow", "docs", "integration", "layers", "metadata", "mountd", "snapshotter", "unionfs", "whiteout"}

func TestTopLevelDirectories(t *testing.T) {
	entries, err := os.ReadDir(rootDir(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !e.IsDir() || strings.HasPrefix(e.Name(), ".") || skipDir(e.Name()) {
			continue
		}
		if !slices.Contains(topDirs, e.Name()) {
			t.Errorf("%s/ is not one of the top-level directories %v: put it below one of them", e.Name(), topDirs)
		}
	}
}

func TestPackageDocs(t *testing.T) {
	for _, p := range packages(t) {
		if len(p.GoFiles) == 0 { // tests only
			continue
		}
		if !slices.Contains(p.GoFiles, "doc.go") {
			t.Errorf("%s has no doc.go", p.rel())
		}
		want := "Package " + p.Name + " "
		if p.Name == "main" {
			want = "Command " + filepath.Base(p.rel()) + " "
		}
		if !strings.HasPrefix(p.Doc, want) {
			t.Errorf("%s: the package comment begins with %q, want %q", p.rel(), p.Doc[:min(30, len(p.Doc))], want)
		}
	}
}

var (
	// workbench matches paths of the machine something was written on. Written in pieces: this file is checked as well.
	workbench = regexp.MustCompile(`(^|[\s"'` + "`" + `(=:])/(work/(shared|main|contract|\.)|` + `root/go/|` + `home/[a-z]+/(src|go)/)`)
	// document matches the name of a Markdown file, which must then be one of the tree.
	document = regexp.MustCompile(`[A-Za-z0-9_-]+\.md\b`)
)

// foreignDocuments are files of other projects that the sources cite.
var foreignDocuments = []string{"XFSTESTS.md", "layer.md", "config.md"} // gocryptfs; image-spec

func TestNamesExist(t *testing.T) {
	dir := rootDir(t)
	texts := map[string][]byte{}
	documents := map[string]bool{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && skipDir(d.Name()):
			return fs.SkipDir
		case !d.Type().IsRegular() || d.Name() == "go.sum" || d.Name() == ".git": // a file in a worktree
			return nil
		}
		if filepath.Ext(path) == ".md" {
			documents[d.Name()] = true
		}
		text, err := os.ReadFile(path)
		if err != nil || bytes.IndexByte(text[:min(len(text), 8000)], 0) >= 0 { // binary
			return err
		}
		rel, err := filepath.Rel(dir, path)
		texts[rel] = text
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for rel, text := range texts {
		for i, line := range bytes.Split(text, []byte("\n")) {
			if m := workbench.Find(line); m != nil {
				t.Errorf("%s:%d: %q is a path of one machine", rel, i+1, m)
			}
			for _, name := range document.FindAll(line, -1) {
				if !documents[string(name)] && !slices.Contains(foreignDocuments, string(name)) {
					t.Errorf("%s:%d: there is no %s in this tree", rel, i+1, name)
				}
			}
		}
	}
}
