package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs/trace"
)

// errEnough ends a trace that has shown as many operations as were asked for.
var errEnough = errors.New("enough")

// traceView shows what a mount server says.
type traceView struct {
	json    bool
	options traceOptions
	out     *bufio.Writer
	record  *os.File
	file    *bufio.Writer // to record
	seen    uint64
	dropped uint64
	sums    traceSums
	began   time.Time
	first   time.Time // of the operations
	last    time.Time
	shown   bool     // what was recorded
	blind   []string // what was said of what is not seen
}

func newTraceView(asJSON bool, o traceOptions, out io.Writer) *traceView {
	return &traceView{json: asJSON, options: o, out: bufio.NewWriter(out), sums: newTraceSums(), began: time.Now()}
}

// answer shows one line of a server.
func (v *traceView) answer(a holder.Answer) error {
	if v.record != nil {
		if v.file == nil {
			v.file = bufio.NewWriter(v.record)
		}
		if err := json.NewEncoder(v.file).Encode(a); err != nil {
			return fmt.Errorf("record: %w", err)
		}
	}
	switch {
	case a.Mount != nil:
		v.mount(a.Mount)
	case a.Dropped > v.dropped:
		v.note(fmt.Sprintf("%d operations were dropped: they came faster than they could be shown", a.Dropped-v.dropped))
		v.dropped = a.Dropped
	case a.Event != nil:
		if v.seen == 0 {
			v.first = a.Event.Time
		}
		v.last = a.Event.Time
		if err := v.event(a.Event); err != nil {
			return err
		}
		if v.seen++; v.seen == v.options.count {
			return errEnough
		}
	}
	return nil
}

// note tells something that is no operation.
func (v *traceView) note(text string) {
	_ = v.out.Flush() // an error comes again
	if !v.json {
		tell("trace: " + text)
	}
}

// mount says what will not be seen.
func (v *traceView) mount(d *holder.Description) {
	lines := blind(d)
	if !slices.Equal(lines, v.blind) { // another server of the mount says it again
		for _, line := range lines {
			v.note(line)
		}
	}
	v.blind = lines
}

// blind says what the kernel does on a mount without asking.
func blind(d *holder.Description) []string {
	if d.Complete {
		return []string{"this mount shows everything (trace=complete)"}
	}
	var out []string
	if d.Caching > 0 {
		out = append(out, "not seen: lookups, attributes and links that the kernel remembers, and opening of directories")
	}
	switch d.IO {
	case "passthrough":
		out = append(out, "not seen: reads and writes of files in the writable layer, and reads that the page cache answers (io=passthrough)")
	case "noopen":
		out = append(out, "not seen: opening and closing of files, and reads that the page cache answers (io=noopen)")
	default:
		out = append(out, "not seen: reads that the page cache answers")
	}
	return append(out, "mount with --trace, or -o trace=complete, to see everything")
}

func (v *traceView) event(e *trace.Event) error {
	if v.options.summary {
		v.sums.add(e)
		return nil
	}
	var err error
	if v.json {
		enc := json.NewEncoder(v.out)
		enc.SetEscapeHTML(false)
		err = enc.Encode(e)
	} else {
		_, err = fmt.Fprintln(v.out, traceLine(e))
	}
	if err == nil {
		err = v.out.Flush()
	}
	return err
}

// traceLine is an operation as people read it.
func traceLine(e *trace.Event) string {
	var b strings.Builder
	who := printable(e.Command)
	if who == "" {
		who = "-"
	}
	fmt.Fprintf(&b, "%s %7s %6d %-15s %-11s %s", e.Time.Local().Format("15:04:05.000000"), roundTime(e.Latency), e.Pid, who, e.Op, tracePath(e))
	if e.Detail != "" {
		b.WriteString(" " + printable(e.Detail))
	}
	switch {
	case e.Size > 0 && e.Op == "setattr":
	case e.Size > 0:
		fmt.Fprintf(&b, " %d@%d", e.Size, e.Offset)
	}
	if e.Error != "" {
		b.WriteString(" = " + e.Error)
	} else if e.Bytes > 0 {
		fmt.Fprintf(&b, " = %d", e.Bytes)
	}
	var marks []string
	switch {
	case e.Label != "":
		marks = append(marks, printable(e.Label))
	case e.Layer != "":
		marks = append(marks, e.Layer)
	}
	if e.CopiedUp {
		marks = append(marks, "copied up")
	}
	if e.Injected {
		marks = append(marks, "injected")
	}
	if len(marks) > 0 {
		b.WriteString(" [" + strings.Join(marks, ", ") + "]")
	}
	return b.String()
}

