package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
	"github.com/plyfs/plyfs/unionfs/counters"
)

func newStatsCommand(a *app) *cobra.Command {
	var interval time.Duration
	var rounds int
	cmd := &cobra.Command{
		Use:   "stats [NAME|DIR]…",
		Short: "Show what mounts are asked for, and how long the answers take",
		Long: `Show what the servers of mounts have counted. Without arguments it is a line for each
mount; with names of containers or mount points a table for each:

  COUNT    requests of the kernel; what it has cached it does not ask for
  ABSENT   answers that a name or an attribute is not there, which is ordinary
  ERRORS   all other errors
  P50…     time in which half, 90 and 99 % of the answers were made
  TIME     share of this operation in the time of all

Counters begin at zero when a mount is made, and when another server has taken over from
one that had died. With --interval, the differences are printed again and again.`,
		Example: `  plyfs stats
  plyfs stats work
  plyfs stats --interval 1s -n 10 /mnt`,
		Args:              rangeArgs(0, -1, "names of containers or mount points, or none"),
		ValidArgsFunction: completeEach(a.mounted()),
		RunE: func(cmd *cobra.Command, args []string) error {
			if interval < 0 || rounds < 0 {
				return usagef("--interval and -n cannot be negative")
			}
			if rounds > 0 && interval == 0 {
				interval = time.Second
			}
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				v := statsView{a: a, s: s, args: args}
				if interval == 0 {
					all, err := v.collect(ctx)
					if perr := v.print(all); perr != nil {
						return perr
					}
					return err
				}
				return v.watch(ctx, interval, rounds)
			})
		},
	}
	f := cmd.Flags()
	f.DurationVar(&interval, "interval", 0, "print what has come since the last time, again and again, so often (for example 1s)")
	f.IntVarP(&rounds, "rounds", "n", 0, "with --interval (default 1s): how many times; 0 is without end")
	return cmd
}

// statsView shows counters of the mounts that arguments name.
type statsView struct {
	a    *app
	s    mountd.Service
	args []string
}

// collect asks for all of them. With an error it returns those that it has got.
func (v *statsView) collect(ctx context.Context) ([]mountd.MountStats, error) {
	if len(v.args) == 0 {
		all, err := v.s.Stats(ctx, mountd.StatsRequest{})
		return append(all, mountd.RawStats(ctx)...), err
	}
	var all []mountd.MountStats
	err := eachArg(v.args, func(name string) error {
		target, err := filepath.Abs(name)
		if err != nil {
			return err
		}
		one, err := v.s.Stats(ctx, mountd.StatsRequest{Name: mountd.Path(name), Target: mountd.Path(target)})
		if errors.Is(err, layers.ErrUnsupported) || errors.Is(err, layers.ErrNotFound) { // a mount of no store, perhaps
			if raw, rerr := mountd.RawStatsOf(ctx, target); rerr == nil {
				one, err = []mountd.MountStats{raw}, nil
			}
		}
		all = append(all, one...)
		return err
	})
	return all, err
}

