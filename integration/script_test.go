package integration

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/plyfs/plyfs/integration/archive"
	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// TestScript runs testdata/script/*.txtar, each with a store of its own.
// Besides the usual commands there are
//
//	mkimage FILE REF [format=oci] [compress=gzip] [break=KIND] [layers=N]
//	                      writes an archive with sample layers; see sampleLayers
//	exits N PROG ARGS...  runs a program that must end with exit code N
//	                      (its output can be matched as after exec)
//	evil FILE KIND        writes an archive with a hostile layer
//	killall9              kills every process that serves a mount of this store
//
// and the conditions [root] and [fuse].
func TestScript(t *testing.T) {
	bin, err := harness.Binary()
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:      filepath.Join("testdata", "script"),
		Deadline: time.Now().Add(4 * time.Minute),
		Setup: func(e *testscript.Env) error {
			e.Setenv("PATH", filepath.Dir(bin)+":"+os.Getenv("PATH"))
			e.Setenv("PLYFS_ROOT", filepath.Join(e.WorkDir, "root"))
			e.Setenv("XDG_RUNTIME_DIR", filepath.Join(e.WorkDir, "run"))
			e.Defer(func() { unmountAll(t, e.WorkDir) })
			return os.Mkdir(filepath.Join(e.WorkDir, "run"), 0o700)
		},
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Geteuid() == 0 && !harness.InUserNamespace(), nil
			case "fuse":
				f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
				if err != nil {
					return false, nil
				}
				return true, f.Close()
			}
			return false, errors.New("unknown condition " + cond)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"mkimage": cmdMkimage, "exits": cmdExits, "evil": cmdEvil, "killall9": cmdKillall9,
		},
	})
}

// unmountAll cleans up after a script that failed, and says so after one that
// did not.
func unmountAll(t *testing.T, dir string) {
	for _, l := range harness.Leaks(dir) {
		if strings.HasPrefix(l, "still mounted") {
			t.Errorf("%s: %s", filepath.Base(dir), l)
		}
	}
}

// sampleLayers are the layers mkimage takes its first N from, bottom first.
func sampleLayers() []oracle.Layer {
	return []oracle.Layer{
		{Entries: []oracle.Entry{
			{Path: "etc", Kind: oracle.Dir},
			{Path: "etc/hostname", Kind: oracle.File, Text: "sample\n"},
			{Path: "bin", Kind: oracle.Dir},
			{Path: "bin/tool", Kind: oracle.File, Mode: 0o4755, Text: "#!/bin/sh\n"},
			{Path: "data", Kind: oracle.Dir, Mode: 0o1777},
			{Path: "data/old", Kind: oracle.File, Text: "old\n"},
			{Path: "gone", Kind: oracle.File, Text: "gone\n"},
			{Path: "link", Kind: oracle.Symlink, Target: "etc/hostname"},
			{Path: "bin/hard", Kind: oracle.Hardlink, Target: "bin/tool"},
		}},
		{Entries: []oracle.Entry{
			{Path: "etc", Kind: oracle.Dir},
			{Path: "etc/added", Kind: oracle.File, Text: "added\n"},
			{Path: "gone", Kind: oracle.Whiteout},
		}},
		{Entries: []oracle.Entry{
			{Path: "data", Kind: oracle.Opaque},
			{Path: "data/new", Kind: oracle.File, Text: "new\n"},
			{Path: "etc", Kind: oracle.Dir},
			{Path: "etc/hostname", Kind: oracle.File, Text: "changed\n"},
		}},
	}
}

func cmdMkimage(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: mkimage FILE REF [format=oci] [compress=gzip] [break=KIND] [layers=N] [last=1]")
	}
	var o archive.Options
	layers := sampleLayers()
	for _, a := range args[2:] {
		key, value, _ := strings.Cut(a, "=")
		switch key {
		case "format":
			o.Format = value
		case "compress":
			o.Compress = value
		case "break":
			o.Break = value
		case "last":
			o.LayersLast = true
		case "layers":
			n, err := strconv.Atoi(value)
			ts.Check(err)
			layers = layers[:n]
		default:
			ts.Fatalf("unknown option %q", a)
		}
	}
	im := archive.Image{Ref: args[1]}
	for _, l := range layers {
		b, err := l.Tar()
		ts.Check(err)
		im.Layers = append(im.Layers, b)
	}
	ts.Check(im.Write(ts.MkAbs(args[0]), o))
}

// cmdEvil writes an image whose second layer tries to leave its directory.
func cmdEvil(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: evil FILE dotdot|symlink|absolute|hardlink|whiteout")
	}
	evil := map[string][]oracle.Entry{
		"dotdot":   {{Path: "../../escaped", Kind: oracle.File, Text: "x"}},
		"absolute": {{Path: oracle.Name(ts.MkAbs("escaped")), Kind: oracle.File, Text: "x"}},
		"symlink": {
			{Path: "out", Kind: oracle.Symlink, Target: oracle.Name(ts.MkAbs("."))},
			{Path: "out/escaped", Kind: oracle.File, Text: "x"},
		},
		"hardlink": {{Path: "passwd", Kind: oracle.Hardlink, Target: "../../../../../../../../etc/passwd"}},
		"whiteout": {{Path: "..", Kind: oracle.Whiteout}},
	}[args[1]]
	if evil == nil {
		ts.Fatalf("unknown kind %q", args[1])
	}
	im := archive.Image{Ref: "evil:" + args[1]}
	for _, l := range []oracle.Layer{sampleLayers()[0], {Entries: evil}} {
		b, err := l.Tar()
		ts.Check(err)
		im.Layers = append(im.Layers, b)
	}
	ts.Check(im.Write(ts.MkAbs(args[0]), archive.Options{}))
}

func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROG ARGS...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	code := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		code = exit.ExitCode()
	}
	if code != want {
		ts.Fatalf("exit code %d, not %d\n%s%s", code, want, ts.ReadFile("stdout"), ts.ReadFile("stderr"))
	}
}

func cmdKillall9(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: killall9")
	}
	n, err := harness.KillServers(ts.Getenv("WORK"))
	ts.Check(err)
	if n == 0 {
		ts.Fatalf("no process serves a mount of this store")
	}
}
