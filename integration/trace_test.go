package integration

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
	"github.com/plyfs/plyfs/unionfs/trace"
)

// tracer is a `plyfs trace --json` that runs.
type tracer struct {
	t      *testing.T
	cmd    *exec.Cmd
	mu     sync.Mutex
	events []trace.Event
	ended  chan error
	stderr bytes.Buffer
}

// newTracer returns when the mount server tells of what happens.
func newTracer(t *testing.T, target string, options ...string) *tracer {
	t.Helper()
	r := &tracer{t: t, ended: make(chan error, 1)}
	r.cmd = exec.Command(program(t, "plyfs"), append([]string{"trace", "--json", target}, options...)...)
	r.cmd.Stderr = &r.stderr
	out, err := r.cmd.StdoutPipe()
	must(t, err)
	must(t, r.cmd.Start())
	go func() {
		lines := bufio.NewScanner(out)
		lines.Buffer(nil, 1<<20)
		var err error
		for lines.Scan() {
			var e trace.Event
			err = errors.Join(err, json.Unmarshal(lines.Bytes(), &e))
			r.mu.Lock()
			r.events = append(r.events, e)
			r.mu.Unlock()
		}
		r.ended <- errors.Join(err, lines.Err(), r.cmd.Wait())
	}()
	t.Cleanup(func() { _ = r.cmd.Process.Kill() }) // it has ended, unless the test failed
	// What is asked for again and again until it is told of, is looked up in the mount.
	waitFor(t, "the trace to begin", func() bool {
		_, _ = os.Lstat(filepath.Join(target, "is-anybody-there")) // it is not
		for _, e := range r.seen() {
			if e.Path == "/is-anybody-there" {
				return true
			}
		}
		return false
	})
	return r
}

func (r *tracer) seen() []trace.Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]trace.Event(nil), r.events...)
}

// stop ends the trace and returns what it has told. What a program had done before is all there.
func (r *tracer) stop() []trace.Event {
	r.t.Helper()
	must(r.t, r.cmd.Process.Signal(unix.SIGINT))
	select {
	case err := <-r.ended:
		if err != nil {
			r.t.Errorf("trace: %v\n%s", err, r.stderr.String())
		}
	case <-time.After(30 * time.Second):
		r.t.Fatal("trace does not end")
	}
	return r.seen()
}

// traced is what strace and we must say alike: an operation that has succeeded, or a name
// that was not there.
type traced struct{ Op, Path, To, Result string }

// completeMount is a mount that shows everything.
func completeMount(t *testing.T, lower oracle.Layer) (target string) {
	t.Helper()
	dir := t.TempDir()
	stack := harness.Stack{Lowers: []string{filepath.Join(dir, "lower")}, Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work")}
	target = filepath.Join(dir, "m")
	for _, d := range append(stack.Lowers, stack.Upper, stack.Work, target) {
		must(t, os.Mkdir(d, 0o755))
	}
	must(t, lower.Build(stack.Lowers[0]))
	m, err := policySubject(t, "trace=complete").Mount(stack, target)
	must(t, err)
	t.Cleanup(func() { must(t, m.Unmount()) })
	return target
}

// knownProgram does a bit of everything. $1 is the mount.
const knownProgram = `
set -e
m=$1/data
cd /
cat "$m/deep/low1" > /dev/null
echo new > "$m/new"
echo more >> "$m/new"
echo changed >> "$m/low1"
cp "$m/low2" "$m/copy"
dd if=/dev/zero of="$m/big" bs=65536 count=40 2>/dev/null
dd if="$m/big" of=/dev/null bs=4096 2>/dev/null
mkdir "$m/dir" "$m/dir/sub"
mv "$m/new" "$m/dir/sub/moved"
mv "$m/dir" "$m/renamed"
ln "$m/copy" "$m/hard"
ln -s /etc/passwd "$m/link"
readlink "$m/link" > /dev/null
chmod 600 "$m/low2"
chown 12:34 "$m/low2"
touch -d @1000 "$m/low3"
truncate -s 5 "$m/big"
ls "$m/deep" > /dev/null
rm "$m/hard" "$m/low3"
rmdir "$m/renamed/sub" 2>/dev/null || rm "$m/renamed/sub/moved"
rmdir "$m/renamed/sub" "$m/renamed"
cat "$m/absent" 2>/dev/null || :
`

// TestTraceAgreesWithStrace: on a mount without caches, we tell what strace tells.
func TestTraceAgreesWithStrace(t *testing.T) {
	needOracle(t)
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("needs strace")
	}
	target := completeMount(t, workshop())
	r := newTracer(t, target)
	log := filepath.Join(t.TempDir(), "log")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, strace, "-f", "-y", "-qq", "-v", "-o", log, "-e",
		"trace=open,openat,creat,mkdir,mkdirat,rmdir,unlink,unlinkat,rename,renameat,renameat2,link,linkat,symlink,symlinkat,chmod,fchmod,fchmodat,chown,lchown,fchown,fchownat,utimensat,truncate,ftruncate,read,pread64,write,pwrite64,copy_file_range,readlink,readlinkat",
		"sh", "-c", knownProgram, "known", target).CombinedOutput()
	if err != nil {
		t.Fatalf("the program: %v: %s", err, out)
	}
	events := r.stop()
	text, err := os.ReadFile(log)
	must(t, err)
	want, wantBytes := straceOps(t, string(text), target)
	got, gotBytes := tracedOps(events)
	if d := cmp.Diff(want, got); d != "" || len(want) < 25 {
		t.Logf("%d operations", len(want))
		t.Errorf("operations, strace's against ours: %s", d)
	}
	if wantBytes != gotBytes || gotBytes[0] < 65536*40 || gotBytes[1] < 65536*40 {
		t.Errorf("bytes read and written: %v, strace says %v", gotBytes, wantBytes)
	}
	copied := map[string]bool{}
	for _, e := range events {
		if e.CopiedUp {
			copied[e.Path] = true
		}
		if e.Pid == 0 && e.Op != "release" && e.Op != "releasedir" || e.Pid != 0 && e.Command == "" {
			t.Errorf("nobody has done this: %+v", e)
		}
	}
	for _, p := range []string{"/data/low1", "/data/low2", "/data/low3"} {
		if !copied[p] {
			t.Errorf("%s has been copied up unnoticed", p)
		}
	}
}

