package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/plyfs/plyfs/mountd"
)

func newTopCommand(a *app) *cobra.Command {
	var v topView
	cmd := &cobra.Command{
		Use:   "top [NAME|DIR]…",
		Short: "Watch all mounts: how much they do, how fast, and for whom",
		Long: `Show what mounts do at the moment, again and again: for each the operations per second, how
long half and 99 % of the answers take, what is read, written and copied up per second, the share of
opened files whose data the kernel moves by itself (PASSED) and of lookups for names that are not
there (ABSENT). The busiest come first. With names, only these mounts, and for each of them the
operations, programs and paths that take most time; these are traced meanwhile (see plyfs trace).

On a terminal the screen is drawn anew each time; Ctrl-C or q ends it. Otherwise one table after
the other is printed, -n of them, or with --json one document a line.`,
		Example: `  plyfs top
  plyfs top work
  plyfs top -n 3 --interval 5s > load.txt`,
		Args:              rangeArgs(0, -1, "names of containers or mount points, or none"),
		ValidArgsFunction: completeEach(a.mounted()),
		RunE: func(cmd *cobra.Command, args []string) error {
			if v.interval < 100*time.Millisecond || v.rounds < 0 {
				return usagef("--interval is at least 100ms, and -n not negative")
			}
			v.screen = !a.json && term.IsTerminal(int(os.Stdout.Fd()))
			if v.rounds == 0 && !v.screen && !cmd.Flags().Changed("rounds") {
				v.rounds = 1
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			for _, arg := range args {
				m, err := a.live(cmd, arg)
				if err != nil {
					return err
				}
				v.watch(ctx, m)
			}
			return a.with(cmd, func(_ context.Context, s mountd.Service) error {
				v.stats = statsView{a: a, s: s, args: args}
				return v.run(ctx)
			})
		},
	}
	f := cmd.Flags()
	f.DurationVar(&v.interval, "interval", 2*time.Second, "time between two pictures")
	f.IntVarP(&v.rounds, "rounds", "n", 0, "how many pictures; 0 is without end (default: 1 if not on a terminal)")
	return cmd
}

// topView draws one picture after the other.
type topView struct {
	stats    statsView
	interval time.Duration
	rounds   int
	screen   bool
	traces   []*topTrace // of the mounts that were named
}

// run draws until ctx ends or there were as many rounds as were asked for.
func (v *topView) run(ctx context.Context) error {
	var keys <-chan struct{}
	if v.screen {
		restore, pressed := quitKey()
		defer restore()
		keys = pressed
	}
	before, err := v.stats.collect(ctx)
	if err != nil && len(before) == 0 {
		return err
	}
	at := time.Now()
	tick := time.NewTicker(v.interval)
	defer tick.Stop()
	for i := 0; v.rounds == 0 || i < v.rounds; i++ {
		select {
		case <-ctx.Done():
			return nil
		case <-keys:
			return nil
		case <-tick.C:
		}
		now, err := v.stats.collect(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && len(now) == 0 {
			return err
		}
		p := v.picture(since(now, before), time.Since(at))
		before, at = now, time.Now()
		if err := v.draw(p, i); err != nil {
			return err
		}
	}
	return nil
}

// quitKey makes the terminal give each key at once, and tells of q and Ctrl-C.
func quitKey() (restore func(), pressed <-chan struct{}) {
	ch := make(chan struct{})
	fd := int(os.Stdin.Fd())
	if !term.IsTerminal(fd) {
		return func() {}, ch
	}
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return func() {}, ch
	}
	keys := *old
	keys.Lflag &^= unix.ICANON | unix.ECHO // signals stay
	if unix.IoctlSetTermios(fd, unix.TCSETS, &keys) != nil {
		return func() {}, ch
	}
	go func() { // ends with the process
		b := make([]byte, 1)
		for {
			if n, err := os.Stdin.Read(b); err != nil || n == 1 && (b[0] == 'q' || b[0] == 'Q') {
				close(ch)
				return
			}
		}
	}()
	return func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, old) }, ch // the shell would do it, too
}

// picture is what has come in one interval.
type picture struct {
	Time    time.Time  `json:"time"`
	Seconds float64    `json:"seconds"`
	Mounts  []topMount `json:"mounts"`
	Traced  []topSums  `json:"traced,omitempty"`
}

// topMount is one mount in a picture.
type topMount struct {
	Name     string  `json:"name"`
	Target   string  `json:"target"`
	PerSec   float64 `json:"operationsPerSecond"`
	Errors   float64 `json:"errorsPerSecond"`
	P50      float64 `json:"p50Seconds"`
	P99      float64 `json:"p99Seconds"`
	Read     float64 `json:"readPerSecond"`
	Written  float64 `json:"writtenPerSecond"`
	CopyUps  float64 `json:"copyUpsPerSecond"`
	Passed   string  `json:"passed"`
	Absent   string  `json:"absent"`
	Now      int64   `json:"answering"`
	Problem  string  `json:"problem,omitempty"`
	Restarts int     `json:"restarts,omitempty"`
}

// topSums is what a trace of a mount says.
type topSums struct {
	Target     string      `json:"target"`
	Operations []*traceSum `json:"operations"`
	Programs   []*traceSum `json:"programs"`
	Paths      []*traceSum `json:"paths"`
	Dropped    uint64      `json:"dropped,omitempty"`
}

