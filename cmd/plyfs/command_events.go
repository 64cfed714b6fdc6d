package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/mountd"
	"github.com/plyfs/plyfs/mountd/events"
)

func newEventsCommand(a *app) *cobra.Command {
	var since, until string
	var filters []string
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Follow what happens to images, containers, mounts and the store",
		Long: `Print what happens to the store, by whichever command or daemon, one line each, until
Ctrl-C. With --since it begins with what is in the log of the store, some thousand
events; with --until it ends at that time. A time is a date (2006-01-02T15:04:05Z), seconds since
1970, or how long ago (10m).

  image       load, pull, push, import, commit, adopt, save, tag, untag, delete
  container   create, remove
  mount       mount, unmount, end (unexpectedly), restart (of its server), refuse (a request)
  store       gc, prune, check, repair, rebuild, compact
  log         lost: events that are missing here, since too much happened at once`,
		Example: `  plyfs events
  plyfs events --since 1h --until 0s --json
  plyfs events --filter type=mount --filter event=end`,
		Args: exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := eventsRequest(since, until, filters, time.Now())
			if err != nil {
				return err
			}
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				enc := json.NewEncoder(os.Stdout)
				enc.SetEscapeHTML(false)
				err := s.Events(ctx, r, func(e events.Event) error {
					if a.json {
						return enc.Encode(e)
					}
					_, err := fmt.Println(printable(eventLine(e)))
					return err
				})
				if errors.Is(err, context.Canceled) && ctx.Err() != nil { // Ctrl-C is how it ends
					return nil
				}
				return err
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&since, "since", "", "begin with events since this time")
	f.StringVar(&until, "until", "", "end with this time")
	f.StringArrayVarP(&filters, "filter", "f", nil, "only these: type=TYPE, event=ACTION; may be repeated")
	return cmd
}

// eventsRequest understands the options.
func eventsRequest(since, until string, filters []string, now time.Time) (r mountd.EventsRequest, err error) {
	if r.Since, err = parseTime("--since", since, now); err != nil {
		return r, err
	}
	if r.Until, err = parseTime("--until", until, now); err != nil {
		return r, err
	}
	for _, f := range filters {
		key, value, ok := strings.Cut(f, "=")
		switch {
		case ok && value != "" && key == "type":
			r.Types = append(r.Types, value)
		case ok && value != "" && key == "event":
			r.Actions = append(r.Actions, value)
		default:
			return r, usagef("--filter %q: expected type=TYPE or event=ACTION", f)
		}
	}
	return r, nil
}

// parseTime reads a time as docker does.
func parseTime(option, text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(text); err == nil {
		return now.Add(-d), nil
	}
	if sec, err := strconv.ParseFloat(text, 64); err == nil && sec > -1e11 && sec < 1e11 {
		return time.UnixMicro(int64(sec * 1e6)), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, usagef("%s %q: expected a date (2006-01-02T15:04:05), seconds since 1970, or a duration (10m)", option, text)
}

// eventLine is an event in the form of docker events.
func eventLine(e events.Event) string {
	what, facts := "", []string{}
	fact := func(key, value string) {
		if value != "" && value != "0" {
			facts = append(facts, key+"="+quoted(value))
		}
	}
	switch {
	case e.Image != nil:
		what = e.Image.ID
		fact("name", e.Image.Name)
	case e.Container != nil:
		what = e.Container.ID
		fact("name", e.Container.Name)
		fact("image", e.Container.ImageName)
	case e.Mount != nil:
		m := e.Mount
		what = m.Target
		if len(m.TargetB64) > 0 {
			what = string(m.TargetB64)
		}
		what = quoted(what)
		fact("container", m.Container)
		fact("image", m.ImageID)
		if m.ReadOnly {
			fact("readOnly", "true")
		}
		fact("pid", strconv.Itoa(m.Pid))
		fact("restarts", strconv.Itoa(m.Restarts))
		fact("refused", strconv.Itoa(m.Refused))
		fact("error", m.Error)
	case e.Store != nil:
		s := e.Store
		fact("images", strconv.Itoa(s.Images))
		fact("layers", strconv.Itoa(s.Layers))
		fact("reclaimed", strconv.FormatInt(s.Reclaimed, 10))
		fact("problems", strconv.Itoa(s.Problems))
		fact("fixed", strconv.Itoa(s.Fixed))
	case e.Missed != nil:
		fact("events", strconv.FormatUint(e.Missed.Events, 10))
	}
	line := e.Time.Local().Format("2006-01-02T15:04:05.000000Z07:00") + " " + e.Type + " " + e.Action
	if what != "" {
		line += " " + what
	}
	if len(facts) > 0 {
		line += " (" + strings.Join(facts, ", ") + ")"
	}
	return line
}
