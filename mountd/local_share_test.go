package mountd

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/holder"
)

// points are the mount points of container c, as ps shows them, and whether they are writable.
func (f *fixture) points() map[string]string {
	f.t.Helper()
	all, err := f.List(f.t.Context(), Empty{})
	if err != nil {
		f.t.Fatal(err)
	}
	at := map[string]string{}
	for _, s := range all {
		if s.Container != nil && s.Container.Name == "c" && s.Target != "" {
			at[string(s.Target)] = s.State
			if s.ReadOnly {
				at[string(s.Target)] += " read-only"
			}
		}
	}
	return at
}

func (f *fixture) wantPoints(want map[string]string) {
	f.t.Helper()
	got := f.points()
	same := len(got) == len(want)
	for at, s := range want {
		same = same && got[at] == s
	}
	if !same {
		f.t.Errorf("mount points %v, want %v", got, want)
	}
}

func (f *fixture) share(target string, r MountRequest) MountResult {
	f.t.Helper()
	r.Source, r.Target = "c", Path(target)
	res, err := f.Mount(f.t.Context(), r)
	if err != nil {
		f.t.Fatal(err)
	}
	return res
}

// TestSharedMount: all mount points of a container are served by one server, which ends
// with the last of them, whichever that is.
func TestSharedMount(t *testing.T) {
	f := newFixture(t)
	st := f.mount("c")
	two, three := f.dir(), f.dir()
	res := f.share(two, MountRequest{Suid: true})
	if res.SharedWith != Path(f.mnt) || res.Pid != st.Holder.Pid {
		t.Errorf("second mount point: %+v", res)
	}
	f.share(three, MountRequest{ReadOnly: true, NoExec: true})
	f.wantPoints(map[string]string{f.mnt: "mounted", two: "mounted", three: "mounted read-only"})

	if err := os.WriteFile(two+"/new", []byte("shared"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{f.mnt, three} {
		if b, err := os.ReadFile(dir + "/new"); err != nil || string(b) != "shared" {
			t.Errorf("%s does not see what was written at another mount point: %q, %v", dir, b, err)
		}
	}
	if err := os.WriteFile(three+"/no", nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("written through a read-only mount point: %v", err)
	}
	var fs unix.Statfs_t
	for dir, want := range map[string]int64{f.mnt: unix.ST_NOSUID | unix.ST_NODEV, two: unix.ST_NODEV, three: unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC | unix.ST_RDONLY} {
		const all = unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC | unix.ST_RDONLY
		if err := unix.Statfs(dir, &fs); err != nil || int64(fs.Flags)&all != want {
			t.Errorf("%s: flags %#x, want %#x, %v", dir, int64(fs.Flags)&all, want, err)
		}
	}

	// What cannot be shared is refused, and changes nothing.
	for _, r := range []MountRequest{{Volatile: true}, {Debug: true}, {Source: "c", Target: Path(two)}} {
		if r.Target == "" {
			r.Source, r.Target = "c", Path(f.dir())
		}
		if _, err := f.Mount(t.Context(), r); !errors.Is(err, ErrUsage) && !errors.Is(err, layers.ErrInUse) {
			t.Errorf("%+v: %v", r, err)
		}
	}
	if _, err := f.Unmount(t.Context(), UnmountRequest{Name: "c", Target: "/nowhere/c"}); !errors.Is(err, ErrUsage) {
		t.Errorf("a container with several mount points was unmounted by its name: %v", err)
	}
	if _, err := f.Remove(t.Context(), RemoveRequest{Name: "c"}); !errors.Is(err, layers.ErrInUse) {
		t.Errorf("removed while mounted: %v", err)
	}

	// The first goes: the row is now that of another one, and its place is free.
	if res, err := f.unmount(false); err != nil || !res.StillInUse {
		t.Errorf("unmount of the first: %+v, %v", res, err)
	}
	f.wantPoints(map[string]string{two: "mounted", three: "mounted read-only"})
	rows, err := f.store.LiveMounts(t.Context())
	if err != nil || len(rows) != 1 || !slices.Contains([]string{two, three}, rows[0].Target) || rows[0].Pid != st.Holder.Pid {
		t.Errorf("rows %+v, %v", rows, err)
	}
	if _, err := f.Mount(t.Context(), MountRequest{Source: "localhost/img:1", Target: Path(f.mnt), Name: "other", AutoRemove: true}); err != nil {
		t.Fatal(err)
	}
	if res, err := f.unmount(false); err != nil || !res.Removed {
		t.Errorf("another container in its place: %+v, %v", res, err)
	}
	// Others unmount that of the row: the next one in its place makes the row follow.
	if err := unix.Unmount(rows[0].Target, 0); err != nil {
		t.Fatal(err)
	}
	f.share(rows[0].Target, MountRequest{})
	for _, dir := range []string{two, three} {
		if _, err := f.Unmount(t.Context(), UnmountRequest{Name: Path(dir), Target: Path(dir)}); err != nil {
			t.Error(err)
		}
	}
	f.clean()
	if _, err := f.Remove(t.Context(), RemoveRequest{Name: "c"}); err != nil {
		t.Error(err)
	}
}

// TestSharedMountEnds: with their processes all mount points go, and those that are wanted
// come back, the writable one first.
func TestSharedMountEnds(t *testing.T) {
	f := newFixture(t)
	two := f.dir()
	// The name of the read-only one comes first.
	if two > f.mnt {
		f.mnt, two = two, f.mnt
	}
	f.mountWanted(MountRequest{Source: "c"}, f.mnt)
	f.mountWanted(MountRequest{Source: "c", ReadOnly: true}, two)
	f.kill(f.mnt)
	all, err := f.Restore(t.Context(), Empty{})
	if err != nil || len(all) != 2 || !all[0].Restored || !all[1].Restored {
		t.Fatalf("restored: %+v, %v", all, err)
	}
	f.wantPoints(map[string]string{f.mnt: "mounted", two: "mounted read-only"})
	for _, dir := range []string{two, f.mnt} {
		if _, err := f.Unmount(t.Context(), UnmountRequest{Name: Path(dir), Target: Path(dir)}); err != nil {
			t.Error(err)
		}
	}
	f.clean()
	if all, err := f.Restore(t.Context(), Empty{}); err != nil || len(all) != 0 {
		t.Errorf("still wanted: %+v, %v", all, err)
	}

	// A signal to the holder ends the mount everywhere.
	st := f.mount("c")
	f.share(two, MountRequest{})
	if err := unix.Kill(st.Holder.Pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := st.Holder.WaitGone(t.Context()); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(b), two) {
		t.Errorf("%s is still mounted (%v)", two, err)
	}
	f.wantPoints(map[string]string{})
	f.clean()
}

// TestClaims: a device number may be that of another mount by now.
func TestClaims(t *testing.T) {
	row := func(target string) layers.Live {
		return layers.Live{Target: target, RunDir: "/run" + target, BootID: holder.BootID()}
	}
	c := claimsOf([]layers.Live{row("/a"), row("/b"), {Target: "/c", RunDir: "/run/old", BootID: "an earlier one"}})
	at := func(target string) *mountinfo.Info {
		return &mountinfo.Info{Major: 0, Minor: 50, Mountpoint: target, Root: "/", FSType: "fuse.plyfs"}
	}
	for _, x := range []struct {
		row   string
		table []*mountinfo.Info
		want  string
	}{
		{"/a", []*mountinfo.Info{at("/a")}, "/a"},
		{"/a", []*mountinfo.Info{at("/b")}, ""},                // it has ended
		{"/b", []*mountinfo.Info{at("/b")}, "/b"},              // and this has its number
		{"/a", []*mountinfo.Info{at("/b"), at("/c")}, "/c"},    // renamed
		{"/a", []*mountinfo.Info{at("/x"), at("/a")}, "/x /a"}, // shared
		{"/a", []*mountinfo.Info{at("/b"), at("/x"), at("/a")}, "/x /a"},
	} {
		var got []string
		for _, m := range c.mounts(x.table, 0, 50, row(x.row)) {
			got = append(got, m.Mountpoint)
		}
		if strings.Join(got, " ") != x.want {
			t.Errorf("%s: %v, want %s", x.row, got, x.want)
		}
	}
}
