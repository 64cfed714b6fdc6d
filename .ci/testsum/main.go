// Command testsum runs `go test -json` and prints what `go test` prints: one result line per package and the whole output of
// each failed test. At the end it says which tests were skipped, and why, because a suite that skipped everything looks green.
//
//	go run ./.ci/testsum [-v] -- GO-TEST-ARGUMENTS
//
// With -v it also prints the result line (--- PASS, --- SKIP) of every test. It exits with the status of `go test`.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// event is one line of `go test -json` (see `go doc test2json`).
type event struct {
	Action     string
	Package    string
	ImportPath string
	Test       string
	Output     string
}

// report collects the events of one run.
type report struct {
	out     io.Writer
	verbose bool
	// output holds what each running test has printed, by package and test.
	output map[string][]string
	// skips maps a reason to the tests that gave it.
	skips                   map[string][]string
	passed, failed, skipped int
	failures                []string
}

func main() {
	verbose := flag.Bool("v", false, "print the result line of every test")
	flag.Parse()
	os.Exit(run(*verbose, flag.Args()))
}

func run(verbose bool, args []string) int {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	pipe, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "testsum:", err)
		return 1
	}
	r := &report{out: os.Stdout, verbose: verbose, output: map[string][]string{}, skips: map[string][]string{}}
	in := bufio.NewReader(pipe)
	for {
		line, err := in.ReadBytes('\n')
		if len(line) > 0 {
			r.line(line)
		}
		if err != nil {
			break
		}
	}
	err = cmd.Wait()
	r.summary()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return max(1, exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "testsum:", err)
		return 1
	}
	return 0
}

// line handles one line of the stream; what is not JSON (a failing toolchain, for example) is passed on.
func (r *report) line(line []byte) {
	var e event
	if json.Unmarshal(line, &e) != nil {
		_, _ = r.out.Write(line)
		return
	}
	r.event(e)
}

func (r *report) event(e event) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "build-output":
		fmt.Fprint(r.out, e.Output)
	case "output":
		switch {
		case e.Test != "":
			r.output[key] = append(r.output[key], e.Output)
		case e.Output != "PASS\n":
			fmt.Fprint(r.out, e.Output)
		}
	case "pass", "fail", "skip":
		if e.Test == "" {
			r.unfinished(e.Package)
			return
		}
		r.finish(e, r.output[key])
		delete(r.output, key)
	}
}

// unfinished prints the output of the tests of a package that has ended without their result: the process died under them.
func (r *report) unfinished(pkg string) {
	for _, key := range slices.Sorted(maps.Keys(r.output)) {
		if !strings.HasPrefix(key, pkg+" ") {
			continue
		}
		fmt.Fprint(r.out, strings.Join(r.output[key], ""))
		delete(r.output, key)
	}
}

func (r *report) finish(e event, output []string) {
	name := strings.TrimPrefix(e.Package, "github.com/plyfs/plyfs/") + "." + e.Test
	switch e.Action {
	case "pass":
		r.passed++
	case "fail":
		r.failed++
		r.failures = append(r.failures, name)
		for _, o := range output {
			fmt.Fprint(r.out, o)
		}
		return
	case "skip":
		r.skipped++
		reason := skipReason(output)
		r.skips[reason] = append(r.skips[reason], name)
	}
	if r.verbose {
		for _, o := range output {
			if strings.HasPrefix(strings.TrimLeft(o, " "), "--- ") {
				fmt.Fprint(r.out, o)
			}
		}
	}
}

// skipReason finds the argument of t.Skip: the last line of output that is not a frame line of the test, without `file.go:12: `.
func skipReason(output []string) string {
	for _, o := range slices.Backward(output) {
		s := strings.TrimSpace(o)
		if s == "" || strings.HasPrefix(s, "--- ") || strings.HasPrefix(s, "=== ") {
			continue
		}
		if _, rest, ok := strings.Cut(s, ".go:"); ok {
			if _, msg, ok := strings.Cut(rest, ": "); ok {
				return msg
			}
		}
		return s
	}
	return "no reason given"
}

// summary prints the counts, the skipped tests by reason (most frequent first) and the failed tests.
func (r *report) summary() {
	fmt.Fprintf(r.out, "\n%d passed, %d failed, %d skipped\n", r.passed, r.failed, r.skipped)
	reasons := make([]string, 0, len(r.skips))
	for reason := range r.skips {
		reasons = append(reasons, reason)
	}
	slices.SortFunc(reasons, func(a, b string) int {
		if n := len(r.skips[b]) - len(r.skips[a]); n != 0 {
			return n
		}
		return strings.Compare(a, b)
	})
	for _, reason := range reasons {
		tests := r.skips[reason]
		more := ""
		if len(tests) > 3 {
			more = fmt.Sprintf(" and %d more", len(tests)-3)
		}
		fmt.Fprintf(r.out, "  skipped %4d: %s (%s%s)\n", len(tests), reason, strings.Join(tests[:min(3, len(tests))], ", "), more)
	}
	for _, name := range r.failures {
		fmt.Fprintf(r.out, "  failed: %s\n", name)
	}
}
