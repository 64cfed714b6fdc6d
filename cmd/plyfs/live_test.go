package main

import (
	"testing"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
)

func TestMountOf(t *testing.T) {
	mount := func(id, name, state, target string) mountd.Status {
		return mountd.Status{Container: &layers.Container{ID: id, Name: name}, State: state, Target: mountd.Path(target)}
	}
	all := []mountd.Status{
		{State: mountd.StateMounted, Target: "/image"}, // of no container
		mount("abc1", "web", mountd.StateMounted, "/web"),
		mount("abc2", "abc1", mountd.StateMounted, "/confusing"),
		mount("d1", "idle", mountd.StateCreated, ""),
		mount("e1", "twice", mountd.StateDetached, "/old"),
		mount("e1", "twice", mountd.StateMounted, "/new"),
	}
	for name, want := range map[string]string{
		"web": "/web", "abc1": "/confusing", "abc2": "/confusing", "abc": "", "idle": "", "d": "", "twice": "/new", "e": "/new", "nobody": "", "": "",
	} {
		st, err := mountOf(all, name)
		if string(st.Target) != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v; expected %q", name, st.Target, err, want)
		}
	}
}