// tracedOps is what the events say.
func tracedOps(events []trace.Event) (ops []traced, bytes [2]int64) {
	for _, e := range events {
		switch e.Op {
		case "read", "write":
			i := 0
			if e.Op == "write" {
				i = 1
			}
			bytes[i] += e.Bytes
			continue
		case "copy_file_range":
			bytes[0] += e.Bytes
			bytes[1] += e.Bytes
			continue
		}
		o := traced{Op: e.Op, Path: e.Path, To: e.To, Result: e.Error}
		switch {
		case e.Op == "lookup" && e.Error == "ENOENT" && strings.HasSuffix(e.Path, "/absent"):
			o.Op = "open"
		case e.Error != "":
			continue // the errors of others, strace has with the call that met them
		case e.Op == "opendir":
			o.Op = "open"
		case e.Op == "rename2":
			o.Op = "rename"
		case e.Op == "setattr":
			if strings.HasPrefix(e.Detail, "size=") && e.Size == 0 && e.Command == "sh" {
				continue // that of O_TRUNC
			}
			o.To, _, _ = strings.Cut(e.Detail, "=")
			switch o.To {
			case "uid", "gid":
				o.To = "owner"
			case "atime", "mtime":
				o.To = "times"
			}
		case e.Op == "open", e.Op == "create", e.Op == "mkdir", e.Op == "rmdir", e.Op == "unlink", e.Op == "link", e.Op == "symlink", e.Op == "readlink":
			if e.Op == "create" {
				o.Op = "open"
			}
		default:
			continue
		}
		ops = append(ops, o)
	}
	return ops, bytes
}

var straceLine = regexp.MustCompile(`^\d+ +(\w+)\((.*)\) += (-?\d+|0x[0-9a-f]+)(<[^>]*>)?(?: (\w+))?`)