func tracePath(e *trace.Event) string {
	p := quoted(e.Path)
	if e.Path == "" {
		p = fmt.Sprintf("(without a name, node %d)", e.Node)
	}
	if e.To != "" {
		p += " -> " + quoted(e.To)
	}
	return p
}

// end prints what is left.
func (v *traceView) end() error {
	var err error
	if v.options.summary {
		took := time.Since(v.began)
		if v.shown {
			took = v.last.Sub(v.first)
		}
		err = v.sums.print(v.out, v.json, took)
	}
	if v.record != nil {
		if v.file != nil {
			err = errors.Join(err, v.file.Flush())
		}
		err = errors.Join(err, v.record.Close())
	}
	return errors.Join(err, v.out.Flush())
}

// traceSum is what a summary says of one operation, program or path.
type traceSum struct {
	Name    trace.Text    `json:"name"`
	Count   uint64        `json:"count"`
	Absent  uint64        `json:"absent"` // answers that something is not there, as in the counters
	Errors  uint64        `json:"errors"` // all other errors
	Time    time.Duration `json:"time"`
	Slowest time.Duration `json:"slowest"`
	Bytes   int64         `json:"bytes"`
	CopyUps uint64        `json:"copyUps"`
}

func (s *traceSum) add(e *trace.Event) {
	s.Count++
	switch e.Error {
	case "":
	case "ENOENT", "ENODATA", "ENOSYS": // see counters.Class.Ordinary
		s.Absent++
	default:
		s.Errors++
	}
	s.Time += e.Latency
	s.Slowest = max(s.Slowest, e.Latency)
	if e.Op == "read" || e.Op == "write" || e.Op == "copy_file_range" {
		s.Bytes += e.Bytes
	}
	if e.CopiedUp {
		s.CopyUps++
	}
}

// traceSums sums up by several keys.
type traceSums struct {
	by [len(traceKeys)]map[string]*traceSum
}

// traceKeys are what operations are summed up by. Only the most frequent paths are shown.
var traceKeys = [...]struct {
	title string
	most  int
	key   func(e *trace.Event) string
}{
	{"OPERATION", 0, func(e *trace.Event) string { return e.Op }},
	{"PROGRAM", 20, func(e *trace.Event) string { return e.Command }},
	{"PATH", 20, func(e *trace.Event) string { return e.Path }},
}

// maxSums bounds how many paths are told apart.
const maxSums = 1 << 20

func newTraceSums() (s traceSums) {
	for i := range s.by {
		s.by[i] = map[string]*traceSum{}
	}
	return s
}

func (s *traceSums) add(e *trace.Event) {
	for i, k := range traceKeys {
		name := k.key(e)
		sum := s.by[i][name]
		if sum == nil {
			if len(s.by[i]) >= maxSums {
				name = "(others)"
			}
			if sum = s.by[i][name]; sum == nil {
				sum = &traceSum{Name: trace.Text(name)}
				s.by[i][name] = sum
			}
		}
		sum.add(e)
	}
}

// sorted returns the sums of one kind, those with most time first.
func (s *traceSums) sorted(i int) []*traceSum {
	list := make([]*traceSum, 0, len(s.by[i]))
	for _, sum := range s.by[i] {
		list = append(list, sum)
	}
	slices.SortFunc(list, func(a, b *traceSum) int {
		return cmp.Or(cmp.Compare(b.Time, a.Time), cmp.Compare(a.Name, b.Name))
	})
	return list
}

func (s *traceSums) print(out io.Writer, asJSON bool, took time.Duration) error {
	if asJSON {
		return json.NewEncoder(out).Encode(map[string]any{
			"seconds": took.Seconds(), "operations": s.sorted(0), "programs": s.sorted(1), "paths": s.sorted(2),
		})
	}
	for i, k := range traceKeys {
		if i > 0 {
			fmt.Fprintln(out)
		}
		t := newTable(out, "COUNT", "ABSENT", "ERRORS", "TIME", "SLOWEST", "BYTES", "COPY-UPS", k.title)
		list := s.sorted(i)
		for n, sum := range list {
			if k.most > 0 && n == k.most {
				t.row("", "", "", "", "", "", "", fmt.Sprintf("(%d more)", len(list)-n))
				break
			}
			name := quoted(string(sum.Name))
			if sum.Name == "" {
				name = "-"
			}
			t.row(fmt.Sprint(sum.Count), fmt.Sprint(sum.Absent), fmt.Sprint(sum.Errors), roundTime(sum.Time), roundTime(sum.Slowest), size(sum.Bytes), fmt.Sprint(sum.CopyUps), name)
		}
		if err := t.flush(); err != nil {
			return err
		}
	}
	return nil
}
