package holder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs"
	"github.com/plyfs/plyfs/unionfs/transport"
)

// The test binary is its own holder and server, as plyfs is.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case VerbHolder:
			os.Exit(HolderMain(zap.NewNop()))
		case VerbServer:
			os.Exit(ServerMain(zap.NewNop()))
		}
	}
	os.Exit(m.Run())
}

// union is a spec of fresh directories. What a test leaves mounted is detached.
func union(t *testing.T) Spec {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts directly: needs root")
	}
	if fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		t.Skipf("needs /dev/fuse: %v", err)
	} else {
		_ = unix.Close(fd) // only tried
	}
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"low", "up", "work", "mnt", "run"} {
		if err := os.Mkdir(filepath.Join(dir, n), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(dir+"/low/file", []byte("lower"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir+"/mnt", unix.MNT_DETACH) }) // usually gone already
	return Spec{
		ID: "test", Target: dir + "/mnt", Lowers: []unionfs.Layer{{Path: dir + "/low"}},
		Upper: unionfs.Layer{Path: dir + "/up"}, Work: dir + "/work", RunDir: dir + "/run",
	}
}

// limit bounds every wait of a test.
func limit(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func mount(t *testing.T, s Spec) State {
	t.Helper()
	p, err := Start(limit(t), s, StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	st, err := p.Go(limit(t))
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func waitGone(t *testing.T, ps ...Process) {
	t.Helper()
	for _, p := range ps {
		if err := p.WaitGone(limit(t)); err != nil {
			t.Fatalf("process %d: %v", p.Pid, err)
		}
	}
}

func mounted(t *testing.T, target string) bool {
	t.Helper()
	table, err := MountTable(0)
	if err != nil {
		t.Fatal(err)
	}
	return TopMount(table, target) != nil
}

func TestMountAndUnmount(t *testing.T) {
	s := union(t)
	st := mount(t, s)
	b, err := os.ReadFile(s.Target + "/file")
	if err != nil || string(b) != "lower" {
		t.Fatalf("read through the mount: %q, %v", b, err)
	}
	if err := os.WriteFile(s.Target+"/new", []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	rec, err := ReadState(s.RunDir)
	if err != nil || rec != st {
		t.Errorf("recorded state %+v, %v; want %+v", rec, err, st)
	}
	table, err := MountTable(0)
	if err != nil {
		t.Fatal(err)
	}
	if m := FindMount(DeviceMounts(table, st.Major, st.Minor), s.Target); m == nil || m.Mountpoint != s.Target || m.FSType != "fuse.plyfs" {
		t.Errorf("mount of device %d:%d: %+v", st.Major, st.Minor, m)
	}
	if err := transport.Unmount(s.Target, false); err != nil {
		t.Fatal(err)
	}
	waitGone(t, st.Holder, st.Server)
	if _, err := os.Stat(s.Upper.Path + "/new"); err != nil {
		t.Error(err)
	}
	if err := ReadExit(s.RunDir); err != nil {
		t.Errorf("clean end reported as %v", err)
	}
}

// TestServerHasFewPrivileges: a server of root keeps what files need.
func TestServerHasFewPrivileges(t *testing.T) {
	s := union(t)
	st := mount(t, s)
	defer waitGone(t, st.Holder, st.Server)
	defer func() { _ = transport.Unmount(s.Target, true) }()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", st.Server.Pid))
	if err != nil || len(tasks) < 2 {
		t.Fatal(tasks, err)
	}
	var keep uint64
	for _, c := range needed {
		keep |= 1 << c
	}
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if err != nil {
			continue // the thread has ended
		}
		for line := range strings.Lines(string(b)) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
			switch key {
			case "CapEff", "CapPrm", "CapInh":
				if has, err := strconv.ParseUint(value, 16, 64); err != nil || has&^keep != 0 || key != "CapInh" && has&(1<<unix.CAP_CHOWN) == 0 {
					t.Errorf("%s: %s is %s, expected nothing beyond %x", task, key, value, keep)
				}
			case "Seccomp":
				if value != "2" {
					t.Errorf("%s: seccomp is %s, expected a filter", task, value)
				}
			case "NoNewPrivs":
				if value != "1" {
					t.Errorf("%s: no_new_privs is %s", task, value)
				}
			}
		}
	}
}

func TestOnlyNamedDescriptorsAreInherited(t *testing.T) {
	s := union(t)
	leak, err := os.CreateTemp(t.TempDir(), "leak")
	if err != nil {
		t.Fatal(err)
	}
	defer leak.Close()
	if _, err := unix.FcntlInt(leak.Fd(), unix.F_SETFD, 0); err != nil { // as a careless caller leaves it
		t.Fatal(err)
	}
	st := mount(t, s)
	defer waitGone(t, st.Holder, st.Server)
	defer func() { _ = transport.Unmount(s.Target, true) }()
	for name, p := range map[string]Process{"holder": st.Holder, "server": st.Server} {
		dir := "/proc/" + strconv.Itoa(p.Pid) + "/fd"
		fds, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			to, _ := os.Readlink(filepath.Join(dir, fd.Name())) // closed meanwhile: empty
			n, _ := strconv.Atoi(fd.Name())
			if strings.Contains(to, "leak") || n < 3 && to != "/dev/null" {
				t.Errorf("%s has descriptor %d: %s", name, n, to)
			}
		}
		if wd, _ := os.Readlink("/proc/" + strconv.Itoa(p.Pid) + "/cwd"); wd != "/" {
			t.Errorf("%s runs in %q", name, wd)
		}
		if sid, err := unix.Getsid(p.Pid); err != nil || sid != p.Pid {
			t.Errorf("%s is in session %d, %v", name, sid, err)
		}
	}
}

// TestServerLost: where nobody can go on, the mount ends.
func TestServerLost(t *testing.T) {
	s := union(t)
	s.GoFuse = true
	st := mount(t, s)
	f, err := os.Open(s.Target + "/file") // somebody uses it
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Kill(st.Server.Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitGone(t, st.Server, st.Holder)
	if mounted(t, s.Target) {
		t.Error("the dead mount is still in the tree")
	}
	// What is in the page cache can still be read.
	if _, err := unix.Fgetxattr(int(f.Fd()), "user.any", nil); !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED) {
		t.Errorf("a request on the dead mount: %v", err)
	}
	if err := ReadExit(s.RunDir); err == nil || !strings.Contains(err.Error(), "ended unexpectedly") {
		t.Errorf("recorded end: %v", err)
	}
}

// TestAnotherMountWithOurNumberStays: device numbers are used again. A mount
// that was unmounted must not take its successor out of the tree.
func TestAnotherMountWithOurNumberStays(t *testing.T) {
	for _, c := range []struct {
		name  string
		serve bool // the other mount answers; else its server hangs
	}{{"answering", true}, {"hanging", false}} {
		t.Run(c.name, func(t *testing.T) {
			s := union(t)
			dev, err := transport.Mount(transport.MountOptions{Target: s.Target})
			if err != nil {
				t.Fatal(err)
			}
			defer dev.Close()
			if err := transport.Unmount(s.Target, true); err != nil {
				t.Fatal(err)
			}
			h := &holder{spec: s, log: zap.NewNop(), dev: dev}
			if !h.disconnected() {
				t.Fatal("unmounted, but still connected")
			}
			if c.serve {
				h.state = mount(t, s)
				defer waitGone(t, h.state.Holder, h.state.Server)
			} else {
				other, err := transport.Mount(transport.MountOptions{Target: s.Target})
				if err != nil {
					t.Fatal(err)
				}
				defer other.Close()
				m, err := ownMount(s.Target)
				if err != nil {
					t.Fatal(err)
				}
				h.state.Major, h.state.Minor = m.Major, m.Minor
			}
			defer func() { _ = transport.Unmount(s.Target, true) }()
			h.detach()
			if !mounted(t, s.Target) {
				t.Error("detached somebody else's mount")
			}
		})
	}
}

// nextHolder waits for the state of another holder.
func nextHolder(t *testing.T, s Spec, was State) State {
	t.Helper()
	for ctx := limit(t); ctx.Err() == nil; <-time.After(5 * time.Millisecond) {
		if now, err := ReadState(s.RunDir); err != nil {
			t.Fatal(err)
		} else if now.Holder != was.Holder {
			return now
		}
	}
	t.Fatal("no new holder has come")
	return State{}
}

// TestHolderKilled: the server makes another holder, which does what the first one did.
func TestHolderKilled(t *testing.T) {
	s := union(t)
	st := mount(t, s)
	if err := unix.Kill(st.Holder.Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitGone(t, st.Holder)
	if err := os.WriteFile(s.Target+"/file", []byte("goes on"), 0o644); err != nil {
		t.Errorf("mount without holder: %v", err)
	}
	now := nextHolder(t, s, st)
	if !now.Holder.Alive() || now.Server != st.Server || now.Major != st.Major || now.Minor != st.Minor {
		t.Errorf("state %+v, before %+v", now, st)
	}
	if err := unix.Kill(now.Holder.Pid, unix.SIGTERM); err != nil { // which unmounts
		t.Fatal(err)
	}
	waitGone(t, st.Server, now.Holder)
	if mounted(t, s.Target) {
		t.Error("still mounted")
	}
	if err := ReadExit(s.RunDir); err != nil {
		t.Errorf("clean end reported as %v", err)
	}
}

// nextServer waits for the state of another server.
func nextServer(t *testing.T, s Spec, was State) State {
	t.Helper()
	for ctx := limit(t); ctx.Err() == nil; <-time.After(5 * time.Millisecond) {
		if now, err := ReadState(s.RunDir); err != nil {
			t.Fatal(err)
		} else if now.Server != was.Server {
			return now
		}
	}
	t.Fatal("no new server has come")
	return State{}
}

// TestServerKilled: another server goes on with open files, with and without a name.
func TestServerKilled(t *testing.T) {
	s := union(t)
	st := mount(t, s)
	var files []*os.File
	for _, name := range []string{"kept", "removed"} {
		f, err := os.Create(filepath.Join(s.Target, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	if err := os.Remove(files[1].Name()); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := unix.Kill(st.Server.Pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if _, err := f.WriteString("line\n"); err != nil {
				t.Error(err)
			}
		}
		now := nextServer(t, s, st)
		if now.Holder != st.Holder || now.Restarts != st.Restarts+1 {
			t.Errorf("state %+v, before %+v", now, st)
		}
		st = now
	}
	for _, f := range files {
		b := make([]byte, 100)
		if n, err := f.ReadAt(b, 0); string(b[:n]) != "line\nline\nline\n" {
			t.Errorf("%s: %q, %v", f.Name(), b[:n], err)
		}
		_ = f.Close() // what has been written is there
	}
	if err := transport.Unmount(s.Target, false); err != nil {
		t.Fatal(err)
	}
	waitGone(t, st.Server, st.Holder)
	if err := ReadExit(s.RunDir); err != nil {
		t.Errorf("clean end reported as %v", err)
	}
}

// TestBothKilledInTurn: a holder that is not the first one starts another server, and gives
// it what has no name.
func TestBothKilledInTurn(t *testing.T) {
	s := union(t)
	st := mount(t, s)
	f, err := os.Create(s.Target + "/removed")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(st.Holder.Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitGone(t, st.Holder)
	now := nextHolder(t, s, st)
	if err := unix.Kill(st.Server.Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("goes on"); err != nil {
		t.Error(err)
	}
	if now = nextServer(t, s, now); now.Restarts != 1 {
		t.Errorf("%+v", now)
	}
	_ = f.Close() // it has no name
	if err := transport.Unmount(s.Target, false); err != nil {
		t.Fatal(err)
	}
	waitGone(t, now.Server, now.Holder)
}

// TestBothKilled: holder and server at once leave a dead mount.
func TestBothKilled(t *testing.T) {
	s := union(t)
	st := mount(t, s)
	for _, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} { // nobody is to start another one
		for _, p := range []Process{st.Holder, st.Server} {
			if err := unix.Kill(p.Pid, sig); err != nil {
				t.Fatal(err)
			}
		}
	}
	waitGone(t, st.Holder, st.Server)
	if !dead(s.Target) {
		t.Error("the mount answers")
	}
	table, err := MountTable(0)
	if err == nil {
		_, err = Detach(table, st.Major, st.Minor)
	}
	if err != nil || mounted(t, s.Target) {
		t.Errorf("the dead mount is still in the tree: %v", err)
	}
}

func TestSignals(t *testing.T) {
	s := union(t)
	st := mount(t, s)
	if err := unix.Kill(st.Server.Pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.Target + "/file"); err != nil || !st.Server.Alive() {
		t.Errorf("SIGTERM to the server ended the mount: %v", err)
	}
	if err := unix.Kill(st.Holder.Pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waitGone(t, st.Holder, st.Server)
	if mounted(t, s.Target) {
		t.Error("still mounted after SIGTERM to the holder")
	}
}

func TestStarterGone(t *testing.T) {
	s := union(t)
	p, err := Start(limit(t), s, StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p.Abort()
	waitGone(t, p.Process)
	if mounted(t, s.Target) {
		t.Error("aborted, but mounted")
	}

	ctx, cancel := context.WithCancel(t.Context())
	p, err = Start(ctx, s, StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := p.Go(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	waitGone(t, p.Process)
	if mounted(t, s.Target) {
		t.Error("cancelled, but mounted")
	}
}

func TestStartErrors(t *testing.T) {
	s := union(t)
	bad := s
	bad.Lowers = []unionfs.Layer{{Path: s.Target + "/absent"}}
	if _, err := Start(limit(t), bad, StartOptions{}); !errors.Is(err, unix.ENOENT) {
		t.Errorf("missing layer: %v", err)
	}
	bad = s
	bad.Work = ""
	if _, err := Start(limit(t), bad, StartOptions{}); err == nil {
		t.Error("upper without work directory accepted")
	}
	bad = s
	bad.Target = s.Target + "/absent"
	p, err := Start(limit(t), bad, StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Go(limit(t)); !errors.Is(err, unix.ENOENT) {
		t.Errorf("missing mount point: %v", err)
	}
	waitGone(t, p.Process)
}

func TestForeground(t *testing.T) {
	s := union(t)
	ctx, cancel := context.WithCancel(t.Context())
	err := Foreground(ctx, s, zap.NewNop(), func(State) {
		if _, err := os.Stat(s.Target + "/file"); err != nil {
			t.Error(err)
		}
		cancel()
	})
	if err != nil {
		t.Error(err)
	}
	if mounted(t, s.Target) {
		t.Error("still mounted")
	}
}

func TestUsers(t *testing.T) {
	s := union(t)
	st := mount(t, s)
	defer waitGone(t, st.Holder, st.Server)
	defer func() { _ = transport.Unmount(s.Target, true) }()
	f, err := os.Open(s.Target + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	table, err := MountTable(0)
	if err != nil {
		t.Fatal(err)
	}
	users := Users(FindMount(DeviceMounts(table, st.Major, st.Minor), s.Target))
	if len(users) != 1 || users[0].Pid != os.Getpid() || users[0].How != "open file "+s.Target+"/file" {
		t.Errorf("users %+v", users)
	}
	got := map[Process]bool{}
	for _, p := range ProcessesOf(s.Target) {
		got[p] = true
	}
	if len(got) != 3 || !got[st.Holder] || !got[st.Server] {
		t.Errorf("processes %v, want %v, %v and the spare holder", got, st.Holder, st.Server)
	}
	runtime.KeepAlive(f)
}

func TestParseStat(t *testing.T) {
	tail := " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21\n"
	for _, comm := range []string{"plain", "a b", ") R 1 2 (", "(((", ""} {
		start, is, err := parseStat([]byte(fmt.Sprintf("42 (%s)%s", comm, tail)))
		if err != nil || start != 4711 || is != running {
			t.Errorf("command %q: %d %v %v", comm, start, is, err)
		}
	}
	zombie := strings.Replace(tail, " S ", " Z ", 1)
	for threads, want := range map[string]phase{" 16 17 ": ending, " 16 1 ": ended, " 16 0 ": ended} {
		if _, is, err := parseStat([]byte("1 (x)" + strings.Replace(zombie, " 16 17 ", threads, 1))); err != nil || is != want {
			t.Errorf("a zombie with threads %q is %d, %v", threads, is, err)
		}
	}
	for _, bad := range []string{"", "1 (x", "1 (x) S 1 2", "1 (x) SS" + tail} {
		if _, _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}

func TestProcessAlive(t *testing.T) {
	p := Self()
	if !p.Alive() {
		t.Error("we are dead")
	}
	if (Process{Pid: p.Pid, StartTime: p.StartTime + 1}).Alive() {
		t.Error("another process with our id is taken for us")
	}
	if err := (Process{Pid: p.Pid, StartTime: p.StartTime + 1}).WaitGone(limit(t)); err != nil {
		t.Errorf("waiting for a process that is gone: %v", err)
	}
	if (Process{}).Alive() {
		t.Error("no process is alive")
	}
}

func TestFrames(t *testing.T) {
	l, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	peer, err := linkFromFile(theirs)
	if err != nil {
		t.Fatal(err)
	}
	big := Spec{Target: "/x"}
	for i := range 3000 {
		big.Lowers = append(big.Lowers, unionfs.Layer{Path: "/" + strings.Repeat("x", 200) + strconv.Itoa(i)})
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	sent := make(chan error, 1)
	go func() {
		err := l.send(message{Kind: kindSpec, Spec: &big})
		if err == nil {
			err = l.send(message{Kind: kindServe}, null)
		}
		if err == nil {
			err = l.send(message{Kind: kindError, Error: toWire(fmt.Errorf("open: %w", unix.EBUSY))})
		}
		l.close()
		sent <- err
	}()
	m, f, err := peer.expect(kindSpec)
	if err != nil || f != nil || len(m.Spec.Lowers) != 3000 {
		t.Fatalf("spec: %v %v", f, err)
	}
	_, f, err = peer.expect(kindServe)
	if err != nil || f == nil {
		t.Fatalf("serve: %v %v", f, err)
	}
	f.close() // only its arrival counts
	if _, _, err = peer.expect(kindLive); !errors.Is(err, unix.EBUSY) || err.Error() != "open: device or resource busy" {
		t.Errorf("error message became %v", err)
	}
	if _, _, err := peer.recv(); err == nil {
		t.Error("no end")
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}
