package mountd

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"reflect"
	"time"

	"github.com/plyfs/plyfs/mountd/events"
)

// stoppingKey has the context that ends when the daemon begins to stop.
type stoppingKey struct{}

// follow registers the call whose answer goes on: a JSON object a line, until the client
// goes or the daemon stops.
func follow[Req, Item any](a *api, is route, f func(ctx context.Context, r *Req, started func(), item func(Item) error) error) {
	is.lines, is.request, is.answer = true, reflect.TypeFor[Req](), reflect.TypeFor[Item]()
	a.add(is, func(w http.ResponseWriter, hr *http.Request) {
		var r Req
		if text := hr.URL.Query().Get("r"); text != "" {
			if err := json.Unmarshal([]byte(text), &r); err != nil {
				writeError(w, markedf(ErrUsage, "request %q: %w", is.name, err))
				return
			}
		}
		ctx, cancel := context.WithCancel(hr.Context())
		defer cancel()
		if stopping, ok := ctx.Value(stoppingKey{}).(context.Context); ok {
			defer context.AfterFunc(stopping, cancel)()
		}
		rc, begun := http.NewResponseController(w), false
		started := func() {
			begun = true
			w.Header().Set("Content-Type", "application/jsonl")
			w.WriteHeader(http.StatusOK)
			_ = rc.Flush() // a client that is gone shows at the next line
		}
		enc := json.NewEncoder(w)
		err := f(ctx, &r, started, func(v Item) error {
			if err := enc.Encode(v); err != nil {
				return err
			}
			return rc.Flush()
		})
		logCall(a.log, is.name, err)
		if err != nil && !begun {
			writeError(w, err)
		}
	})
}

// Events implements Service.
func (c *Client) Events(ctx context.Context, r EventsRequest, f func(events.Event) error) error {
	body, err := json.Marshal(r)
	if err != nil {
		return err
	}
	resp, err := c.send(ctx, http.MethodGet, "/events?r="+url.QueryEscape(string(body)), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if r.Started != nil {
		r.Started()
	}
	for dec := json.NewDecoder(resp.Body); ; {
		var e events.Event
		switch err := dec.Decode(&e); {
		case err == nil:
			if err := f(e); err != nil {
				return err
			}
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, io.EOF) && !r.Until.IsZero() && !time.Now().Before(r.Until):
			return nil
		default:
			return markedf(ErrUnavailable, "the daemon on %q went away: %w", c.socket, err)
		}
	}
}
