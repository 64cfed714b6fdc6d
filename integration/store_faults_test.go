package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/archive"
	"github.com/plyfs/plyfs/integration/crash"
	"github.com/plyfs/plyfs/integration/harness"
)

var flagEveryCall = flag.Bool("store.all", false, "fail and kill store commands at every system call, not at some")

func init() {
	if socket := os.Getenv(crash.CallsEnv); socket != "" {
		fmt.Fprintln(os.Stderr, crash.RunCalls(socket))
		os.Exit(125)
	}
}

// storeOp is a command that changes a store, or writes something out of it.
type storeOp struct {
	name string
	args []string // names of files are relative to the directory of the store
	prep func(s *faultStore)
}

var storeOps = []storeOp{
	{"load", []string{"load", "-i", "new.tar"}, nil},
	{"load over a name", []string{"load", "-i", "again.tar"}, nil},
	{"import", []string{"import", "flat.tar", "flat:1"}, nil},
	{"create", []string{"create", "base:1", "other"}, nil},
	{"commit", []string{"commit", "box", "mine:1"}, nil},
	{"tag", []string{"tag", "base:1", "third:1"}, nil},
	{"rmi", []string{"rmi", "single:1"}, nil},
	{"rmi name", []string{"rmi", "alias:1"}, nil},
	{"rm", []string{"rm", "box"}, nil},
	{"gc", []string{"gc"}, func(s *faultStore) { s.run("load", "-i", "again.tar") }},
	{"prune", []string{"prune", "--all"}, nil},
	{"save", []string{"save", "-o", "out.tar", "base:1"}, nil},
	{"save over a file", []string{"save", "-o", "have.tar", "base:1"}, nil},
	{"save layout", []string{"save", "--format", "oci-dir", "-o", "layout", "base:1"}, nil},
	{"export", []string{"export", "-o", "tree.tar", "box"}, nil},
	{"rebuild", []string{"store", "rebuild"}, nil},
	{"compact", []string{"store", "compact"}, nil},
	{"copy", []string{"store", "copy"}, nil},
	{"repair", []string{"check", "--deep", "--repair"}, (*faultStore).damage},
}

// faultStore is a store in a directory with archives.
type faultStore struct {
	*store
	dir string
}

func (s *faultStore) cmd(args ...string) *exec.Cmd {
	cmd := exec.Command(s.bin, append([]string{"--root", s.root, "--socket", "none"}, args...)...)
	cmd.Dir = s.dir
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

func (s *faultStore) try(args ...string) (string, error) {
	cmd := s.cmd(args...)
	timer := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() }) // it may have ended
	defer timer.Stop()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out) + stderr.String(), fmt.Errorf("plyfs %s: %w: %s", strings.Join(args, " "), err, &stderr)
	}
	return string(out), nil
}

