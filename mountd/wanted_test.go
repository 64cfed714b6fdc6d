package mountd

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/events"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs/transport"
)

// mountWanted mounts on a directory, to be mounted again.
func (f *fixture) mountWanted(r MountRequest, target string) MountResult {
	f.t.Helper()
	r.Target, r.Restart = Path(target), true
	res, err := f.Mount(f.t.Context(), r)
	if err != nil {
		f.t.Fatal(err)
	}
	return res
}

// dir makes one more mount point.
func (f *fixture) dir() string {
	d := mkdirs(f.t, "m") + "/m"
	f.t.Cleanup(func() { _ = unix.Unmount(d, unix.MNT_DETACH) }) // usually gone already
	return d
}

// kill ends both processes of the mount on target, so that neither replaces the other.
func (f *fixture) kill(target string) {
	f.t.Helper()
	rows, err := f.store.LiveMounts(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	for _, r := range rows {
		if r.Target != target {
			continue
		}
		st, err := holder.ReadState(r.RunDir)
		if err != nil {
			f.t.Fatal(err)
		}
		for _, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} {
			for _, p := range []holder.Process{st.Holder, st.Server} {
				if err := unix.Kill(p.Pid, sig); err != nil {
					f.t.Fatal(err)
				}
			}
		}
		for _, p := range []holder.Process{st.Holder, st.Server} {
			if err := p.WaitGone(f.t.Context()); err != nil {
				f.t.Fatal(err)
			}
		}
		f.waitDead(target)
		return
	}
	f.t.Fatalf("nothing is mounted on %s", target)
}

// waitDead waits until the kernel knows that nobody serves a mount any more.
func (f *fixture) waitDead(target string) {
	f.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	late := time.After(20 * time.Second)
	for {
		var st unix.Statfs_t
		err := unix.Statfs(target, &st)
		if errors.Is(err, unix.ENOTCONN) {
			return
		}
		select {
		case <-tick.C:
		case <-late:
			f.t.Fatalf("%s is still served: %v", target, err)
		}
	}
}

// restoreAll returns what Restore says, by target.
func (f *fixture) restoreAll() map[string]Restored {
	f.t.Helper()
	all, err := f.Restore(f.t.Context(), Empty{})
	if err != nil {
		f.t.Fatal(err)
	}
	out := map[string]Restored{}
	for _, r := range all {
		out[string(r.Target)] = r
	}
	return out
}

// statusAt is the line of ps with that mount point.
func (f *fixture) statusAt(target string) Status {
	f.t.Helper()
	all, err := f.List(f.t.Context(), Empty{})
	if err != nil {
		f.t.Fatal(err)
	}
	for _, s := range all {
		if string(s.Target) == target {
			return s
		}
	}
	return Status{}
}

func (f *fixture) umountAt(target string) {
	f.t.Helper()
	res, err := f.Unmount(f.t.Context(), UnmountRequest{Name: Path(target), Target: Path(target)})
	if err != nil {
		f.t.Fatal(err)
	}
	if res.StillInUse && strings.Contains(res.By, "mount namespace") {
		f.t.Skipf("somebody else's mount namespace keeps the mount: %s", res.By)
	}
}