func (v *topView) picture(all []mountd.MountStats, took time.Duration) picture {
	p := picture{Time: time.Now(), Seconds: took.Seconds(), Mounts: []topMount{}}
	for _, m := range all {
		t := topMount{Name: statsName(m), Target: string(m.Target), Problem: m.Problem, Restarts: m.Restarts, Passed: "-", Absent: "-"}
		if c := m.Counters; c != nil {
			sum := c.Total()
			t.PerSec, t.Errors = float64(sum.Count)/p.Seconds, float64(sum.Failed())/p.Seconds
			if sum.Count > 0 {
				t.P50, t.P99 = sum.Time.Quantile(0.5).Seconds(), sum.Time.Quantile(0.99).Seconds()
			}
			t.Read, t.Written = float64(c.BytesRead)/p.Seconds, float64(c.BytesWritten)/p.Seconds
			t.CopyUps, t.Passed, t.Now = float64(c.CopyUps.Count)/p.Seconds, passedShare(c.Opens), c.Answering
			lookups := c.Operation("lookup")
			t.Absent = percent(lookups.Absent(), lookups.Count)
		}
		p.Mounts = append(p.Mounts, t)
	}
	slices.SortStableFunc(p.Mounts, func(a, b topMount) int { return cmp.Compare(b.PerSec, a.PerSec) })
	for _, t := range v.traces {
		p.Traced = append(p.Traced, t.take())
	}
	return p
}

// draw prints a picture, on a terminal in the place of the one before.
func (v *topView) draw(p picture, round int) error {
	if v.stats.a.json {
		return printJSONLine(p)
	}
	var b bytes.Buffer
	if err := v.print(&b, p); err != nil {
		return err
	}
	out := b.String()
	if v.screen {
		out = fit(out)
	} else if round > 0 {
		out = "\n" + out
	}
	_, err := os.Stdout.WriteString(out)
	return err
}

// fit cuts a picture to the size of the terminal, and draws over the one before.
func fit(text string) string {
	width, height, err := term.GetSize(int(os.Stdout.Fd()))
	if err != nil || width < 10 || height < 3 {
		width, height = 80, 24
	}
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if len(lines) > height-1 {
		lines = append(lines[:height-2], "…")
	}
	for i, l := range lines {
		if r := []rune(l); len(r) > width {
			lines[i] = string(r[:width-1]) + "…"
		}
	}
	const home, clearLine, clearRest = "\x1b[H", "\x1b[K", "\x1b[J"
	return home + strings.Join(lines, clearLine+"\n") + clearLine + "\n" + clearRest
}

func (v *topView) print(b *bytes.Buffer, p picture) error {
	busy, rate := 0, 0.0
	for _, m := range p.Mounts {
		rate += m.PerSec
		if m.PerSec > 0 {
			busy++
		}
	}
	fmt.Fprintf(b, "plyfs top  %s  %s, %d busy, %.0f operations/s\n\n", p.Time.Format("15:04:05"), plural(len(p.Mounts), "mount", "mounts"), busy, rate)
	t := newTable(b, "NAME", "OPS/S", "ERR/S", "P50", "P99", "READ/S", "WRITTEN/S", "COPY-UPS/S", "PASSED", "ABSENT", "NOW", "MOUNTED ON")
	for _, m := range p.Mounts {
		where := quoted(m.Target)
		if m.Problem != "" {
			where += "  (" + printable(m.Problem) + ")"
		}
		t.row(printable(m.Name), fmt.Sprintf("%.0f", m.PerSec), fmt.Sprintf("%.0f", m.Errors), seconds(m.P50), seconds(m.P99),
			size(int64(m.Read)), size(int64(m.Written)), fmt.Sprintf("%.1f", m.CopyUps), m.Passed, m.Absent, fmt.Sprint(m.Now), where)
	}
	if err := t.flush(); err != nil {
		return err
	}
	for _, s := range p.Traced {
		if err := s.print(b); err != nil {
			return err
		}
	}
	return nil
}

func seconds(s float64) string {
	if s == 0 {
		return "-"
	}
	return roundTime(time.Duration(s * float64(time.Second)))
}

// print prints what takes most time, side by side.
func (s *topSums) print(b *bytes.Buffer) error {
	fmt.Fprintf(b, "\n%s", quoted(s.Target))
	if s.Dropped > 0 {
		fmt.Fprintf(b, " (%d operations came too fast to be told apart)", s.Dropped)
	}
	fmt.Fprintln(b)
	if len(s.Operations) == 0 {
		fmt.Fprintln(b, "no operations")
		return nil
	}
	for _, k := range []struct {
		title string
		sums  []*traceSum
	}{{"OPERATION", s.Operations}, {"PROGRAM", s.Programs}, {"PATH", s.Paths}} {
		t := newTable(b, "COUNT", "TIME", "SLOWEST", "BYTES", k.title)
		for _, sum := range k.sums {
			name := quoted(string(sum.Name))
			if sum.Name == "" {
				name = "-"
			}
			t.row(fmt.Sprint(sum.Count), roundTime(sum.Time), roundTime(sum.Slowest), size(sum.Bytes), name)
		}
		if err := t.flush(); err != nil {
			return err
		}
	}
	return nil
}