// straceOps is what strace says about what lies in dir.
func straceOps(t *testing.T, log, dir string) (ops []traced, bytes [2]int64) {
	t.Helper()
	inside := func(p string) (string, bool) { return strings.CutPrefix(p, dir) }
	quotes := regexp.MustCompile(`"((?:[^"\\]|\\.)*)"`)
	files := regexp.MustCompile(`^\d+<([^>]*)>`)
	for line := range strings.Lines(log) {
		m := straceLine.FindStringSubmatch(line)
		if m == nil {
			if strings.Contains(line, dir) && !strings.Contains(line, "resumed>") && !strings.Contains(line, "+++") {
				t.Errorf("a line of strace that we do not understand: %s", line)
			}
			continue
		}
		call, args, result, name := m[1], m[2], m[3], m[5]
		var paths []string
		for _, q := range quotes.FindAllStringSubmatch(args, -1) {
			paths = append(paths, q[1])
		}
		n, _ := strconv.ParseInt(result, 0, 64) // a number, the pattern says
		if f := files.FindStringSubmatch(args); f != nil {
			p, ok := inside(f[1])
			switch {
			case !ok:
			case call == "read" || call == "pread64":
				bytes[0] += max(n, 0)
			case call == "write" || call == "pwrite64":
				bytes[1] += max(n, 0)
			case call == "copy_file_range":
				bytes[0] += max(n, 0)
				bytes[1] += max(n, 0)
			case call == "ftruncate":
				ops = append(ops, traced{"setattr", p, "size", ""})
			case call == "utimensat" && n == 0:
				ops = append(ops, traced{"setattr", p, "times", ""})
			case call == "fchmod" || call == "fchown":
				t.Errorf("not expected: %s", line)
			}
			continue
		}
		if len(paths) == 0 {
			continue
		}
		p, ok := inside(paths[0])
		if !ok && (call != "symlink" && call != "symlinkat") {
			continue
		}
		if n < 0 && (name != "ENOENT" || !strings.HasSuffix(p, "/absent")) {
			continue
		}
		o := traced{Path: p, Result: name}
		switch strings.TrimSuffix(strings.TrimSuffix(call, "at2"), "at") {
		case "open", "creat":
			o.Op = "open"
		case "mkdir", "rmdir", "unlink":
			o.Op = strings.TrimSuffix(call, "at")
			if strings.Contains(args, "AT_REMOVEDIR") {
				o.Op = "rmdir"
			}
		case "rename", "link":
			o.Op = strings.TrimSuffix(strings.TrimSuffix(call, "2"), "at")
			o.To, _ = inside(paths[1])
		case "symlink":
			if o.Path, ok = inside(paths[1]); !ok {
				continue
			}
			o.Op, o.To = "symlink", paths[0]
		case "readlink":
			if n < 0 {
				continue
			}
			o.Op, o.To = "readlink", paths[1]
		case "chmod", "fchmod":
			o.Op, o.To = "setattr", "mode"
		case "chown", "lchown", "fchown":
			o.Op, o.To = "setattr", "owner"
		case "utimens":
			o.Op, o.To = "setattr", "times"
		case "truncate":
			o.Op, o.To = "setattr", "size"
		default:
			t.Errorf("not expected: %s", line)
			continue
		}
		ops = append(ops, o)
	}
	return ops, bytes
}

