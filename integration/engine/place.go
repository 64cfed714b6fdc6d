package engine

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/harness"
)

// Place is a directory with a host process in it.
type Place struct {
	Dir  string
	Root Person // who runs the tests, if that is root
	User Person // an ordinary user with subordinate ids
	t    testing.TB
	host *exec.Cmd
	in   io.Closer
	log  harness.LockedBuffer
}

// Options say what is different in a place.
type Options struct {
	// Sbin and Local are links in /usr/sbin and /usr/local/bin: name -> target. Root only, and
	// with kernel overlayfs.
	Sbin, Local map[string]string
}

const optionsName = "place.json"

// New makes a place in dir, which must not exist, and closes it at the end of the test.
func New(t testing.TB, dir string, o Options) *Place {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, optionsName), b, 0o644); err != nil {
		t.Fatal(err)
	}
	p := &Place{Dir: dir, t: t}
	if err := p.people(); err != nil {
		t.Fatal(err)
	}
	p.host = exec.Command("/proc/self/exe")
	p.host.Env = append(os.Environ(), HostEnv+"="+dir)
	p.host.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() == 0 {
		p.host.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS // and everything in it private
	}
	p.host.Stderr = &p.log
	in, err := p.host.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.in = in
	out, err := p.host.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.host.Start(); err != nil {
		t.Fatalf("start the host of engines: %v", err)
	}
	t.Cleanup(p.Close)
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("the host of engines does not start: %v: %s", err, p.log.String())
	}
	return p
}

// leaveLimit is how long what engines have in the background may take to end.
const leaveLimit = 15 * time.Second

// Close waits until nothing runs any more and ends the host. What still runs or is still
// mounted after a while is an error of the test.
func (p *Place) Close() {
	p.t.Helper()
	pid := p.host.Process.Pid
	deadline := time.Now().Add(leaveLimit)
	wait := time.Millisecond
	for len(processes(pid)) > 0 && time.Now().Before(deadline) {
		<-time.After(wait) // polling with back-off: they are not our children
		wait = min(2*wait, 100*time.Millisecond)
	}
	for _, line := range processes(pid) {
		p.t.Errorf("still runs at the end: %s", line)
	}
	// A podman in the background, which cleans up after a container, makes it private
	// again when everything else is over.
	for _, m := range p.Mounts() {
		if strings.HasSuffix(m, privateGraph) {
			p.Root.Run(p.t, "umount", m)
		}
	}
	for _, m := range p.Mounts() {
		p.t.Errorf("still mounted at the end: %s", m)
	}
	_ = p.in.Close() // the host ends
	ended := make(chan error, 1)
	family := harness.Family(pid)
	go func() { ended <- p.host.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			p.t.Errorf("host of engines: %v: %s", err, p.log.String())
		}
	case <-time.After(10 * time.Second):
		p.t.Errorf("the host of engines does not end: %s", p.log.String())
		_ = p.host.Process.Kill() // it may have ended
	}
	for _, pid := range family[1:] { // reported above
		if proc, err := os.FindProcess(pid); err == nil {
			_ = proc.Kill() // it may have ended
		}
	}
}

// Mounts are the mount points below the directory of the place, as the host sees them,
// without what the place itself consists of.
func (p *Place) Mounts() []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", p.host.Process.Pid))
	if err != nil {
		return []string{err.Error()}
	}
	var found []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 4 && strings.HasPrefix(f[4], p.Dir+"/") && !strings.HasPrefix(f[4], filepath.Join(p.Dir, furniture)+"/") {
			found = append(found, f[4])
		}
	}
	return found
}

// Person is somebody who runs commands in a place.
type Person struct {
	place    *Place
	Name     string
	UID, GID int
	Home     string
	Env      map[string]string // besides the usual ones
}

// With returns the same person with more environment.
func (w Person) With(env map[string]string) Person {
	all := maps.Clone(w.Env)
	maps.Copy(all, env)
	w.Env = all
	return w
}

// Place is where the person is.
func (w Person) Place() *Place { return w.place }

// environ is what every command gets: nothing of the test's own environment but PATH.
func (w Person) environ() []string {
	env := map[string]string{
		"HOME": w.Home, "USER": w.Name, "LOGNAME": w.Name, "LC_ALL": "C", "TMPDIR": filepath.Join(w.Home, "tmp"),
		"PATH": w.path(), "XDG_RUNTIME_DIR": filepath.Join(w.Home, runtimeDir),
	}
	maps.Copy(env, w.Env)
	var list []string
	for _, k := range slices.Sorted(maps.Keys(env)) {
		list = append(list, k+"="+env[k])
	}
	return list
}

// path is the PATH of everybody; an ordinary user's has no directories of root, which
// have some of the engines' programs.
func (w Person) path() string {
	if p, ok := w.Env["PATH"]; ok {
		return p
	}
	return os.Getenv("PATH") + ":/usr/sbin:/sbin"
}

// commandLimit is how long a command may take.
const commandLimit = 90 * time.Second

// Do runs a command, whatever its result. The directory is the person's home.
func (w Person) Do(stdin string, args ...string) Result {
	res, err := w.place.ask(Command{
		Args: args, Dir: w.Home, Env: w.environ(), UID: w.UID, GID: w.GID, Stdin: []byte(stdin), Limit: commandLimit,
	})
	if err != nil {
		res.Err = err.Error()
	}
	return res
}

// Run runs a command that must succeed, with nothing left that holds its output, and
// returns its standard output.
func (w Person) Run(t testing.TB, args ...string) string {
	t.Helper()
	return w.Feed(t, "", args...)
}

// Feed is Run with standard input.
func (w Person) Feed(t testing.TB, stdin string, args ...string) string {
	t.Helper()
	res := w.Do(stdin, args...)
	if res.Err != "" || res.Code != 0 {
		t.Fatalf("%s: %q: exit code %d %s\n%s%s", w.Name, args, res.Code, res.Err, res.Stdout, res.Stderr)
	}
	if res.Held {
		t.Fatalf("%s: %q: something keeps its output open", w.Name, args)
	}
	return res.Stdout
}

// Fail runs a command that must end with this exit code, and returns what it says on
// standard error.
func (w Person) Fail(t testing.TB, code int, args ...string) string {
	t.Helper()
	res := w.Do("", args...)
	if res.Err != "" || res.Code != code {
		t.Fatalf("%s: %q: exit code %d %s, not %d\n%s%s", w.Name, args, res.Code, res.Err, code, res.Stdout, res.Stderr)
	}
	if res.Held {
		t.Fatalf("%s: %q: something keeps its output open", w.Name, args)
	}
	return res.Stderr
}

// ask hands a command to the host.
func (p *Place) ask(cmd Command) (res Result, err error) {
	c, err := net.Dial("unix", filepath.Join(p.Dir, socketName))
	if err != nil {
		return res, fmt.Errorf("the host of engines does not answer: %w: %s", err, p.log.String())
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if err := c.SetDeadline(time.Now().Add(cmd.Limit + 2*heldLimit + 10*time.Second)); err != nil {
		return res, err
	}
	if err := json.NewEncoder(c).Encode(cmd); err != nil {
		return res, err
	}
	return res, json.NewDecoder(c).Decode(&res)
}
