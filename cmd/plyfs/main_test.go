package main

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
)

func TestPrintable(t *testing.T) {
	for _, c := range []struct{ in, printable, quoted string }{
		{"/plain/ünï", "/plain/ünï", "/plain/ünï"},
		{"/a b", "/a b", "/a b"},
		{"/esc\x1b[31m", `/esc\x1b[31m`, `"/esc\x1b[31m"`},
		{"/line\nend", `/line\nend`, `"/line\nend"`},
		{"/bytes\xff", `/bytes\xff`, `"/bytes\xff"`},
		{"/rtl\u202etxt", `/rtl\u202etxt`, `"/rtl\u202etxt"`},
		{`"quoted"`, `"quoted"`, `"\"quoted\""`},
		{"", "", ""},
	} {
		if got := printable(c.in); got != c.printable {
			t.Errorf("printable(%q) = %s, want %s", c.in, got, c.printable)
		}
		if got := quoted(c.in); got != c.quoted {
			t.Errorf("quoted(%q) = %s, want %s", c.in, got, c.quoted)
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0B", 999: "999B", 1000: "1kB", 7_330_000: "7.33MB", 123_456_789: "123MB", 5_000_000_000: "5GB",
	} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %s, want %s", n, got, want)
		}
	}
}

func TestExitCode(t *testing.T) {
	wrap := func(err error) error { return fmt.Errorf("image %q: %w", "x", err) }
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{fs.ErrPermission, 1},
		{context.Canceled, 1},
		{usagef("bad"), 2},
		{wrap(layers.ErrInvalid), 2},
		{wrap(layers.ErrNotFound), 3},
		{wrap(layers.ErrExists), 4},
		{wrap(layers.ErrInUse), 4},
		{wrap(layers.ErrCorrupt), 5},
		{wrap(layers.ErrLocked), 6},
		{wrap(context.DeadlineExceeded), 6},
		{wrap(mountd.ErrMount), 7},
		{errFindings, 8},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("exitCode(%v) = %d, want %d", c.err, got, c.want)
		}
	}
}

// Every command says what it does, shows an example, and refuses what it does
// not know with code 2.
func TestCommands(t *testing.T) {
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		for _, sub := range c.Commands() {
			if sub.Name() == "help" {
				continue
			}
			if sub.Short == "" || sub.Example == "" {
				t.Errorf("%s: no description or example", sub.CommandPath())
			}
			// One that takes an argument says what a shell may offer for it.
			takes := sub.Args(sub, []string{"x"}) == nil || sub.Args(sub, []string{"x", "y"}) == nil
			if takes && !sub.Hidden && sub.ValidArgsFunction == nil {
				t.Errorf("%s: no ValidArgsFunction", sub.CommandPath())
			}
			walk(sub)
		}
	}
	walk(newRootCommand())
	t.Setenv("PLYFS_ROOT", t.TempDir())
	t.Setenv(mountd.RunDirEnv, t.TempDir())
	for _, args := range []string{
		"nosuchverb", "images --nosuchflag", "images a b", "mount x", "tag a", "overlay /x", "overlay -o upperdir=a /x",
		"--log-level loud images", "rmi", "diff", "version x", "completion", "completion csh",
	} {
		err := dispatch(t.Context(), append([]string{"plyfs"}, strings.Fields(args)...))
		if got := exitCode(err); got != exitUsage {
			t.Errorf("plyfs %s: %v, exit code %d", args, err, got)
		}
	}
}

// Who calls the binary is told by the arguments when the name says nothing.
func TestCallers(t *testing.T) {
	for _, c := range []struct {
		args      string
		mountFuse bool
		engine    bool
	}{
		{args: "-o lowerdir=a:b,upperdir=u,workdir=w, m", engine: true},
		{args: "-olowerdir=a m", engine: true},
		{args: "-f -o lowerdir=a m", engine: true},
		{args: "-d -f -o lowerdir=a none m", engine: true},
		{args: "none m -o rw,lowerdir=a,dev,suid", mountFuse: true},
		{args: "save m -o lowerdir=a", mountFuse: true}, // a source of any name
		{args: "m -o lowerdir=a,dev,suid", mountFuse: true},
		{args: "none m -o @file,dev,suid", mountFuse: true},
		{args: "save x -o file.tar"},
		{args: "export -o @file.tar"},
		{args: "overlay -o lowerdir=a m"},
		{args: "overlay -f -o lowerdir=a m"},
		{args: "--json images"},
		{args: "-f"},
		{args: ""},
	} {
		args := strings.Fields(c.args)
		if got := byMountFuse(args); got != c.mountFuse {
			t.Errorf("plyfs %s: called by mount.fuse: %v", c.args, got)
		}
		if got := byEngine(args); got != c.engine {
			t.Errorf("plyfs %s: called by an engine: %v", c.args, got)
		}
	}
}

func TestWriteOutputKeepsTheOldFile(t *testing.T) {
	dir := t.TempDir()
	name := dir + "/out"
	if err := os.WriteFile(name, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	failed := fmt.Errorf("half way")
	err := writeOutput(name, func(w io.Writer) error {
		_, _ = w.Write([]byte("new")) // lost with the failure
		return failed
	})
	if err != failed {
		t.Errorf("error %v", err)
	}
	entries, _ := os.ReadDir(dir) // checked by its length
	if b, err := os.ReadFile(name); err != nil || string(b) != "old" || len(entries) != 1 {
		t.Errorf("after a failure: %q, %v, %d files", b, err, len(entries))
	}
}
