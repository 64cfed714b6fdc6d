package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/mountd"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs/counters"
	"github.com/plyfs/plyfs/unionfs/trace"
)

// traceOptions are those of trace and of trace show.
type traceOptions struct {
	filter  trace.Filter
	pids    []uint
	summary bool
	count   uint64
}

func (o *traceOptions) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringSliceVar(&o.filter.Ops, "op", nil, "only these operations, or groups: name, attr, data, dir, sync, change")
	f.StringVar(&o.filter.Path, "path", "", "only paths that match: /etc/*, /var/lib/**, or a name as *.conf")
	f.UintSliceVar(&o.pids, "pid", nil, "only these processes or threads")
	f.StringSliceVar(&o.filter.Commands, "command", nil, "only programs of these names")
	f.StringSliceVar(&o.filter.Errors, "error", nil, "only these results, as ENOENT; any: each error; none: no error")
	f.DurationVar(&o.filter.Slower, "slower", 0, "only what has taken at least so long (for example 1ms)")
	f.StringSliceVar(&o.filter.Layers, "layer", nil, "only objects of these layers: upper, lower, lower:1 (the topmost), 'layer 2 of 3'…")
	f.BoolVar(&o.filter.CopyUps, "copy-ups", false, "only what has copied something to the writable layer")
	f.BoolVar(&o.summary, "summary", false, "print no operations, but at the end what there were, by operation, program and path")
	f.Uint64VarP(&o.count, "count", "n", 0, "end after so many operations")
}

func (o *traceOptions) complete() error {
	for _, p := range o.pids {
		o.filter.Pids = append(o.filter.Pids, uint32(p))
	}
	if err := o.filter.Validate(counters.OpNames()); err != nil {
		return usagef("%v", err)
	}
	return nil
}

func newTraceCommand(a *app) *cobra.Command {
	var o traceOptions
	var record string
	var duration time.Duration
	cmd := &cobra.Command{
		Use:   "trace DIR|NAME",
		Short: "Show what programs do with the files of a mount, while they do it",
		Long: `Print each operation that the kernel asks the server of a mount for: when, which program,
what, on which path, what came of it, how long the answer took, from which layer the object
came, and whether it was copied to the writable layer. It ends with Ctrl-C, or with
the mount. DIR is any path in the mount.

What the kernel answers from its caches, and the data of files that it reads and writes by
itself, is not seen; the first lines say what that is on this mount. A mount that was made with
plyfs mount --trace, or plyfs overlay -o trace=complete, has no caches, and shows everything.

With --record the operations are also written to a file, which plyfs trace show prints.`,
		Example: `  plyfs trace /mnt
  plyfs trace work --op write --path '/etc/**'
  plyfs trace /mnt --error any --slower 1ms
  plyfs trace /mnt --summary --for 10s
  plyfs trace /mnt --record boot.trace
  plyfs trace show boot.trace --copy-ups`,
		Args:              exactArgs(1, "DIR or NAME"),
		ValidArgsFunction: completeEach(a.mounted()),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.complete(); err != nil {
				return err
			}
			if cmd.Flags().Changed("for") && duration <= 0 {
				return usagef("--for: expected more than 0")
			}
			m, err := a.live(cmd, args[0])
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			if duration > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, duration)
				defer cancel()
			}
			v := newTraceView(a.json, o, os.Stdout)
			v.record, err = createRecord(record)
			if err != nil {
				return err
			}
			err = follow(ctx, m, o.filter, v)
			return errors.Join(err, v.end())
		},
	}
	o.add(cmd)
	cmd.Flags().StringVar(&record, "record", "", "also write the operations to this new file")
	cmd.Flags().DurationVar(&duration, "for", 0, "end after this time (for example 30s)")
	cmd.AddCommand(newTraceShowCommand(a))
	return cmd
}

// follow shows the events of a mount until ctx ends, also when another server has taken over.
func follow(ctx context.Context, m mountd.LiveServer, f trace.Filter, v *traceView) error {
	for first := true; ; first = false {
		ask := ctx
		if !first { // another server comes soon, or none
			for until := time.Now().Add(askTimeout); ; {
				_, err := holder.AskControl(ask, m.RunDir, holder.Control{Describe: true})
				if err == nil {
					break
				}
				st, serr := holder.ReadState(m.RunDir)
				if ctx.Err() != nil || serr != nil || st.Ended || time.Now().After(until) || !st.Holder.Alive() && !st.Server.Alive() {
					if ctx.Err() == nil {
						v.note("the mount has ended")
					}
					return nil
				}
				<-time.After(20 * time.Millisecond)
			}
			v.note("another server has taken over: operations may be missing here")
		}
		err := holder.Trace(ctx, m.RunDir, f, v.answer)
		switch {
		case errors.Is(err, errEnough):
			return nil
		case errors.Is(err, io.ErrUnexpectedEOF), !first && errors.Is(err, unix.ECONNRESET):
			continue
		default:
			return controlError(m, err)
		}
	}
}

// createRecord makes the file of --record: for nobody else, and never in the place of another.
func createRecord(path string) (*os.File, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("file for the trace: %w", err)
	}
	return f, nil
}

// maxRecordLine bounds a line of a recording.
const maxRecordLine = 1 << 20

func newTraceShowCommand(a *app) *cobra.Command {
	var o traceOptions
	cmd := &cobra.Command{
		Use:   "show FILE",
		Short: "Show what plyfs trace --record has written",
		Example: `  plyfs trace show boot.trace
  plyfs trace show boot.trace --summary --path '/usr/**'`,
		Args:              exactArgs(1, "FILE"),
		ValidArgsFunction: completeArgs(completeFiles),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := o.complete(); err != nil {
				return err
			}
			f, err := os.Open(args[0])
			if err != nil {
				return fmt.Errorf("recording: %w", err)
			}
			defer f.Close()
			v := newTraceView(a.json, o, os.Stdout)
			v.shown = true
			lines := bufio.NewScanner(f)
			lines.Buffer(make([]byte, 64<<10), maxRecordLine)
			for n := 1; lines.Scan(); n++ {
				var got holder.Answer
				err := json.Unmarshal(lines.Bytes(), &got)
				var cut *json.SyntaxError
				switch {
				case n > 1 && errors.As(err, &cut) && cut.Offset >= int64(len(lines.Bytes())):
					v.note("the recording ends in the middle of an operation")
					return v.end()
				case err == nil && got.Mount == nil && got.Event == nil && got.Dropped == 0:
					err = errors.New("it says nothing")
				}
				if err != nil {
					return errors.Join(fmt.Errorf("%q is no recording of plyfs trace (line %d): %w", args[0], n, err), v.end())
				}
				if got.Event != nil && !o.filter.Match(got.Event) {
					continue
				}
				if err := v.answer(got); errors.Is(err, errEnough) {
					break
				} else if err != nil {
					return err
				}
			}
			if err := lines.Err(); err != nil {
				return errors.Join(fmt.Errorf("recording %q: %w", args[0], err), v.end())
			}
			return v.end()
		},
	}
	o.add(cmd)
	return cmd
}
