package mountd

import (
	"encoding/json"
	"errors"
	"fmt"
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
			if got := assess(c.row, table, nil).state; got != c.want {
				t.Errorf("state %s, want %s", got, c.want)
			}
		})
	}
	old := row("/mnt", self, "")
	old.BootID = "another"
	if got := assess(old, table, nil).state; got != stateElsewhere {
		t.Errorf("row of another boot: %s", got)
	}
}

// TestAnotherMountWithOurNumberStays: device numbers are used again. The record
// of a mount that has ended leads to whoever got its number.
func TestAnotherMountWithOurNumberStays(t *testing.T) {
	f := newFixture(t)
	st := f.mount("c")
	other := f.container("other")
	self := holder.Self()
	ended := layers.Live{
		Target: f.mnt + "-ended", ContainerID: other, BootID: holder.BootID(),
		Pid: self.Pid, StartTime: self.StartTime + 1, RunDir: f.runDir + "/mounts/ended",
	}
	for _, c := range []struct {
		name string
		do   func() error
	}{
		{"reconcile", func() error { return f.reconcile(t.Context()) }},
		{"umount by name", func() error {
			_, err := f.Unmount(t.Context(), UnmountRequest{Name: "other", Target: Path(f.mnt + "/none/other")})
			if errors.Is(err, layers.ErrNotFound) {
				return nil
			}
			return fmt.Errorf("expected that it is not mounted, got %w", err)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.MkdirAll(ended.RunDir, 0o700); err != nil {
				t.Fatal(err)
			}
			dead := holder.State{Target: ended.Target, Holder: holder.Process{Pid: ended.Pid, StartTime: ended.StartTime}, Major: st.Major, Minor: st.Minor}
			b, err := json.Marshal(dead)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(ended.RunDir, "state.json"), b, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := f.store.AddLive(t.Context(), ended); err != nil {
				t.Fatal(err)
			}
			if err := c.do(); err != nil {
				t.Error(err)
			}
			f.wantState(StateMounted) // of the living one
			if _, err := os.Stat(f.mnt + "/file"); err != nil {
				t.Errorf("the other mount: %v", err)
			}
			rows, err := f.store.LiveMounts(t.Context())
			if err != nil || len(rows) != 1 || rows[0].Target != f.mnt {
				t.Errorf("rows that remain: %+v, %v", rows, err)
			}
		})
	}
	if _, err := f.unmount(false); err != nil {
		t.Error(err)
	}
}

// container makes another container of the image and returns its ID.
func (f *fixture) container(name string) string {
	f.t.Helper()
	if _, err := f.Create(f.t.Context(), CreateRequest{Image: "localhost/img:1", Name: name}); err != nil {
		f.t.Fatal(err)
	}
	c, err := f.store.Container(f.t.Context(), name)
	if err != nil {
		f.t.Fatal(err)
	}
	return c.ID
}
