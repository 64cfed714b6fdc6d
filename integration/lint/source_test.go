package lint

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// Length of a Go file in lines: above warnLines it is named, above maxLines the test fails.
const (
	warnLines = 600
	maxLines  = 700
)

// where says in which files a call is banned.
type where int

const (
	everywhere where = iota
	inTests
	outsideTests
)

// banned lists calls by import path and name; an empty path is a builtin.
var banned = []struct {
	path, name string
	where      where
	instead    string
}{
	{"os", "IsNotExist", everywhere, "errors.Is(err, fs.ErrNotExist) sees through wrapping"},
	{"os", "IsExist", everywhere, "errors.Is(err, fs.ErrExist) sees through wrapping"},
	{"os", "IsPermission", everywhere, "errors.Is(err, fs.ErrPermission) sees through wrapping"},
	{"os", "IsTimeout", everywhere, "errors.Is(err, os.ErrDeadlineExceeded) sees through wrapping"},
	{"context", "TODO", everywhere, "take a context from the caller"},
	{"time", "Sleep", inTests, "wait for the event itself, or poll with a deadline in one helper"},
	{"github.com/hanwen/go-fuse/v2/fs", "ToErrno", everywhere, "it turns unknown errors into ENOTSUP: unionfs/errno.go is the only mapping"},
	{"", "panic", outsideTests, "return an error; a run-time condition never stops a mount"},
}

// sourceFile is one parsed Go file.
type sourceFile struct {
	rel  string
	text []byte
	ast  *ast.File
	fset *token.FileSet
}

func (f sourceFile) isTest() bool { return strings.HasSuffix(f.rel, "_test.go") }

// debugOnly reports a build constraint that keeps the file out of ordinary builds.
func (f sourceFile) debugOnly() bool {
	return bytes.HasPrefix(f.text, []byte("//go:build invariants\n"))
}

// skipDir names directories that hold nothing of the repository's own.
func skipDir(name string) bool {
	return name == ".git" || name == ".cache" || name == "bin" || name == "failures"
}

// sources parses every Go file of the tree.
func sources(t *testing.T) []sourceFile {
	t.Helper()
	var files []sourceFile
	dir := rootDir(t)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (skipDir(d.Name()) || d.Name() == "testdata"):
			return fs.SkipDir
		case d.IsDir() || filepath.Ext(path) != ".go":
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		fset := token.NewFileSet()
		parsed, err := parser.ParseFile(fset, path, text, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		files = append(files, sourceFile{rel: rel, text: text, ast: parsed, fset: fset})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// importNames maps the names under which a file uses its imports to their paths.
func importNames(f *ast.File) map[string]string {
	names := map[string]string{}
	for _, spec := range f.Imports {
		path, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			continue
		}
		name := path[strings.LastIndexByte(path, '/')+1:]
		if spec.Name != nil {
			name = spec.Name.Name
		}
		names[name] = path
	}
	return names
}

// called splits the function of an expression into import path and name ("" and name for a plain identifier).
func called(names map[string]string, e ast.Expr) (path, name string) {
	switch e := e.(type) {
	case *ast.Ident:
		return "", e.Name
	case *ast.SelectorExpr:
		if x, ok := e.X.(*ast.Ident); ok && names[x.Name] != "" {
			return names[x.Name], e.Sel.Name
		}
	}
	return "", ""
}

func TestBannedCalls(t *testing.T) {
	for _, f := range sources(t) {
		names := importNames(f.ast)
		ast.Inspect(f.ast, func(n ast.Node) bool {
			// A function taken as a value counts as much as one that is called.
			expr, ok := n.(ast.Expr)
			if call, isCall := n.(*ast.CallExpr); isCall {
				expr = call.Fun
			} else if _, isSel := n.(*ast.SelectorExpr); !ok || !isSel {
				return true
			}
			path, name := called(names, expr)
			for _, b := range banned {
				if b.name != name || b.path != path {
					continue
				}
				if b.where == inTests && !f.isTest() || b.where == outsideTests && (f.isTest() || f.debugOnly()) {
					continue
				}
				if _, isCall := n.(*ast.CallExpr); isCall && path != "" {
					continue // reported for its selector
				}
				t.Errorf("%s:%d: %s: %s", f.rel, f.fset.Position(n.Pos()).Line, strings.TrimPrefix(path+"."+name, "."), b.instead)
			}
			return true
		})
	}
}

func TestFileLength(t *testing.T) {
	for _, f := range sources(t) {
		lines := bytes.Count(f.text, []byte("\n"))
		switch {
		case lines > maxLines:
			t.Errorf("%s has %d lines (limit %d): split it by what it holds", f.rel, lines, maxLines)
		case lines > warnLines:
			t.Logf("%s has %d lines: time to split it", f.rel, lines)
		}
	}
}