// TestTraceUnderLoad: traces come and go while programs work, of which none notices; who
// listens all the time and can keep up hears of each operation once.
func TestTraceUnderLoad(t *testing.T) {
	needOracle(t)
	target := completeMount(t, workshop())
	all := newTracer(t, target, "--op", "mkdir,rmdir,lookup")
	stop := make(chan struct{})
	var work sync.WaitGroup
	work.Go(func() { // they come and go
		for !stopped(stop) {
			ctx, cancel := context.WithTimeout(t.Context(), 80*time.Millisecond)
			out, err := exec.CommandContext(ctx, program(t, "plyfs"), "trace", target, "--for", "50ms", "--summary").CombinedOutput()
			cancel()
			if err != nil && ctx.Err() == nil {
				t.Errorf("%v: %s", err, out)
			}
		}
	})
	must(t, os.Mkdir(filepath.Join(target, "made"), 0o755))
	const each, workers = 300, 3
	var makers sync.WaitGroup
	for w := range workers {
		makers.Go(func() {
			for i := range each {
				p := filepath.Join(target, "made", fmt.Sprintf("%d-%d", w, i))
				if err := errors.Join(os.Mkdir(p, 0o755), os.Remove(p)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	makers.Wait()
	close(stop)
	work.Wait()
	counts := map[string]int{}
	for _, e := range all.stop() {
		counts[e.Op+" "+e.Path+" "+e.Error]++
	}
	for w := range workers {
		for i := range each {
			for _, op := range []string{"mkdir", "rmdir"} {
				if k := fmt.Sprintf("%s /made/%d-%d ", op, w, i); counts[k] != 1 {
					t.Errorf("%q was told %d times", k, counts[k])
				}
			}
		}
	}
}

// TestTraceRecords: what was recorded is shown again, and nobody else can read it.
func TestTraceRecords(t *testing.T) {
	harness.NeedFUSE(t)
	m := newImageMount(t, oracle.Recipe{Lowers: []oracle.Layer{workshop()}}, "--trace", "--name", "box")
	file := filepath.Join(t.TempDir(), "recording")
	r := newTracer(t, m.target, "--record", file, "--op", "change,lookup")
	must(t, os.Chmod(filepath.Join(m.target, "data", "low1"), 0o600))
	must(t, os.Mkdir(filepath.Join(m.target, "dir"), 0o755))
	_, server := m.pids()
	must(t, unix.Kill(server, unix.SIGKILL))
	_, err := os.Lstat(filepath.Join(m.target, "dir", "is-anybody-there")) // served by another one
	if !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	waitFor(t, "the trace to go on", func() bool {
		_, _ = os.Lstat(filepath.Join(m.target, "dir", "again")) // it is not there
		for _, e := range r.seen() {
			if e.Path == "/dir/again" {
				return true
			}
		}
		return false
	})
	n := len(r.stop())
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("recording: %v, %v", st, err)
	}
	out := m.s.run("trace", "show", file, "--json")
	if got := strings.Count(out, "\n"); got != n {
		t.Errorf("%d operations are shown, %d were recorded", got, n)
	}
	if out := m.s.run("trace", "show", file, "--copy-ups"); !strings.Contains(out, "/data/low1") || !strings.Contains(out, "copied up") || strings.Contains(out, "mkdir") {
		t.Errorf("copy-ups: %s", out)
	}
	if out := m.s.run("trace", "show", file, "--summary"); !strings.Contains(out, "mkdir") || !strings.Contains(out, "PROGRAM") {
		t.Errorf("summary: %s", out)
	}
	whole, err := os.ReadFile(file)
	must(t, err)
	damaged := filepath.Join(t.TempDir(), "damaged")
	for _, c := range []struct {
		content, say string
		fails        bool
	}{
		{string(whole[:len(whole)-20]), "mkdir", false}, // the end is missing
		{"{}\n", "no recording", true},
		{string(whole) + "garbage\n", "no recording", true},
		{strings.Repeat("x", 2<<20), "too long", true},
	} {
		must(t, os.WriteFile(damaged, []byte(c.content), 0o600))
		if out, err := m.s.try("trace", "show", damaged); (err != nil) != c.fails || !strings.Contains(out, c.say) {
			t.Errorf("expected %q: %v: %.300s", c.say, err, out)
		}
	}
	id := strings.Fields(m.s.run("ps", "-q"))[0]
	r = newTracer(t, m.target)            // a mount that ends is no error
	m.s.run("trace", id, "--for", "50ms") // ps prints a part of the ID
	m.s.run("umount", m.target)
	if err := <-r.ended; err != nil {
		t.Errorf("%v: %s", err, r.stderr.String())
	}
	m.s.run("mount", "--trace", "box", m.target)
	if out, err := m.s.try("trace", "box", "--record", file, "--for", "1s"); err == nil || !strings.Contains(out, "exists") {
		t.Errorf("recorded over a recording: %v: %s", err, out)
	}
}

// TestHistory: it is written down beside the container who has copied what up, also by the
// server that comes after one that was killed, and nobody sees it in the mount.
func TestHistory(t *testing.T) {
	harness.NeedFUSE(t)
	m := newImageMount(t, oracle.Recipe{Lowers: []oracle.Layer{workshop()}}, "--name", "box")
	at := func(p string) string { return filepath.Join(m.target, p) }
	must(t, os.Chmod(at("data/low1"), 0o600))
	must(t, os.Rename(at("names/deep/low1"), at("names/low100")))
	must(t, os.WriteFile(at("locks/deep/new"), nil, 0o644))
	must(t, os.WriteFile(at("locks/deep/again"), nil, 0o644))
	_, server := m.pids()
	must(t, unix.Kill(server, unix.SIGKILL))
	must(t, os.Truncate(at("maps/low2"), 3))
	files, err := filepath.Glob(filepath.Join(m.s.root, "rw", "*", "history"))
	if err != nil || len(files) != 1 {
		t.Fatalf("histories: %v, %v", files, err)
	}
	b, err := os.ReadFile(files[0])
	must(t, err)
	var got []string
	for line := range strings.Lines(string(b)) {
		var c trace.Copied
		must(t, json.Unmarshal([]byte(line), &c))
		if c.Command == "" || c.Pid != uint32(os.Getpid()) || time.Since(c.Time) > time.Minute {
			t.Errorf("who and when: %s", line)
		}
		got = append(got, fmt.Sprintf("%s %s %d", c.Op, c.Path, c.Dirs))
	}
	want := []string{"setattr /data/low1 1", "rename /names/deep/low1 2", "create /locks/deep 1", "setattr /maps/low2 1"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if st, err := os.Stat(files[0]); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("history: %v, %v", st, err)
	}
}

// TestLayerXattrs: where it was asked for, attributes that are in no list say of which layer
// files are.
func TestLayerXattrs(t *testing.T) {
	harness.NeedFUSE(t)
	get := func(path, attr string) (string, error) {
		b := make([]byte, 1000)
		n, err := unix.Lgetxattr(path, attr, b)
		return string(b[:max(n, 0)]), err
	}
	m := newImageMount(t, oracle.Recipe{Lowers: []oracle.Layer{workshop()}}, "--layer-xattrs")
	low := filepath.Join(m.target, "data", "low1")
	must(t, os.Chmod(filepath.Join(m.target, "data", "low2"), 0o600))
	must(t, os.WriteFile(filepath.Join(m.target, "new"), nil, 0o644))
	for name, want := range map[string][2]string{
		"data/low1": {"lower:2", `directory: "`}, // below the layer of the container's own
		"data/low2": {"upper", `copied up: from lower:2, "/data/low2"`},
		"new":       {"upper", `path: "/new"`},
		"data":      {"upper", `merged: with "/data" of the lowers`},
		"names":     {"lower:2", `layer: lower:2`},
	} {
		path := filepath.Join(m.target, name)
		if got, err := get(path, "user.plyfs.layer"); got != want[0] || err != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if got, err := get(path, "user.plyfs.explain"); !strings.Contains(got, want[1]) || err != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if n, err := unix.Lgetxattr(low, "user.plyfs.layer", nil); n != len("lower:2") || err != nil {
		t.Errorf("size %d, %v", n, err)
	}
	if _, err := unix.Lgetxattr(low, "user.plyfs.layer", make([]byte, 2)); !errors.Is(err, unix.ERANGE) {
		t.Errorf("too short: %v", err)
	}
	if n, err := unix.Llistxattr(low, nil); n != 0 || err != nil {
		t.Errorf("%d bytes of names, %v", n, err)
	}
	if err := unix.Lsetxattr(low, "user.plyfs.layer", []byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("set: %v", err)
	}
	if err := unix.Lremovexattr(low, "user.plyfs.explain"); !errors.Is(err, unix.EPERM) {
		t.Errorf("removed: %v", err)
	}
	m.s.run("umount", m.target)
	m.s.run("mount", "image:1", m.target)
	if got, err := get(low, "user.plyfs.layer"); !errors.Is(err, unix.ENODATA) {
		t.Errorf("nobody has asked for it: %q, %v", got, err)
	}
}

// TestTop: a picture has all mounts, those of no store too, and says what is done with the one
// that was named.
func TestTop(t *testing.T) {
	harness.NeedFUSE(t)
	m := newImageMount(t, oracle.Recipe{Lowers: []oracle.Layer{workshop()}}, "--trace", "--name", "box")
	stop := make(chan struct{})
	var work sync.WaitGroup
	work.Go(func() {
		for !stopped(stop) {
			_, _ = os.Lstat(filepath.Join(m.target, "busy")) // it is not there
			<-time.After(time.Millisecond)
		}
	})
	out := m.s.run("top", "--json", "-n", "2", "--interval", "300ms", "box")
	text := m.s.run("top", "--interval", "300ms")
	close(stop)
	work.Wait()
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 2 {
		t.Fatalf("%d pictures: %s", len(lines), out)
	}
	var p struct {
		Mounts []struct {
			Name, Absent        string
			OperationsPerSecond float64
			P50Seconds          float64
		}
		Traced []struct {
			Operations, Programs, Paths []struct {
				Name  string
				Count uint64
			}
		}
	}
	must(t, json.Unmarshal([]byte(lines[1]), &p))
	if len(p.Mounts) != 1 || p.Mounts[0].Name != "box" || p.Mounts[0].OperationsPerSecond < 10 || p.Mounts[0].P50Seconds <= 0 || p.Mounts[0].Absent == "-" {
		t.Errorf("mounts: %+v", p.Mounts)
	}
	if len(p.Traced) != 1 || len(p.Traced[0].Programs) == 0 || len(p.Traced[0].Operations) == 0 {
		t.Fatalf("traced: %+v", p.Traced)
	}
	found := false
	for _, path := range p.Traced[0].Paths {
		found = found || path.Name == "/busy" && path.Count > 10
	}
	if !found {
		t.Errorf("paths: %+v", p.Traced[0].Paths)
	}
	if !strings.Contains(text, "box") || !strings.Contains(text, "OPS/S") || strings.Contains(text, "\x1b") {
		t.Errorf("a picture for no terminal: %q", text)
	}
}
