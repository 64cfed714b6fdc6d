package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/plyfs/plyfs/mountd"
	"github.com/plyfs/plyfs/mountd/events"
)

func TestParseTime(t *testing.T) {
	now := time.Unix(1_700_000_000, 0).UTC()
	for _, c := range []struct {
		text string
		want time.Time // zero: a usage error
	}{
		{"10m", now.Add(-10 * time.Minute)},
		{"0s", now},
		{"1699999999", now.Add(-time.Second)},
		{"1699999999.5", now.Add(-time.Second / 2)},
		{"2023-11-14T22:13:20Z", now},
		{"2023-11-14T23:13:20+01:00", now},
		{"2023-11-14T22:13:20.25Z", now.Add(time.Second / 4)},
		{"yesterday", time.Time{}},
		{"1e99", time.Time{}},
		{"NaN", time.Time{}},
		{" ", time.Time{}},
	} {
		got, err := parseTime("--since", c.text, now)
		if !got.Equal(c.want) || (err != nil) != c.want.IsZero() || err != nil && !errors.Is(err, mountd.ErrUsage) {
			t.Errorf("parseTime(%q) = %v, %v; expected %v", c.text, got, err, c.want)
		}
	}
}

func TestEventLine(t *testing.T) {
	for _, c := range []struct {
		e    events.Event
		want string
	}{
		{events.Event{Type: "image", Action: "tag", Image: &events.ImageEvent{ID: "sha256:1", Name: "a:1"}}, "image tag sha256:1 (name=a:1)"},
		{events.Event{Type: "mount", Action: "end", Mount: &events.MountEvent{Target: "/a b", Error: "x\x1b[31m"}}, `mount end /a b (error="x\x1b[31m")`},
		{events.Event{Type: "mount", Action: "mount", Mount: &events.MountEvent{Target: "/?", TargetB64: []byte("/\xff"), ReadOnly: true}}, `mount mount "/\xff" (readOnly=true)`},
		{events.Event{Type: "store", Action: "gc", Store: &events.StoreEvent{Layers: 2, Reclaimed: 10}}, "store gc (layers=2, reclaimed=10)"},
		{events.Event{Type: "log", Action: "lost", Missed: &events.Missed{Events: 3}}, "log lost (events=3)"},
		{events.Event{Type: "new\nline", Action: "\x1b"}, `new\nline \x1b`},
	} {
		_, got, _ := strings.Cut(printable(eventLine(c.e)), " ")
		if got != c.want {
			t.Errorf("%+v: %q, expected %q", c.e, got, c.want)
		}
	}
}
