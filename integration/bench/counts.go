package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// requests maps the name of a FUSE operation to how often it was sent. FORGET
// is not among them: the kernel has no event for it. Under "lost" is how many
// events did not fit into the trace.
type requests map[string]uint64

func (c requests) total() (n uint64) {
	for op, k := range c {
		if op != lostRequests {
			n += k
		}
	}
	return n
}

const lostRequests = "lost"

// tracer counts FUSE requests with an instance of the kernel's tracing of its
// own. Where the kernel has histograms, it counts by itself; otherwise events go
// to a buffer, which is read afterwards.
type tracer struct {
	dir   string // the instance
	event string
	hist  bool
	names map[uint64]string
}

// tracerName is followed by the number of this process.
const tracerName = "plyfs-bench-"

// traceBuffer is the size of the buffer for each CPU in KiB: room for about
// half a million events.
const traceBuffer = "32768"

func newTracer() (*tracer, error) {
	root := "/sys/kernel/tracing"
	if _, err := os.Stat(filepath.Join(root, "events")); err != nil {
		if err := unix.Mount("tracefs", root, "tracefs", 0, ""); err != nil {
			return nil, fmt.Errorf("mount tracefs on %s: %w", root, err)
		}
	}
	t := &tracer{dir: filepath.Join(root, "instances", tracerName+strconv.Itoa(os.Getpid()))}
	t.event = filepath.Join(t.dir, requestSend)
	if err := removeStale(filepath.Join(root, "instances")); err != nil {
		return nil, err
	}
	if err := os.Mkdir(t.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make trace instance: %w", err)
	}
	format, err := os.ReadFile(filepath.Join(t.event, "format"))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("this kernel has no trace event for FUSE requests: %w", err), t.close())
	}
	t.names = opcodeNames(string(format))
	triggers, err := os.ReadFile(filepath.Join(t.event, "trigger"))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read triggers: %w", err), t.close())
	}
	t.hist = strings.Contains(string(triggers), " hist ") || strings.HasSuffix(strings.TrimSpace(string(triggers)), " hist")
	if !t.hist {
		if err := t.set("buffer_size_kb", traceBuffer); err != nil {
			return nil, errors.Join(err, t.close())
		}
	}
	return t, nil
}

// removeStale removes instances that killed runs have left behind.
func removeStale(instances string) error {
	old, err := filepath.Glob(filepath.Join(instances, tracerName+"*"))
	if err != nil {
		return fmt.Errorf("list trace instances: %w", err)
	}
	for _, dir := range old {
		pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), tracerName))
		if err != nil || errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			if err := os.Remove(dir); err != nil {
				return fmt.Errorf("remove trace instance of an earlier run: %w", err)
			}
		}
	}
	return nil
}

// set writes to a file of the instance.
func (t *tracer) set(file, value string) error {
	if err := os.WriteFile(filepath.Join(t.dir, file), []byte(value), 0); err != nil {
		return fmt.Errorf("write %q to trace file %s: %w", value, file, err)
	}
	return nil
}

const requestSend = "events/fuse/fuse_request_send/"

func trigger(minor string) string { return "hist:keys=opcode if connection==" + minor }

// start begins to count the requests of the connection, whose number is the
// minor number of its device.
func (t *tracer) start(minor string) error {
	if t.hist {
		return t.set(requestSend+"trigger", trigger(minor))
	}
	return errors.Join(
		t.set("trace", ""),
		t.set(requestSend+"filter", "connection=="+minor),
		t.set(requestSend+"enable", "1"),
	)
}

// stop returns what was counted since start.
func (t *tracer) stop() (requests, error) {
	if t.hist {
		b, err := os.ReadFile(filepath.Join(t.event, "hist"))
		if err != nil {
			return nil, fmt.Errorf("read histogram: %w", err)
		}
		counts, err := parseHist(string(b), t.names)
		f, rerr := os.ReadFile(filepath.Join(t.event, "trigger"))
		for line := range strings.Lines(string(f)) {
			if strings.HasPrefix(line, "hist:") {
				spec, _, _ := strings.Cut(strings.TrimSpace(line), " [")
				rerr = errors.Join(rerr, t.set(requestSend+"trigger", "!"+spec))
			}
		}
		return counts, errors.Join(err, rerr)
	}
	if err := t.set(requestSend+"enable", "0"); err != nil {
		return nil, err
	}
	f, err := os.Open(filepath.Join(t.dir, "trace"))
	if err != nil {
		return nil, fmt.Errorf("read trace: %w", err)
	}
	defer f.Close()
	counts, err := parseTrace(f)
	if err != nil {
		return nil, err
	}
	lost, err := t.overrun()
	if lost > 0 {
		counts[lostRequests] = lost
	}
	return counts, errors.Join(err, t.set("trace", ""))
}

// overrun is how many events did not fit.
func (t *tracer) overrun() (n uint64, err error) {
	files, err := filepath.Glob(filepath.Join(t.dir, "per_cpu/cpu*/stats"))
	if err != nil {
		return 0, fmt.Errorf("list trace statistics: %w", err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return 0, fmt.Errorf("read trace statistics: %w", err)
		}
		for line := range strings.Lines(string(b)) {
			for _, key := range []string{"overrun: ", "commit overrun: ", "dropped events: "} {
				if v, ok := strings.CutPrefix(strings.TrimSpace(line), key); ok {
					k, err := strconv.ParseUint(v, 10, 64)
					if err != nil {
						return 0, fmt.Errorf("trace statistics: %w", err)
					}
					n += k
				}
			}
		}
	}
	return n, nil
}

// close removes the instance.
func (t *tracer) close() error {
	if err := os.Remove(t.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove trace instance: %w", err)
	}
	return nil
}

var symbol = regexp.MustCompile(`\{\s*(\d+),\s*"(?:FUSE_)?([A-Z0-9_]+)"\s*\}`)

// opcodeNames reads the names of operations from the format of the event.
func opcodeNames(format string) map[uint64]string {
	names := map[uint64]string{}
	for _, m := range symbol.FindAllStringSubmatch(format, -1) {
		if n, err := strconv.ParseUint(m[1], 10, 64); err == nil {
			names[n] = m[2]
		}
	}
	return names
}

var (
	histLine    = regexp.MustCompile(`\{ opcode:\s*(\d+)[^}]*\} hitcount:\s*(\d+)`)
	histDropped = regexp.MustCompile(`(?m)^\s*Dropped:\s*(\d+)`)
)

// parseHist reads a histogram with the key opcode.
func parseHist(text string, names map[uint64]string) (requests, error) {
	counts := requests{}
	for _, m := range histLine.FindAllStringSubmatch(text, -1) {
		op, err := strconv.ParseUint(m[1], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("histogram: %w", err)
		}
		n, err := strconv.ParseUint(m[2], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("histogram: %w", err)
		}
		name := names[op]
		if name == "" {
			name = "opcode " + m[1]
		}
		counts[name] += n
	}
	if m := histDropped.FindStringSubmatch(text); m != nil && m[1] != "0" {
		n, err := strconv.ParseUint(m[1], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("histogram: %w", err)
		}
		counts[lostRequests] = n
	}
	return counts, nil
}

var traceLine = regexp.MustCompile(`fuse_request_send: connection \d+ req \d+ opcode (\d+) \((?:FUSE_)?([A-Z0-9_x]+)\)`)

// parseTrace counts the events of a trace.
func parseTrace(r io.Reader) (requests, error) {
	counts := requests{}
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		if m := traceLine.FindSubmatch(sc.Bytes()); m != nil {
			counts[string(m[2])]++
		}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("read trace: %w", err)
	}
	return counts, nil
}
