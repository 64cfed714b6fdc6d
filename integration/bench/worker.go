package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// workerEnv, when set, makes this program a worker.
const workerEnv = "PLYFS_BENCH_WORKER"

// job is what a worker does, in the directory Dir, which is the root of a
// mount. Which of the other fields an operation reads is said at its function.
type job struct {
	Op      string
	Dir     string
	File    string   // below Dir
	Names   []string // below Dir
	Size    int64
	Block   int
	Count   int
	Threads int
	Argv    []string
	Env     []string
}

// part is one timed part of a job.
type part struct {
	Seconds float64
	Ops     int64
	// Value replaces the time where it is not a time that was measured.
	Value float64
}

// answer is the last line that a worker prints.
type answer struct {
	Parts []part
	Error string
}

// work is a prepared job: run does the timed part.
type work interface {
	run() ([]part, error)
}

// runWorker reads a job from in, prepares it, says so on out, waits for
// another line, executes the job and reports.
func runWorker(in io.Reader, out io.Writer) error {
	// Not for the programs that a job runs.
	if err := errors.Join(os.Unsetenv(workerEnv), os.Unsetenv("GODEBUG")); err != nil {
		return fmt.Errorf("clear environment: %w", err)
	}
	r := bufio.NewReaderSize(in, 1<<20)
	line, err := r.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("read job: %w", err)
	}
	var j job
	if err := json.Unmarshal(line, &j); err != nil {
		return fmt.Errorf("read job: %w", err)
	}
	runtime.LockOSThread()
	if j.Op != "exec" {
		runtime.GOMAXPROCS(max(j.Threads, 1) + 1)
	}
	w, err := prepare(&j)
	if err != nil {
		return report(out, nil, fmt.Errorf("prepare %s: %w", j.Op, err))
	}
	runtime.GC()
	debug.SetGCPercent(-1)
	if _, err := fmt.Fprintln(out, "ready"); err != nil {
		return fmt.Errorf("say ready: %w", err)
	}
	if _, err := r.ReadByte(); err != nil {
		return fmt.Errorf("wait for the start: %w", err)
	}
	parts, err := w.run()
	if err != nil {
		err = fmt.Errorf("%s: %w", j.Op, err)
	}
	return report(out, parts, err)
}

func report(out io.Writer, parts []part, err error) error {
	a := answer{Parts: parts}
	if err != nil {
		a.Error = err.Error()
	}
	return json.NewEncoder(out).Encode(a)
}

// prepare opens what the job needs and allocates all its memory.
func prepare(j *job) (work, error) {
	if j.Op == "exec" {
		return &execWork{j}, nil
	}
	root, err := unix.Open(j.Dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", j.Dir, err)
	}
	names := cstrs(j.Names)
	file := newCstr(j.File)
	buf := func(n int) []byte { return newBuffer(n) }
	switch j.Op {
	case "walk", "chown", "remove", "readdir":
		return newTreeWork(j, root, file), nil
	case "lstat", "missing", "chmod", "unlink", "rename":
		return newNameWork(j, root, names), nil
	case "read-small":
		return newSmallWork(j, root, names), nil
	case "append", "create":
		return &writeSmallWork{op: j.Op, root: root, names: names, data: buf(j.Block)}, nil
	case "read", "read-random", "read-mapped", "write", "write-random":
		return newBigWork(j, root, file), nil
	case "mkdir":
		return &mkdirWork{root, names}, nil
	}
	return nil, fmt.Errorf("unknown operation %q", j.Op)
}

// newBuffer returns memory that is there already: no page of it is missing.
func newBuffer(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7)
	}
	return b
}

// clock measures one part.
type clock struct{ begin time.Time }

func start() clock { return clock{time.Now()} }

func (c clock) part(ops int) part {
	return part{Seconds: time.Since(c.begin).Seconds(), Ops: int64(ops)}
}

