package mountd

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs/transport"
)

// hiddenVerb makes the test binary its own holder and server.
func hiddenVerb() {
	if len(os.Args) < 2 {
		return
	}
	switch os.Args[1] {
	case holder.VerbHolder:
		os.Exit(holder.HolderMain(zap.NewNop()))
	case holder.VerbServer:
		os.Exit(holder.ServerMain(zap.NewNop()))
	}
}

// fixture is a service with one image, img:1, and one container, c.
type fixture struct {
	*Local
	t   *testing.T
	mnt string
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts directly: needs root")
	}
	if fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		t.Skipf("needs /dev/fuse: %v", err)
	} else {
		_ = unix.Close(fd) // only tried
	}
	dir := mkdirs(t, "mnt", "run")
	t.Setenv(RunDirEnv, dir+"/run")
	l, err := OpenLocal(t.Context(), dir+"/store", LocalOptions{Logger: zaptest.NewLogger(t)})
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{Local: l, t: t, mnt: dir + "/mnt"}
	t.Cleanup(func() {
		_ = unix.Unmount(f.mnt, unix.MNT_DETACH) // usually gone already
		f.waitAll()
		_ = l.Close() // a read-only handle
	})
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	if err := tw.WriteHeader(&tar.Header{Name: "file", Mode: 0o644, Size: 5, Typeflag: tar.TypeReg, ModTime: time.Unix(1, 0)}); err != nil {
		t.Fatal(err)
	}
	if _, err := tw.Write([]byte("lower")); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Import(t.Context(), ImportRequest{Ref: "localhost/img:1"}, layers.Source{Reader: &buf}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Create(t.Context(), CreateRequest{Image: "localhost/img:1", Name: "c"}); err != nil {
		t.Fatal(err)
	}
	return f
}

// waitAll waits for the processes of every mount the test has made.
func (f *fixture) waitAll() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, p := range holder.ProcessesOf(f.mnt) {
		if err := p.WaitGone(ctx); err != nil {
			f.t.Errorf("process %d of the mount stays: %v", p.Pid, err)
		}
	}
}

func (f *fixture) mount(source string) holder.State {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 30*time.Second)
	defer cancel()
	if _, err := f.Mount(ctx, MountRequest{Source: source, Target: Path(f.mnt)}); err != nil {
		f.t.Fatal(err)
	}
	rows, err := f.store.LiveMounts(ctx)
	if err != nil || len(rows) != 1 {
		f.t.Fatalf("live rows: %v, %v", rows, err)
	}
	st, err := holder.ReadState(rows[0].RunDir)
	if err != nil {
		f.t.Fatal(err)
	}
	return st
}

// state is the state of container c, as ps shows it.
func (f *fixture) state() string {
	f.t.Helper()
	all, err := f.List(f.t.Context(), Empty{})
	if err != nil {
		f.t.Fatal(err)
	}
	for _, s := range all {
		if s.Container != nil && s.Container.Name == "c" {
			return s.State
		}
	}
	return "absent"
}

func (f *fixture) wantState(want string) {
	f.t.Helper()
	if got := f.state(); got != want {
		f.t.Errorf("state %q, want %q", got, want)
	}
}

func (f *fixture) unmount(lazy bool) (UnmountResult, error) {
	ctx, cancel := context.WithTimeout(f.t.Context(), 30*time.Second)
	defer cancel()
	return f.Unmount(ctx, UnmountRequest{Name: Path(f.mnt), Target: Path(f.mnt), Lazy: lazy})
}

// clean checks that nothing is left of any mount.
func (f *fixture) clean() {
	f.t.Helper()
	rows, err := f.store.LiveMounts(f.t.Context())
	if err != nil || len(rows) != 0 {
		f.t.Errorf("live rows left: %v, %v", rows, err)
	}
	dirs, err := os.ReadDir(filepath.Join(f.runDir, "mounts"))
	if err != nil || len(dirs) != 0 {
		f.t.Errorf("run directories left: %v, %v", dirs, err)
	}
	table, err := holder.MountTable(0)
	if err != nil || holder.TopMount(table, f.mnt) != nil {
		f.t.Errorf("still in the mount table (%v)", err)
	}
}