// watch prints differences. Ctrl-C ends it, without an error: that is how it is meant.
func (v *statsView) watch(ctx context.Context, interval time.Duration, rounds int) error {
	before, err := v.collect(ctx)
	if err != nil {
		return err
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for i := 0; rounds == 0 || i < rounds; i++ {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now, err := v.collect(ctx)
		if errors.Is(err, context.Canceled) {
			return nil
		}
		if err != nil {
			return err
		}
		if i > 0 && !v.a.json {
			fmt.Println()
		}
		if err := v.print(since(now, before)); err != nil {
			return err
		}
		before = now
	}
	return nil
}

// since returns what has come after earlier counters. A server that is another one has
// counted from zero.
func since(now, before []mountd.MountStats) []mountd.MountStats {
	was := map[string]mountd.MountStats{}
	for _, m := range before {
		was[m.ID] = m
	}
	diff := make([]mountd.MountStats, len(now))
	for i, m := range now {
		if b, ok := was[m.ID]; ok && m.Counters != nil && b.Counters != nil && m.Since.Equal(b.Since) {
			d := m.Counters.Sub(*b.Counters)
			m.Counters = &d
		}
		diff[i] = m
	}
	return diff
}

func (v *statsView) print(all []mountd.MountStats) error {
	if v.a.json {
		return printJSON(list(all))
	}
	if len(v.args) == 0 {
		return printStatsLines(all)
	}
	for i, m := range all {
		if i > 0 {
			fmt.Println()
		}
		if err := printStats(m); err != nil {
			return err
		}
	}
	return nil
}

// printStatsLines prints a line for each mount.
func printStatsLines(all []mountd.MountStats) error {
	t := newTable(os.Stdout, "NAME", "MOUNTED ON", "REQUESTS", "ERRORS", "P50", "P99", "READ", "WRITTEN", "COPY-UPS", "PASSED")
	for _, m := range all {
		if m.Counters == nil {
			t.row(statsName(m), quoted(string(m.Target)), "-", "-", "-", "-", "-", "-", "-", m.Problem)
			continue
		}
		c := m.Counters
		sum := c.Total()
		t.row(statsName(m), quoted(string(m.Target)), fmt.Sprint(sum.Count), fmt.Sprint(sum.Failed()), quantile(sum, 0.5), quantile(sum, 0.99),
			size(int64(c.BytesRead)), size(int64(c.BytesWritten)), fmt.Sprint(c.CopyUps.Count), passedShare(c.Opens))
	}
	return t.flush()
}

// printStats prints the table of one mount.
func printStats(m mountd.MountStats) error {
	fmt.Printf("%s on %s", printable(statsName(m)), quoted(string(m.Target)))
	if !m.Mounted.IsZero() {
		fmt.Printf(", mounted %s", ago(m.Mounted))
	}
	if m.Restarts > 0 {
		fmt.Printf(", server restarted %s, the last time %s", times(uint64(m.Restarts)), ago(m.Since))
	}
	fmt.Println()
	if m.Counters == nil {
		fmt.Println("no counters: " + printable(m.Problem))
		return nil
	}
	c, sum := m.Counters, m.Counters.Total()
	t := newTable(os.Stdout, "OPERATION", "COUNT", "ABSENT", "ERRORS", "P50", "P90", "P99", "TIME")
	for _, o := range append(c.ByTime(), sum) {
		t.row(o.Name, fmt.Sprint(o.Count), fmt.Sprint(o.Absent()), fmt.Sprint(o.Failed()),
			quantile(o, 0.5), quantile(o, 0.9), quantile(o, 0.99), percent(o.Time.Nanoseconds, sum.Time.Nanoseconds))
	}
	if err := t.flush(); err != nil {
		return err
	}
	u := c.CopyUps
	fmt.Printf("data:      %s read, %s written\n", size(int64(c.BytesRead)), size(int64(c.BytesWritten)))
	fmt.Printf("copy-ups:  %d with %s, of them %d without data, %d of which got it later\n", u.Count, size(int64(u.Bytes)), u.Metadata, u.Completed)
	fmt.Printf("opened:    %s, passed through %s (io=%s)\n", times(c.Opens.Passed+c.Opens.Cached), passedShare(c.Opens), printable(m.IO))
	fmt.Printf("requests:  %d being answered, %d at most; kernel told %s to forget, given files unasked %s\n",
		c.Answering, c.AnsweringMost, times(c.Invalidations), times(c.Stored))
	return nil
}

// statsName is how people call a mount: by its container, else by its image.
func statsName(m mountd.MountStats) string {
	if m.Container != "" {
		return m.Container
	}
	if m.ImageID == "" {
		return "(no store)"
	}
	return shortID(m.ImageID.String())
}

func quantile(o counters.Operation, q float64) string {
	if o.Count == 0 {
		return "-"
	}
	return roundTime(o.Time.Quantile(q))
}

// roundTime prints a duration with three digits, which is more than is known.
func roundTime(d time.Duration) string {
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{time.Second, "s"}, {time.Millisecond, "ms"}, {time.Microsecond, "µs"}} {
		if d >= u.unit {
			return fmt.Sprintf("%.3g%s", float64(d)/float64(u.unit), u.name)
		}
	}
	return fmt.Sprintf("%dns", d)
}

func percent(part, whole uint64) string {
	if whole == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f%%", 100*float64(part)/float64(whole))
}

func passedShare(o counters.Opens) string { return percent(o.Passed, o.Passed+o.Cached) }

func times(n uint64) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}