// TestRestoreAfterKill: of many that restore at once one does, with the same container
// and options, and what was unmounted stays so.
func TestRestoreAfterKill(t *testing.T) {
	f := newFixture(t)
	res := f.mountWanted(MountRequest{Source: "localhost/img:1", Name: "w", NoExec: true}, f.mnt)
	if err := os.WriteFile(f.mnt+"/kept", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if r := f.restoreAll()[f.mnt]; r.State != StateMounted || r.Restored || r.Container != "w" {
		t.Errorf("restore of what is mounted: %+v", r)
	}
	f.kill(f.mnt)
	if s := f.statusAt(f.mnt); s.State != StateWanted || s.Reason == "" || s.Container == nil || s.Container.ID != res.Container.ID {
		t.Errorf("after the kill: %+v", s)
	}
	const tries = 4
	results := make(chan []Restored, tries)
	for range tries {
		go func() {
			all, err := f.Restore(t.Context(), Empty{})
			if err != nil {
				t.Error(err)
			}
			results <- all
		}()
	}
	made := 0
	for range tries {
		all := <-results
		if len(all) != 1 || all[0].State != StateMounted || all[0].Err() != nil {
			t.Errorf("restore: %+v", all)
		} else if all[0].Restored {
			made++
		}
	}
	if made != 1 {
		t.Errorf("made %d times", made)
	}
	if _, err := os.Stat(f.mnt + "/kept"); err != nil {
		t.Error(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(f.mnt, &st); err != nil || st.Flags&unix.ST_NOEXEC == 0 || st.Flags&unix.ST_NOSUID == 0 {
		t.Errorf("flags %#x, %v", st.Flags, err)
	}
	f.kill(f.mnt) // and a mount that was restored is as wanted as the first
	if r := f.restoreAll()[f.mnt]; !r.Restored {
		t.Errorf("second restore: %+v", r)
	}
	f.umountAt(f.mnt)
	if r := f.restoreAll(); len(r) != 0 {
		t.Errorf("restore after umount: %+v", r)
	}
	f.clean()
}

// TestRestoreAfterBoot: umount(8), as at a shutdown, keeps a mount from coming back in
// the same boot only. A row of the boot before is in nobody's way.
func TestRestoreAfterBoot(t *testing.T) {
	f := newFixture(t)
	ro := f.dir()
	f.mountWanted(MountRequest{Source: "c"}, f.mnt)
	f.mountWanted(MountRequest{Source: "localhost/img:1", ReadOnly: true}, ro)
	if err := transport.Unmount(ro, false); err != nil {
		t.Fatal(err)
	}
	r := f.restoreAll()[ro]
	if r.State != StateWanted || r.Err() != nil || !strings.Contains(r.Reason, "another program") {
		t.Errorf("unmounted by another program: %+v", r)
	}
	if s := f.statusAt(ro); s.State != StateWanted || s.Reason != r.Reason || s.ImageName == "" || !s.ReadOnly {
		t.Errorf("status %+v", s)
	}
	f.kill(f.mnt)
	c, err := f.store.Container(t.Context(), "c")
	if err != nil {
		t.Fatal(err)
	}
	const before = "00000000-0000-0000-0000-000000000000"
	err = errors.Join(f.reconcile(t.Context()), // a boot takes the mount from the tree as well
		f.store.AddLive(t.Context(), layers.Live{Target: f.mnt, ContainerID: c.ID, Pid: os.Getpid(), StartTime: 1, BootID: before}),
		f.store.ChangeWanted(t.Context(), ro, func(w *layers.Wanted) { w.Unmounted = before }))
	if err != nil {
		t.Fatal(err)
	}
	// The image is the one that was mounted, whatever its name means now.
	if _, err := f.Tag(t.Context(), TagRequest{Source: "localhost/img:1", Target: "localhost/keep:1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.RemoveImage(t.Context(), RemoveImageRequest{Name: "localhost/img:1"}); err != nil {
		t.Fatal(err)
	}
	all := f.restoreAll()
	for _, target := range []string{f.mnt, ro} {
		if r := all[target]; !r.Restored || r.State != StateMounted {
			t.Errorf("%s: %+v", target, r)
		}
	}
	if err := os.WriteFile(ro+"/x", nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v", err)
	}
	f.umountAt(ro)
	f.umountAt(f.mnt)
	f.clean()
}

// TestRestoreFailures: what cannot be mounted is told of and stays wanted, and does not
// keep the rest from being mounted.
func TestRestoreFailures(t *testing.T) {
	f := newFixture(t)
	noDir, noImage, noContainer := f.dir(), f.dir(), f.dir()
	f.mountWanted(MountRequest{Source: "c"}, f.mnt)
	f.mountWanted(MountRequest{Source: "localhost/img:1", Name: "d"}, noDir)
	f.kill(f.mnt)
	f.kill(noDir)
	gone := layers.Wanted{Target: noContainer, ContainerID: strings.Repeat("0", 32), Request: []byte(`{"source":"none","target":"` + noContainer + `"}`)}
	image := layers.Wanted{Target: noImage, ReadOnly: true, ImageID: "sha256:" + "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"}
	image.Request = []byte(`{"source":"` + image.ImageID.String() + `","readOnly":true,"target":"` + noImage + `"}`)
	if err := errors.Join(f.store.Want(t.Context(), gone), f.store.Want(t.Context(), image)); err != nil {
		t.Fatal(err)
	}
	if s := f.statusAt(noDir); s.State != StateWanted { // and makes sure that it is detached
		t.Errorf("status %+v", s)
	}
	if err := os.Rename(noDir, noDir+"-away"); err != nil {
		t.Fatal(err)
	}
	all := f.restoreAll()
	if r := all[f.mnt]; !r.Restored {
		t.Errorf("%+v", r)
	}
	for target, want := range map[string]error{noDir: ErrMount, noImage: layers.ErrNotFound, noContainer: layers.ErrNotFound} {
		r := all[target]
		if r.State != StateWanted || !errors.Is(r.Err(), want) {
			t.Errorf("%s: %+v: %v", target, r, r.Err())
		}
		if s := f.statusAt(target); s.State != StateWanted || s.Reason != r.Reason || s.Reason == "" {
			t.Errorf("status of %s: %+v", target, s)
		}
	}
	failed := 0
	for _, e := range happened(t, f) {
		if e.Type == events.TypeMount && e.Action == events.Fail && e.Mount.Error != "" {
			failed++
		}
	}
	if failed != 3 {
		t.Errorf("%d events of failures", failed)
	}
	if err := os.Rename(noDir+"-away", noDir); err != nil {
		t.Fatal(err)
	}
	if r := f.restoreAll()[noDir]; !r.Restored {
		t.Errorf("after the cure: %+v", r)
	}
	if s := f.statusAt(noDir); s.State != StateMounted || s.Reason != "" {
		t.Errorf("status %+v", s)
	}
	for _, target := range []string{noImage, noContainer, noDir, f.mnt} {
		f.umountAt(target)
	}
	if r := f.restoreAll(); len(r) != 0 {
		t.Errorf("wanted after all were unmounted: %+v", r)
	}
	f.clean()
}

// TestRestoreOverDeadMount: a dead mount whose row is gone is not in the way.
func TestRestoreOverDeadMount(t *testing.T) {
	f := newFixture(t)
	f.mountWanted(MountRequest{Source: "c"}, f.mnt)
	f.kill(f.mnt)
	if err := f.store.RemoveLive(t.Context(), f.mnt); err != nil {
		t.Fatal(err)
	}
	if r := f.restoreAll()[f.mnt]; !r.Restored {
		t.Errorf("%+v", r)
	}
	f.umountAt(f.mnt)
}

func TestUnwanted(t *testing.T) {
	f := newFixture(t)
	_, err := f.Mount(t.Context(), MountRequest{Source: "localhost/img:1", Target: Path(f.mnt), AutoRemove: true, Restart: true})
	if !errors.Is(err, ErrUsage) || !strings.Contains(err.Error(), "--rm") {
		t.Errorf("one-shot: %v", err)
	}
	for what, end := range map[string]func() error{
		"umount of a container": func() error {
			res, err := f.Unmount(t.Context(), UnmountRequest{Name: "c", Target: "/nowhere/c"})
			if res.Target != Path(f.mnt) || res.Container != "c" {
				t.Errorf("unmount: %+v", res)
			}
			return err
		},
		"rm": func() error {
			_, err := f.Remove(t.Context(), RemoveRequest{Name: "c"})
			if err == nil {
				_, err = f.Create(t.Context(), CreateRequest{Image: "localhost/img:1", Name: "c"})
			}
			return err
		},
	} {
		f.mountWanted(MountRequest{Source: "c"}, f.mnt)
		f.kill(f.mnt)
		if err := end(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if r := f.restoreAll(); len(r) != 0 {
			t.Errorf("%s: %+v", what, r)
		}
	}
	// A container is wanted where it was asked for last.
	other := f.dir()
	f.mountWanted(MountRequest{Source: "c"}, f.mnt)
	f.kill(f.mnt)
	f.mountWanted(MountRequest{Source: "c"}, other)
	if r := f.restoreAll(); len(r) != 1 || r[other].State != StateMounted {
		t.Errorf("%+v", r)
	}
	f.umountAt(other)
	f.clean()
}

// TestDaemonRestores: what is wanted is mounted before the daemon answers.
func TestDaemonRestores(t *testing.T) {
	f := newFixture(t)
	f.mountWanted(MountRequest{Source: "c"}, f.mnt)
	if err := f.store.Want(t.Context(), layers.Wanted{
		Target: filepath.Dir(f.mnt) + "/none", ContainerID: strings.Repeat("0", 32), Request: []byte("{}"),
	}); err != nil {
		t.Fatal(err)
	}
	f.kill(f.mnt)
	ready := false
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err := RunDaemon(ctx, f.store.Root(), DaemonOptions{Ready: func(string) {
		ready = true
		f.wantState(StateMounted)
		cancel()
	}})
	if err != nil || !ready {
		t.Errorf("daemon: %v", err)
	}
	f.umountAt(f.mnt)
	f.clean()
}