func TestLifeOfAMount(t *testing.T) {
	f := newFixture(t)
	f.wantState(StateCreated)
	f.mount("c")
	f.wantState(StateMounted)
	if err := os.WriteFile(f.mnt+"/new", []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	changes, err := f.Diff(t.Context(), DiffRequest{A: "c"})
	if err != nil || len(changes) != 1 || changes[0].Kind != "A" || changes[0].Path != "/new" {
		t.Errorf("diff %v, %v", changes, err)
	}
	_, err = f.Mount(t.Context(), MountRequest{Source: "localhost/img:1", Target: Path(f.mnt)})
	if !errors.Is(err, layers.ErrInUse) {
		t.Errorf("mount over a mount: %v", err)
	}
	if _, err := f.Remove(t.Context(), RemoveRequest{Name: "c"}); !errors.Is(err, layers.ErrInUse) {
		t.Errorf("rm of a mounted container: %v", err)
	}
	if _, err := f.unmount(false); err != nil {
		t.Fatal(err)
	}
	f.wantState(StateCreated)
	f.clean()
	if _, err := f.unmount(false); !errors.Is(err, layers.ErrNotFound) {
		t.Errorf("unmount of nothing: %v", err)
	}
}

func TestFailedMountLeavesNothing(t *testing.T) {
	f := newFixture(t)
	for _, target := range []string{f.store.Root(), f.store.Root() + "/rw", filepath.Dir(f.mnt), "/", f.mnt + "/absent"} {
		if _, err := f.Mount(t.Context(), MountRequest{Source: "localhost/img:1", Target: Path(target)}); !errors.Is(err, ErrMount) {
			t.Errorf("mount on %q: %v", target, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Mount(ctx, MountRequest{Source: "localhost/img:1", Target: Path(f.mnt)}); err == nil {
		t.Error("cancelled mount succeeded")
	}
	all, err := f.List(t.Context(), Empty{})
	if err != nil || len(all) != 1 {
		t.Errorf("containers left: %+v, %v", all, err)
	}
}

func TestRecoveryAfterKill(t *testing.T) {
	f := newFixture(t)
	st := f.mount("c")
	if err := os.WriteFile(f.mnt+"/kept", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} { // neither is to replace the other
		for _, p := range []holder.Process{st.Holder, st.Server} {
			if err := unix.Kill(p.Pid, sig); err != nil {
				t.Fatal(err)
			}
		}
	}
	f.waitAll()
	f.wantState(StateCreated)
	f.clean()
	f.mount("c")
	if _, err := os.Stat(f.mnt + "/kept"); err != nil {
		t.Error(err)
	}
	if _, err := f.unmount(false); err != nil {
		t.Fatal(err)
	}
}

func TestServerKilledKeepsTheContainerMounted(t *testing.T) {
	f := newFixture(t)
	st := f.mount("c")
	if err := unix.Kill(st.Server.Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(f.mnt+"/kept", nil, 0o644); err != nil {
		t.Error(err)
	}
	f.wantState(StateMounted)
	if _, err := f.unmount(false); err != nil {
		t.Fatal(err)
	}
	f.wantState(StateCreated)
	f.clean()
}

func TestHolderKilledKeepsTheContainerMounted(t *testing.T) {
	f := newFixture(t)
	st := f.mount("c")
	if err := unix.Kill(st.Holder.Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := st.Holder.WaitGone(ctx); err != nil {
		t.Fatal(err)
	}
	f.wantState(StateMounted)
	if _, err := f.Remove(t.Context(), RemoveRequest{Name: "c"}); !errors.Is(err, layers.ErrInUse) {
		t.Errorf("rm: %v", err)
	}
	c, err := f.store.Container(t.Context(), "c")
	if err != nil || len(c.Live) != 1 || c.Live[0].Pid == st.Holder.Pid {
		t.Errorf("the store does not see the server or another holder: %+v, %v", c, err)
	}
	if _, err := f.unmount(false); err != nil {
		t.Fatal(err)
	}
	f.clean()
}

func TestBusyAndLazyUnmount(t *testing.T) {
	f := newFixture(t)
	f.mount("c")
	file, err := os.Open(f.mnt + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	_, err = f.unmount(false)
	if !errors.Is(err, layers.ErrInUse) || !strings.Contains(fmt.Sprint(err), fmt.Sprintf("process %d ", os.Getpid())) {
		t.Errorf("busy: %v", err)
	}
	f.wantState(StateMounted)
	res, err := f.unmount(true)
	if err != nil || !res.StillInUse {
		t.Errorf("lazy: %+v, %v", res, err)
	}
	f.wantState(StateDetached)
	_ = file.Close() // the last user
	f.mount("c")     // waits for the end of the old mount
	if _, err := f.unmount(false); err != nil {
		t.Fatal(err)
	}
	f.clean()
}

func TestMountRightAfterForeignUnmount(t *testing.T) {
	f := newFixture(t)
	for range 3 {
		f.mount("c")
		if err := transport.Unmount(f.mnt, false); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Remove(t.Context(), RemoveRequest{Name: "c"}); err != nil {
		t.Errorf("rm right after umount: %v", err)
	}
	f.wantState("absent")
	f.clean()
}

func TestOneShotContainer(t *testing.T) {
	f := newFixture(t)
	res, err := f.Mount(t.Context(), MountRequest{Source: "localhost/img:1", Target: Path(f.mnt), Name: "once", AutoRemove: true})
	if err != nil {
		t.Fatal(err)
	}
	if res.Container == nil || res.Container.Name != "once" {
		t.Errorf("result %+v", res)
	}
	ures, err := f.Unmount(t.Context(), UnmountRequest{Name: "once", Target: "/nowhere/once"})
	if err != nil || !ures.Removed || ures.Target != Path(f.mnt) {
		t.Errorf("unmount by name: %+v, %v", ures, err)
	}
	if _, err := f.store.Container(t.Context(), "once"); !errors.Is(err, layers.ErrNotFound) {
		t.Errorf("one-shot container: %v", err)
	}
	f.clean()
}

func TestReadOnlyMounts(t *testing.T) {
	f := newFixture(t)
	for _, source := range []string{"localhost/img:1", "c"} {
		if _, err := f.Mount(t.Context(), MountRequest{Source: source, Target: Path(f.mnt), ReadOnly: true}); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f.mnt+"/x", nil, 0o644); !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: write: %v", source, err)
		}
		if _, err := f.RemoveImage(t.Context(), RemoveImageRequest{Name: "localhost/img:1"}); !errors.Is(err, layers.ErrInUse) {
			t.Errorf("%s: rmi of a mounted image: %v", source, err)
		}
		if _, err := f.unmount(false); err != nil {
			t.Fatal(err)
		}
	}
	f.clean()
}

func TestLockName(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := lockName(t.Context(), path, "a")
	if err != nil {
		t.Fatal(err)
	}
	other, err := lockName(t.Context(), path, "b")
	if err != nil {
		t.Fatal(err)
	}
	other()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := lockName(ctx, path, "a"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("second lock of one name: %v", err)
	}
	unlock()
	again, err := lockName(t.Context(), path, "a")
	if err != nil {
		t.Fatal(err)
	}
	again()
}
