package fault

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// TestPointsAreThoseOfTheSources: each point of the table is in one place of the
// sources or more, and no other is.
func TestPointsAreThoseOfTheSources(t *testing.T) {
	used := make(map[string][]string)
	for _, dir := range []string{"..", filepath.Join("..", "..", "unionfs")} {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no sources in %s: %v", dir, err)
		}
		for _, f := range files {
			for _, name := range pointsOf(t, f) {
				used[name] = append(used[name], f)
			}
		}
	}
	for i, p := range Points {
		if len(used[p.Name]) == 0 {
			t.Errorf("point %s is nowhere", p.Name)
		}
		if p.After == "" {
			t.Errorf("point %s: the table does not say what it comes after", p.Name)
		}
		delete(used, p.Name)
		if slices.ContainsFunc(Points[:i], func(q struct{ Name, After string }) bool { return q.Name == p.Name }) {
			t.Errorf("point %s is in the table twice", p.Name)
		}
	}
	for name, files := range used {
		t.Errorf("%v: point %q is not in the table", files, name)
	}
}

// pointsOf returns the arguments of all calls of Point in a file.
func pointsOf(t *testing.T, file string) []string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	ast.Inspect(f, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		sel, ok := call.Fun.(*ast.SelectorExpr)
		if !ok || sel.Sel.Name != "Point" || len(call.Args) != 1 {
			return true
		}
		if x, ok := sel.X.(*ast.Ident); !ok || x.Name != "fault" {
			return true
		}
		lit, ok := call.Args[0].(*ast.BasicLit)
		if !ok {
			t.Errorf("%s: fault.Point of something that is no literal", file)
			return true
		}
		name, err := strconv.Unquote(lit.Value)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
		return true
	})
	return names
}

func TestWrongValuesArmNothing(t *testing.T) {
	for _, v := range []string{"nonsense", "build.filled:0", "build.filled:x", "build.filled:-1", ":1", "trace:/"} {
		if tr, err := parse(v); err == nil {
			t.Errorf("%q is taken for %+v", v, tr)
		}
	}
	if tr, err := parse(""); tr != nil || err != nil {
		t.Errorf("an empty value is taken for %+v, %v", tr, err)
	}
}

// TestNthArrivalEndsTheProcess runs this test again with a fault, which must end
// it with SIGKILL at the right arrival.
func TestNthArrivalEndsTheProcess(t *testing.T) {
	if os.Getenv(Env) != "" {
		Arm(true)
		for _, p := range []string{"build.filled", "build.synced", "build.filled", "build.filled", "build.filled"} {
			_, _ = os.Stdout.WriteString("at " + p + "\n")
			Point(p)
		}
		return
	}
	for _, c := range []struct {
		value string
		seen  int // points that the process gets to
		dies  bool
	}{
		{"build.filled", 1, true},
		{"build.synced", 2, true},
		{"build.filled:3", 4, true},
		{"build.filled:5", 5, false},
		{"work.swept", 5, false},
	} {
		cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), Env+"="+c.value)
		out, err := cmd.Output()
		if seen := strings.Count(string(out), "at "); seen != c.seen {
			t.Errorf("%s: reached %d points, want %d", c.value, seen, c.seen)
		}
		died := false
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			died = exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
		}
		if died != c.dies {
			t.Errorf("%s: ended with %v", c.value, err)
		}
	}
}

func TestTraceNamesEveryArrival(t *testing.T) {
	file := filepath.Join(t.TempDir(), "trace")
	tr, err := parse("trace:" + file)
	if err != nil {
		t.Fatal(err)
	}
	defer tr.trace.Close()
	armed.Store(tr)
	defer armed.Store(nil)
	Point("a")
	Point("b")
	if b, err := os.ReadFile(file); err != nil || string(b) != "a\nb\n" {
		t.Errorf("the trace is %q, %v", b, err)
	}
}

func BenchmarkPointUnarmed(b *testing.B) {
	for b.Loop() {
		Point("build.filled")
	}
}