func (s *faultStore) run(args ...string) string {
	s.t.Helper()
	out, err := s.try(args...)
	if err != nil {
		s.t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// tarOfFiles is a layer of files, in pairs of name and content.
func tarOfFiles(t testing.TB, pairs ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(pairs); i += 2 {
		must(t, w.WriteHeader(&tar.Header{Name: pairs[i], Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(pairs[i+1])), ModTime: time.Unix(1e9, 0)}))
		if _, err := w.Write([]byte(pairs[i+1])); err != nil {
			t.Fatal(err)
		}
	}
	must(t, w.Close())
	return b.Bytes()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newFaultStore makes a store with images that share layers, a container with data, and
// archives to load.
func newFaultStore(t testing.TB, dir string) *faultStore {
	t.Helper()
	bin, err := harness.Binary()
	must(t, err)
	s := &faultStore{&store{t: t, bin: bin, root: filepath.Join(dir, "root")}, dir}
	low := tarOfFiles(t, "etc/a", "lowest", "etc/b", strings.Repeat("b", 9000))
	mid := tarOfFiles(t, "etc/.wh.a", "", "usr/c", "middle")
	for file, im := range map[string]archive.Image{
		"base.tar":   {Ref: "base:1", Layers: [][]byte{low, mid}},
		"single.tar": {Ref: "single:1", Layers: [][]byte{low, tarOfFiles(t, "one", "1"), tarOfFiles(t, "two", "2")}},
		"new.tar":    {Ref: "new:1", Layers: [][]byte{low, mid, tarOfFiles(t, "x", "x", "y", strings.Repeat("y", 70000))}},
		"again.tar":  {Ref: "single:1", Layers: [][]byte{low, tarOfFiles(t, "three", "3")}},
	} {
		must(t, im.Write(filepath.Join(dir, file), archive.Options{}))
	}
	must(t, os.WriteFile(filepath.Join(dir, "flat.tar"), tarOfFiles(t, "f", "flat", "d/g", "2"), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "have.tar"), []byte("what was there"), 0o600))
	s.run("load", "-i", "base.tar")
	s.run("load", "-i", "single.tar")
	s.run("tag", "base:1", "alias:1")
	s.run("create", "base:1", "box")
	upper, err := filepath.Glob(filepath.Join(dir, "root/rw/*/upper"))
	if err != nil || len(upper) != 1 {
		t.Fatal(upper, err)
	}
	must(t, os.WriteFile(filepath.Join(upper[0], "data"), []byte("of a user"), 0o644))
	return s
}

// damage leaves several things to repair.
func (s *faultStore) damage() {
	names, err := filepath.Glob(filepath.Join(s.root, "layers/*/layer.idx"))
	if err != nil || len(names) == 0 {
		s.t.Fatal(names, err)
	}
	must(s.t, os.Remove(names[0]))
	must(s.t, os.Mkdir(filepath.Join(s.root, "stage/aaaaaaaaaaaaaaaaaaaaaaaaaa"), 0o700))
	must(s.t, os.Truncate(filepath.Join(s.root, "plyfs.db"), 20000))
}

// copyTo makes another one like it. Links and holes do not matter in it.
func (s *faultStore) copyTo(t testing.TB, dir string) *faultStore {
	t.Helper()
	if out, err := exec.Command("cp", "-a", s.dir+"/.", dir).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	c := &faultStore{&store{t: t, bin: s.bin, root: filepath.Join(dir, "root")}, dir}
	c.run("check", "--repair") // indexes know the inodes of their layers
	return c
}

// state is what a user knows of the store, one line each.
func (s *faultStore) state() (lines []string, err error) {
	out, err := s.try("images", "-a", "--json")
	if err != nil {
		return nil, err
	}
	var images []struct {
		Repository, Tag string
		Layers          int
		Size            int64
	}
	if err := json.Unmarshal([]byte(out), &images); err != nil {
		return nil, err
	}
	for _, i := range images {
		lines = append(lines, fmt.Sprintf("image %s:%s, %d layers, %d bytes", i.Repository, i.Tag, i.Layers, i.Size))
	}
	if out, err = s.try("ps", "--json"); err != nil {
		return nil, err
	}
	var conts []struct {
		State     string
		Container struct{ Name, Upper string }
	}
	if err := json.Unmarshal([]byte(out), &conts); err != nil {
		return nil, err
	}
	for _, c := range conts {
		b, err := os.ReadFile(filepath.Join(c.Container.Upper, "data"))
		lines = append(lines, fmt.Sprintf("container %s, %s, %q, %v", c.Container.Name, c.State, b, err == nil))
	}
	slices.Sort(lines)
	return lines, nil
}

// outputs are the files that commands write, where they are whole: the archives have the
// content of base:1 in common.
func (s *faultStore) outputs() []string {
	var bad []string
	for _, n := range []string{"out.tar", "have.tar", "layout", "tree.tar"} {
		p := filepath.Join(s.dir, n)
		b, err := os.ReadFile(p)
		switch {
		case errors.Is(err, fs.ErrNotExist), n == "have.tar" && string(b) == "what was there":
			continue
		case n == "tree.tar":
			err = exec.Command("tar", "-xOf", p, "data").Run()
		default:
			other := &faultStore{&store{t: s.t, bin: s.bin, root: filepath.Join(s.dir, "outputs")}, s.dir}
			_, err = other.try("load", "-i", p)
		}
		if err != nil {
			bad = append(bad, fmt.Sprintf("%s is not whole: %v", n, err))
		}
	}
	return bad
}

// transient are findings that a dead process may leave: its work, and the sidecar of what
// it has just changed. They go with the next repair.
var transient = regexp.MustCompile(`^(K6|K7|K8|K16|K17|K18|K30) `)

func (s *faultStore) findings(args ...string) (open []string, err error) {
	cmd := s.cmd(append([]string{"check", "--deep", "--json"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var rep struct {
		Findings []struct {
			Invariant, Severity, Object, Problem string
			Fixed                                bool
		}
	}
	if jerr := json.Unmarshal(out, &rep); jerr != nil {
		return nil, fmt.Errorf("check: %w: %s", err, &stderr)
	}
	for _, f := range rep.Findings {
		if !f.Fixed && f.Severity != "warning" {
			open = append(open, f.Invariant+" "+f.Object+": "+f.Problem)
		}
	}
	return open, nil
}

// between are lines that are neither before nor after, and those of both that are missing.
func between(before, after, now []string) (bad []string) {
	for _, l := range now {
		if !slices.Contains(before, l) && !slices.Contains(after, l) {
			bad = append(bad, "there is "+l)
		}
	}
	for _, l := range before {
		if slices.Contains(after, l) && !slices.Contains(now, l) {
			bad = append(bad, "there is no "+l)
		}
	}
	return bad
}

// blow is a fate for one call of a command, or for all from there on.
type blow struct {
	name string
	fate crash.Fate
	on   bool // all later ones, too
}

var blows = []blow{{"kill", crash.Kills, false}, {"disk full", crash.Fate(unix.ENOSPC), true}, {"error", crash.Fate(unix.EIO), false}}

// grows are the calls that a full disk refuses.
var grows = regexp.MustCompile(`^(write|pwrite|writev|pwritev2|fallocate|openat|openat2|mkdirat|mknodat|symlinkat|linkat|renameat2?|copy_file_range|sendfile|splice|fsetxattr)$`)

// TestStoreFaults kills commands on a store at the system calls by which they change
// something, lets these calls fail, and fills the disk. A command is done or not; nothing
// that was there is lost; what is left over goes; and it can be repeated.
func TestStoreFaults(t *testing.T) {
	harness.NeedRoot(t)
	dir := fastTempDir(t)
	must(t, os.Mkdir(filepath.Join(dir, "first"), 0o700))
	first := newFaultStore(t, filepath.Join(dir, "first"))
	before, err := first.state()
	must(t, err)
	if len(before) != 4 {
		t.Fatalf("%q", before)
	}
	for _, op := range storeOps {
		t.Run(op.name, func(t *testing.T) {
			t.Parallel()
			f := &faultTrial{t: t, op: op, tmpl: first, dir: dir}
			f.whole()
			n := 0
			for _, b := range blows {
				for _, c := range f.choose(b) {
					if n++; !t.Run(fmt.Sprintf("%s/%d", b.name, c.N), func(t *testing.T) { f.strike(t, b, c) }) {
						t.Logf("%s at %s", b.name, c)
					}
				}
			}
			t.Logf("%d calls, struck %d times", len(f.calls), n)
		})
	}
}

func tempIn(t testing.TB, dir string) string {
	t.Helper()
	d, err := os.MkdirTemp(dir, "")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(d) }) // it goes with dir as well
	return d
}

type faultTrial struct {
	t             *testing.T
	op            storeOp
	tmpl          *faultStore
	dir           string
	before, after []string
	calls         []crash.Call
}

// store is one to strike.
func (f *faultTrial) store(t *testing.T) *faultStore {
	s := f.tmpl.copyTo(t, tempIn(t, f.dir))
	if f.op.prep != nil {
		f.op.prep(s)
	}
	return s
}

// whole executes the command undisturbed.
func (f *faultTrial) whole() {
	s := f.store(f.t)
	var err error
	if f.before, err = s.state(); err != nil && f.op.name != "repair" {
		f.t.Fatal(err)
	}
	must(f.t, f.call(s, func(c crash.Call) crash.Fate {
		f.calls = append(f.calls, c)
		return crash.Passes
	}))
	f.after, err = s.state()
	must(f.t, err)
	if f.op.name == "repair" {
		f.before = f.after
	}
	if open, err := s.findings(); err != nil || len(open) > 0 {
		f.t.Fatal(open, err)
	}
	if len(f.calls) < 3 {
		f.t.Fatalf("only %d calls", len(f.calls))
	}
}

func (f *faultTrial) call(s *faultStore, decide func(crash.Call) crash.Fate) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := s.cmd(f.op.args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := crash.Calls(ctx, cmd, s.dir, decide); err != nil {
		return fmt.Errorf("%w: %s", err, &out)
	}
	return nil
}

var hexOrID = regexp.MustCompile(`[0-9a-f]{64}|[a-z2-7]{26}|[0-9]+`)

// choose takes calls of each kind: the same call on the same kind of file is one.
func (f *faultTrial) choose(b blow) (some []crash.Call) {
	most := map[string]int{"kill": 14, "disk full": 7, "error": 10}[b.name]
	if *flagEveryCall {
		most = len(f.calls)
	}
	kinds := map[string]bool{}
	for _, i := range rand.Perm(len(f.calls)) {
		c := f.calls[i]
		k := c.Name + hexOrID.ReplaceAllString(path.Dir(c.Path)+"/"+path.Ext(c.Path), "#")
		if len(some) >= most || b.on && !grows.MatchString(c.Name) || kinds[k] && !*flagEveryCall {
			continue
		}
		kinds[k] = true
		some = append(some, c)
	}
	return some
}

// strike executes the command with a blow at a call, and looks.
func (f *faultTrial) strike(t *testing.T, b blow, at crash.Call) {
	s := f.store(t)
	hit := ""
	err := f.call(s, func(c crash.Call) crash.Fate {
		if c.N == at.N || b.on && c.N > at.N && grows.MatchString(c.Name) {
			if hit == "" {
				hit = c.String()
			}
			return b.fate
		}
		return crash.Passes
	})
	bad := func(format string, a ...any) {
		t.Errorf("%s at %s (%v): "+format, append([]any{b.name, hit, err}, a...)...)
	}
	if f.op.name == "repair" || f.op.name == "rebuild" {
		// The database may be the one that was damaged.
		if _, e := s.try("check", "--repair"); e != nil {
			bad("repair: %v", e)
		}
	}
	now, serr := s.state()
	if serr != nil {
		bad("%v", serr)
		return
	}
	if err == nil && hit != "" { // it went on without what failed
		if !slices.Equal(f.after, now) {
			bad("it says that it is done, but there is %q, expected %q", now, f.after)
		}
	}
	if d := between(f.before, f.after, now); len(d) > 0 {
		bad("%q", d)
	}
	for _, o := range s.outputs() {
		bad("%s", o)
	}
	open, cerr := s.findings()
	if cerr != nil {
		bad("%v", cerr)
	}
	for _, o := range open {
		if !transient.MatchString(o) {
			bad("check: %s", o)
		}
	}
	// It can be done then, unless it was.
	done := slices.Equal(f.after, now) && !slices.Equal(f.before, f.after)
	if err != nil && !done {
		if _, rerr := s.try(f.op.args...); rerr != nil {
			bad("again: %v", rerr)
		}
	}
	if open, cerr = s.findings("--repair"); cerr != nil || len(open) > 0 {
		bad("after a repair: %q %v", open, cerr)
	}
	if now, serr = s.state(); serr != nil || !slices.Equal(f.after, now) {
		bad("in the end %q, expected %q: %v", now, f.after, serr)
	}
	if left, err := filepath.Glob(filepath.Join(s.dir, "*.tar.*")); err != nil || len(left) > 0 {
		bad("left %q %v", left, err)
	}
}
