package mountd

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/moby/sys/mountinfo"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/holder"
)

func TestVerdict(t *testing.T) {
	for _, c := range []struct {
		name string
		f    facts
		want string
	}{
		{"another boot", facts{holderAlive: true, inTable: true}, stateElsewhere},
		{"all is well", facts{thisBoot: true, holderAlive: true, serverAlive: true, wasLive: true, inTable: true}, StateMounted},
		{"holder killed, server goes on", facts{thisBoot: true, serverAlive: true, wasLive: true, inTable: true}, StateMounted},
		{"not live yet", facts{thisBoot: true, holderAlive: true}, StateStarting},
		{"mounted, INIT not answered", facts{thisBoot: true, holderAlive: true, inTable: true}, StateMounted},
		{"lazily unmounted", facts{thisBoot: true, holderAlive: true, serverAlive: true, wasLive: true}, StateDetached},
		{"all killed", facts{thisBoot: true, wasLive: true, inTable: true}, StateDead},
		{"unmounted by somebody", facts{thisBoot: true, wasLive: true}, stateGone},
		{"given up before the mount", facts{thisBoot: true}, stateGone},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := verdict(c.f); got != c.want {
				t.Errorf("%+v: %s, want %s", c.f, got, c.want)
			}
		})
	}
}

func TestAssess(t *testing.T) {
	self := holder.Self()
	table := []*mountinfo.Info{
		{ID: 1, Mountpoint: "/mnt", FSType: "fuse.plyfs", Major: 0, Minor: 77},
		{ID: 2, Mountpoint: "/other", FSType: "ext4", Major: 8, Minor: 1},
	}
	runDir := func(st holder.State) string {
		dir := t.TempDir()
		b, err := json.Marshal(st)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "state.json"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	row := func(target string, p holder.Process, dir string) layers.Live {
		return layers.Live{Target: target, Pid: p.Pid, StartTime: p.StartTime, BootID: holder.BootID(), RunDir: dir}
	}
	reused := holder.Process{Pid: self.Pid, StartTime: self.StartTime + 1}
	for _, c := range []struct {
		name string
		row  layers.Live
		want string
	}{
		{"mounted", row("/mnt", self, runDir(holder.State{Holder: self, Minor: 77})), StateMounted},
		{"pid used again by another process", row("/mnt", reused, runDir(holder.State{Holder: reused, Minor: 77})), StateDead},
		{"directory above was renamed", row("/before", self, runDir(holder.State{Holder: self, Minor: 77})), StateMounted},
		{"somebody else mounted there", row("/mnt", reused, runDir(holder.State{Holder: reused, Minor: 78})), stateGone},
		{"another type of file system there", row("/other", reused, t.TempDir()), stateGone},
		{"server alive without holder", row("/mnt", reused, runDir(holder.State{Holder: reused, Server: self, Minor: 77})), StateMounted},
		{"starting", row("/new", self, t.TempDir()), StateStarting},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := assess(c.row, table).state; got != c.want {
				t.Errorf("state %s, want %s", got, c.want)
			}
		})
	}
	old := row("/mnt", self, "")
	old.BootID = "another"
	if got := assess(old, table).state; got != stateElsewhere {
		t.Errorf("row of another boot: %s", got)
	}
}