// execWork runs a program: Argv with the additional environment Env, in both of
// which $DIR stands for Dir.
type execWork struct{ j *job }

func (w *execWork) run() ([]part, error) {
	here := func(words []string) []string {
		out := make([]string, len(words))
		for i, word := range words {
			out[i] = strings.ReplaceAll(word, "$DIR", w.j.Dir)
		}
		return out
	}
	argv := here(w.j.Argv)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), here(w.j.Env)...)
	c := start()
	out, err := cmd.CombinedOutput()
	p := c.part(max(w.j.Count, 1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, tail(out))
	}
	return []part{p}, nil
}

// tail is the end of what a program printed, on one line.
func tail(out []byte) string {
	s := strings.Join(strings.Fields(string(out)), " ")
	if len(s) > 400 {
		s = "…" + s[len(s)-400:]
	}
	return s
}

// worker is the other side: a worker process as its master sees it.
type worker struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
	err *lastWords
}

// startWorker starts a worker and returns when it is ready. The caller ends it
// with finish or kill. When ctx ends the worker is killed, and abort must break
// the mount it works on: a request that a server has taken cannot be killed.
func startWorker(ctx context.Context, j job, abort func()) (*worker, error) {
	line, err := json.Marshal(j)
	if err != nil {
		return nil, fmt.Errorf("describe job: %w", err)
	}
	w := &worker{cmd: exec.CommandContext(ctx, "/proc/self/exe"), err: &lastWords{}}
	// Preemption of long-running goroutines sends signals, which interrupt
	// requests that a FUSE server is working on.
	w.cmd.Env = append(os.Environ(), workerEnv+"=1", "GODEBUG=asyncpreemptoff=1")
	w.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	w.cmd.Cancel = func() error {
		err := unix.Kill(-w.cmd.Process.Pid, unix.SIGKILL)
		abort()
		return err
	}
	w.cmd.WaitDelay = 5 * time.Second
	w.cmd.Stderr = w.err
	if w.in, err = w.cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("start worker: %w", err)
	}
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start worker: %w", err)
	}
	w.out = bufio.NewReader(out)
	if err := w.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start worker: %w", err)
	}
	if _, err := w.in.Write(append(line, '\n')); err != nil {
		return nil, errors.Join(fmt.Errorf("start worker: %w", err), w.kill())
	}
	reply, err := w.out.ReadString('\n')
	if err == nil && reply == "ready\n" {
		return w, nil
	}
	var a answer
	if jerr := json.Unmarshal([]byte(reply), &a); err == nil && jerr == nil {
		err = errors.New(a.Error)
	} else {
		err = fmt.Errorf("worker says %q: %w", reply, err)
	}
	return nil, errors.Join(err, w.kill())
}

// finish lets the worker do its job.
func (w *worker) finish() ([]part, error) {
	if _, err := w.in.Write([]byte("\n")); err != nil {
		return nil, errors.Join(fmt.Errorf("start job: %w", err), w.kill())
	}
	reply, err := w.out.ReadBytes('\n')
	if err != nil {
		return nil, fmt.Errorf("worker ended: %w: %s", errors.Join(err, w.kill()), w.err.String())
	}
	var a answer
	if err := json.Unmarshal(reply, &a); err != nil {
		return nil, errors.Join(fmt.Errorf("worker says %q: %w", reply, err), w.kill())
	}
	if err := w.cmd.Wait(); err != nil {
		return nil, fmt.Errorf("worker: %w: %s", err, w.err.String())
	}
	if a.Error != "" {
		return nil, errors.New(a.Error)
	}
	return a.Parts, nil
}

// kill ends a worker that is of no use any more.
func (w *worker) kill() error {
	_ = unix.Kill(-w.cmd.Process.Pid, unix.SIGKILL) // it may have ended
	if err := w.cmd.Wait(); err != nil && w.cmd.ProcessState == nil {
		return fmt.Errorf("wait for worker: %w", err)
	}
	return nil
}
