package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/archive"
	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// person is somebody with a store and a run directory.
type person struct {
	t        testing.TB
	bin      string
	dir      string
	uid, gid int
	opts     []string // of every shell
}

// newPerson makes a directory for a user; only root can be another than itself.
func newPerson(t testing.TB, uid, gid int) *person {
	t.Helper()
	harness.NeedFUSE(t)
	bin, err := harness.Binary()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(base, "person-")
	if err != nil {
		t.Fatal(err)
	}
	p := &person{t: t, bin: bin, dir: dir, uid: uid, gid: gid}
	if err := errors.Join(os.Mkdir(p.path("run"), 0o700), os.Chown(p.path("run"), uid, gid), os.Chown(dir, uid, gid), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *person) path(name string) string { return filepath.Join(p.dir, name) }

// cmd is a program run by the person.
func (p *person) cmd(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = p.dir
	cmd.WaitDelay = 5 * time.Second // something in the background may keep the output open
	cmd.Env = append(os.Environ(), "HOME="+p.dir, "PLYFS_ROOT="+p.path("store"), "PLYFS_RUN_DIR="+p.path("run"), "PLYFS_SOCKET=none",
		"XDG_RUNTIME_DIR="+p.path("run"), "LC_ALL=C")
	if p.uid != os.Geteuid() {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(p.uid), Gid: uint32(p.gid)}}
	}
	return cmd
}

// try runs a plyfs command, and returns what it prints and its status.
func (p *person) try(args ...string) (stdout, stderr string, status int) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if args[0] == "shell" {
		args = slices.Concat(args[:1], p.opts, args[1:])
	}
	cmd := p.cmd(ctx, p.bin, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if ctx.Err() != nil {
		p.t.Fatalf("plyfs %q has not ended within a minute\n%s%s", args, &out, &errs)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		p.t.Fatalf("plyfs %q: %v", args, err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// run runs a plyfs command that must succeed.
func (p *person) run(args ...string) string {
	p.t.Helper()
	out, errs, status := p.try(args...)
	if status != 0 {
		p.t.Fatalf("plyfs %q: status %d\n%s%s", args, status, out, errs)
	}
	return out
}

// load gives the person an image.
func (p *person) load(im archive.Image) {
	p.t.Helper()
	file := p.path("image.tar")
	if err := errors.Join(im.Write(file, archive.Options{}), os.Chmod(file, 0o644)); err != nil {
		p.t.Fatal(err)
	}
	p.run("load", "-q", "-i", file)
}

// as runs a test as root, as a user with one id, and as a user with subordinate
// ids, each where that is possible.
func as(t *testing.T, test func(t *testing.T, p *person)) {
	if os.Geteuid() == 0 && !harness.InUserNamespace() {
		t.Run("root", func(t *testing.T) { test(t, newPerson(t, 0, 0)) })
	}
	t.Run("user", func(t *testing.T) {
		needUserNamespace(t)
		asUser(t)
		uid, gid := user()
		p := newPerson(t, uid, gid)
		p.opts = []string{"--one-id"} // whatever the user has
		test(t, p)
	})
	t.Run("subids", func(t *testing.T) {
		needUserNamespace(t)
		uid, gid := userWithSubIDs(t)
		asUser(t)
		test(t, newPerson(t, uid, gid))
	})
}

func needUserNamespace(t testing.TB) {
	t.Helper()
	cmd := exec.Command("true")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	if err := cmd.Run(); err != nil {
		harness.Skip(t, "needs user namespaces: %v", err)
	}
}

// usersMade counts, for names.
var usersMade int

// userWithSubIDs makes a user for the time of a test.
func userWithSubIDs(t testing.TB) (uid, gid int) {
	t.Helper()
	harness.NeedRoot(t)
	for _, tool := range []string{"useradd", "userdel", "newuidmap", "newgidmap"} {
		if _, err := exec.LookPath(tool); err != nil {
			harness.Skip(t, "%s is not installed (packages passwd, uidmap)", tool)
		}
	}
	usersMade++
	name := fmt.Sprintf("plyfs-test-%d-%d", os.Getpid(), usersMade)
	if out, err := exec.Command("useradd", "--no-create-home", "--user-group", "--shell", "/bin/sh", name).CombinedOutput(); err != nil {
		harness.Skip(t, "cannot make a user: %v: %s", err, out)
	}
	t.Cleanup(func() {
		// What deletes files behind a command that has ended is the user's as well.
		waitFor(t, "the user's processes to end", func() bool { return exec.Command("userdel", name).Run() == nil })
	})
	out, err := exec.Command("sh", "-c", `id -u "$1"; id -g "$1"; grep -c "^$1:" /etc/subuid /etc/subgid`, "sh", name).Output()
	f := strings.Fields(string(out))
	if err != nil || len(f) < 4 {
		harness.Skip(t, "useradd gives no subordinate ids here: %v: %q", err, out)
	}
	uid, err1 := strconv.Atoi(f[0])
	gid, err2 := strconv.Atoi(f[1])
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return uid, gid
}

// applets are the programs of the shell image.
var applets = strings.Fields("cat chgrp chmod chown cp cut dd env grep head hostname id ln ls mkdir mknod mount mv nc ps pwd readlink rm sed sh sleep " +
	"sort stat stty su test touch tr true tty umount wc")

// shellLayer is a tree with programs, in which the entries given replace or add to
// those that are there.
func shellLayer(t testing.TB, more ...oracle.Entry) oracle.Layer {
	t.Helper()
	bin, err := exec.LookPath("busybox")
	if err != nil {
		harness.Skip(t, "busybox is not installed (package busybox-static)")
	}
	text, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(text[:min(len(text), 4096)], []byte("ld-linux")) {
		harness.Skip(t, "busybox is not static (package busybox-static)")
	}
	entries := []oracle.Entry{
		{Path: "bin", Kind: oracle.Dir},
		{Path: "bin/busybox", Kind: oracle.File, Mode: 0o755, Text: string(text)},
		{Path: "dev", Kind: oracle.Dir},
		{Path: "etc", Kind: oracle.Dir},
		{Path: "etc/passwd", Kind: oracle.File, Text: "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n"},
		{Path: "etc/group", Kind: oracle.File, Text: "root:x:0:\nstaff:x:50:app\n"},
		{Path: "etc/resolv.conf", Kind: oracle.File, Text: "nameserver 192.0.2.1\n"},
		{Path: "proc", Kind: oracle.Dir},
		{Path: "root", Kind: oracle.Dir, Mode: 0o700},
		{Path: "sys", Kind: oracle.Dir},
		{Path: "tmp", Kind: oracle.Dir, Mode: 0o1777},
	}
	for _, a := range applets {
		entries = append(entries, oracle.Entry{Path: oracle.Name("bin/" + a), Kind: oracle.Symlink, Target: "busybox"})
	}
	replaced := map[oracle.Name]bool{}
	for _, m := range more {
		replaced[m.Path] = true
	}
	var all []oracle.Entry
	for _, e := range entries {
		dir := oracle.Name(filepath.Dir(string(e.Path)))
		if !replaced[e.Path] && !replaced[dir] {
			all = append(all, e)
		}
	}
	return oracle.Layer{Entries: append(all, more...)}
}

// shellImage is an image of that layer.
func shellImage(t testing.TB, config map[string]any, more ...oracle.Entry) archive.Image {
	t.Helper()
	b, err := shellLayer(t, more...).Tar()
	if err != nil {
		t.Fatal(err)
	}
	if config == nil {
		config = map[string]any{}
	}
	return archive.Image{Ref: "shell:1", Layers: [][]byte{b}, Config: config}
}

func TestShell(t *testing.T) {
	as(t, func(t *testing.T, p *person) {
		p.load(shellImage(t, map[string]any{
			"Env": []string{"FROM=image", "BOTH=image"}, "WorkingDir": "/srv/made", "Cmd": []string{"sh", "-c", "echo command of the image"},
			"Volumes": map[string]any{"/data": map[string]any{}}, "ExposedPorts": map[string]any{"80/tcp": map[string]any{}},
		}))
		outside := p.path("outside")
		if err := errors.Join(os.Mkdir(outside, 0o755), os.WriteFile(outside+"/file", []byte("of the machine\n"), 0o644), os.Chown(outside, p.uid, p.gid)); err != nil {
			t.Fatal(err)
		}
		p.run("create", "shell:1", "work")
		host, err := os.ReadFile("/etc/resolv.conf")
		if err != nil {
			host = []byte("nameserver 192.0.2.1\n") // the image's
		}
		for name, c := range map[string]struct {
			args   []string
			want   string // the output, if it is not ""
			stderr string // a part of it
			status int
		}{
			"image":            {args: []string{"work"}, want: "command of the image\n", stderr: "volumes (/data)"},
			"ports":            {args: []string{"work"}, stderr: "ports (80/tcp)"},
			"quiet":            {args: []string{"-q", "work", "sh", "-c", "echo told >&2"}, stderr: "told\n"},
			"root":             {args: []string{"work", "--", "sh", "-c", "id -u; id -g; echo $HOME"}, want: "0\n0\n/root\n"},
			"environment":      {args: []string{"-e", "BOTH=user", "-e", "LC_ALL", "work", "sh", "-c", "echo $FROM $BOTH $LC_ALL $PATH $PLYFS_ROOT"}, want: "image user C /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"},
			"directory":        {args: []string{"work", "pwd"}, want: "/srv/made\n"},
			"new directory":    {args: []string{"-w", "/a/b/../c", "work", "pwd"}, want: "/a/c\n"},
			"entrypoint":       {args: []string{"--entrypoint", "echo", "work", "x"}, status: 127, stderr: `"echo"`},
			"own entrypoint":   {args: []string{"--entrypoint", "sh", "work", "-c", "echo x"}, want: "x\n"},
			"resolv.conf":      {args: []string{"work", "cat", "/etc/resolv.conf"}, want: string(host)},
			"host name":        {args: []string{"--hostname", "box", "work", "sh", "-c", "hostname; cat /etc/hostname; grep -c box /etc/hosts"}, want: "box\nbox\n1\n"},
			"devices":          {args: []string{"work", "sh", "-c", "cd /dev; ls | grep -v apt.conf | tr '\\n' ' '; for n in null zero full random urandom tty; do test -c $n && echo -n $n,; done"}, want: "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero null,zero,full,random,urandom,tty,"},
			"null":             {args: []string{"work", "sh", "-c", "echo x > /dev/null && head -c 2 /dev/zero | wc -c; echo y > /dev/shm/y; cat /dev/shm/y"}, want: "2\ny\n"},
			"processes":        {args: []string{"work", "sh", "-c", "cat /proc/1/comm; test $(ls /proc | grep -c '^[0-9]') -lt 9 && echo few"}, want: "plyfs-init\nfew\n"},
			"no way to kernel": {args: []string{"work", "sh", "-c", "for f in /proc/sys/vm/swappiness /proc/sysrq-trigger /sys/kernel/mm/lru_gen/enabled; do echo 1 2>/dev/null > $f && echo $f; done; true"}, want: ""},
			"capabilities":     {args: []string{"work", "grep", "CapBnd", "/proc/self/status"}, want: "CapBnd:\t00000000a80425fb\n"},
			"fewer":            {args: []string{"--cap-drop", "ALL", "work", "grep", "CapEff", "/proc/self/status"}, want: "CapEff:\t0000000000000000\n"},
			"no privileges":    {args: []string{"--no-new-privileges", "work", "grep", "NoNewPrivs", "/proc/self/status"}, want: "NoNewPrivs:\t1\n"},
			"init is closed":   {args: []string{"work", "sh", "-c", "cat /proc/1/environ 2>/dev/null || readlink /proc/1/exe || ls /proc/1/root/ 2>/dev/null || echo closed"}, want: "closed\n"},
			"volume":           {args: []string{"-v", "outside:/mnt/v", "work", "sh", "-c", "cat /mnt/v/file; echo x > /mnt/v/new"}, want: "of the machine\n"},
			"volume of a file": {args: []string{"-v", outside + "/file:/mnt/f:ro", "work", "sh", "-c", "cat /mnt/f; echo x > /mnt/f || echo refused"}, want: "of the machine\nrefused\n"},
			"volume in proc":   {args: []string{"-v", "outside:/proc/sys", "work", "true"}, status: 125, stderr: "leads into /proc"},
			"no new mounts":    {args: []string{"work", "sh", "-c", "mount -t tmpfs none /tmp 2>/dev/null || umount /proc/sys 2>/dev/null || echo refused"}, want: "refused\n"},
			"status":           {args: []string{"work", "sh", "-c", "exit 7"}, status: 7},
			"signal":           {args: []string{"work", "sh", "-c", "kill -9 $$"}, status: 137},
			"not found":        {args: []string{"work", "nosuch"}, status: 127, stderr: "nosuch"},
			"no program":       {args: []string{"work", "/etc/passwd"}, status: 126, stderr: "permission denied"},
			"no image":         {args: []string{"nosuch"}, status: 125, stderr: `"nosuch"`},
			"no option":        {args: []string{"--nosuch"}, status: 125, stderr: "--nosuch"},
			"no capability":    {args: []string{"--cap-add", "nosuch", "work"}, status: 125, stderr: `"nosuch"`},
			"no user":          {args: []string{"-u", "nosuch", "work", "true"}, status: 125, stderr: `user "nosuch"`},
			"orphans":          {args: []string{"work", "sh", "-c", "for i in 1 2 3; do sh -c 'sleep 0.1 &'; done; sleep 1; cat /proc/[0-9]*/stat | grep -c ') Z '"}, want: "0\n", status: 1},
			"read-only":        {args: []string{"--ro", "-w", "/", "work", "sh", "-c", "echo x > /x || echo refused"}, want: "refused\n"},
			"read-only image":  {args: []string{"--ro", "shell:1"}, status: 125, stderr: "choose another with -w"},
		} {
			t.Run(name, func(t *testing.T) {
				q := *p
				q.t = t
				out, errs, status := q.try(append([]string{"shell"}, c.args...)...)
				if status != c.status || c.want != "" && out != c.want || !strings.Contains(errs, c.stderr) {
					t.Errorf("status %d, want %d\nstdout: %q\n  want: %q\nstderr: %q\n  want: %q", status, c.status, out, c.want, errs, c.stderr)
				}
				if name == "no way to kernel" && out != "" {
					t.Errorf("could be written: %s", out)
				}
			})
		}
		if b, err := os.ReadFile(outside + "/new"); err != nil || string(b) != "x\n" {
			t.Errorf("written to a volume: %q, %v", b, err)
		}
		if ps := p.run("ps", "-q"); len(strings.Fields(ps)) != 1 {
			t.Errorf("containers at the end: %q", ps)
		}
		if d := p.run("diff", "work"); strings.Contains(d, "resolv.conf") || strings.Contains(d, " /dev/") || !strings.Contains(d, "A /srv/made") {
			t.Errorf("changed in the container:\n%s", d)
		}
	})
}

// TestShellUsers runs commands as users of the image.
func TestShellUsers(t *testing.T) {
	as(t, func(t *testing.T, p *person) {
		p.load(shellImage(t, map[string]any{"User": "app"}, oracle.Entry{Path: "home", Kind: oracle.Dir}))
		one := len(p.opts) > 0
		out, errs, status := p.try("shell", "--rm", "shell:1", "sh", "-c", "id -u; id -g; id -G; echo $HOME; grep CapEff /proc/self/status; touch /tmp/x; stat -c %u:%g /tmp/x")
		if one {
			if status != 125 || !strings.Contains(errs, "user 1000 of the image does not exist") {
				t.Errorf("a user that does not exist: status %d, %s%s", status, out, errs)
			}
			// What others should own belongs to root, and programs do not notice.
			out = p.run("shell", "-q", "--rm", "-u", "0", "shell:1", "sh", "-c", "touch /x && chown app:staff /x && chgrp 33 /x && stat -c %u:%g /x && su app -c 'echo $USER'")
			if out != "0:0\napp\n" {
				t.Errorf("with one id: %q", out)
			}
			return
		}
		if want := "1000\n1001\n1001 50\n/home/app\nCapEff:\t0000000000000000\n1000:1001\n"; status != 0 || out != want {
			t.Errorf("status %d\n got: %q\nwant: %q\n%s", status, out, want, errs)
		}
		if out, errs, _ = p.try("shell", "--rm", "-u", "12:34", "shell:1", "sh", "-c", "id -u; id -g; id -G"); out != "12\n34\n34\n" {
			t.Errorf("-u 12:34: %q %s", out, errs)
		}
	})
}

// TestShellCommit commits what a shell has written, also while it runs.
func TestShellCommit(t *testing.T) {
	as(t, func(t *testing.T, p *person) {
		p.load(shellImage(t, nil))
		p.run("create", "shell:1", "work")
		p.run("shell", "work", "sh", "-c", "echo 1 > /first; ln /first /second; rm /etc/group")
		sh := startShell(t, p, "work", "sh", "-c", "echo 2 > /third; echo ready; exec sleep 100")
		sh.waitFor("ready")
		if out := p.run("diff", "work"); out != "C /etc\nD /etc/group\nA /first\nA /second\nA /third\n" {
			t.Errorf("diff while the shell runs: %q", out)
		}
		p.run("commit", "work", "shell:2")
		if _, errs, status := p.try("rm", "-f", "work"); status != 4 || !strings.Contains(errs, "is in a shell") {
			t.Errorf("rm -f while the shell runs: status %d, %s", status, errs)
		}
		if _, errs, status := p.try("shell", "work", "true"); status != 125 || !strings.Contains(errs, "is in a shell") {
			t.Errorf("a second shell: status %d, %s", status, errs)
		}
		if err := sh.cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Error(err)
		}
		if status := sh.wait(); status != 128+15 {
			t.Errorf("status %d after SIGTERM", status)
		}
		p.run("rm", "work")
		if out := p.run("shell", "-q", "--rm", "shell:2", "sh", "-c", "cat /first /second /third; test -e /etc/group || echo gone"); out != "1\n1\n2\ngone\n" {
			t.Errorf("the new image: %q", out)
		}
	})
}

// runningShell is a `plyfs shell` in the background.
type runningShell struct {
	t   testing.TB
	cmd *exec.Cmd
	out chan string
	end chan error
}

// startShell starts `plyfs shell -q ARGS` and reads its output.
func startShell(t testing.TB, p *person, args ...string) *runningShell {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	s := &runningShell{t: t, out: make(chan string, 100), end: make(chan error, 1)}
	s.cmd = p.cmd(ctx, p.bin, slices.Concat([]string{"shell"}, p.opts, []string{"-q"}, args)...)
	pipe, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	s.cmd.Stderr = &errs
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := pipe.Read(buf)
			if n > 0 {
				s.out <- string(buf[:n])
			}
			if err != nil {
				close(s.out)
				s.end <- s.cmd.Wait()
				cancel()
				return
			}
		}
	}()
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill() // it has ended, unless the test has failed
		if t.Failed() {
			t.Logf("plyfs shell %q: %s", args, &errs)
		}
	})
	return s
}

// waitFor reads output up to a text.
func (s *runningShell) waitFor(text string) string {
	s.t.Helper()
	var all strings.Builder
	deadline := time.After(30 * time.Second)
	for !strings.Contains(all.String(), text) {
		select {
		case part, ok := <-s.out:
			if !ok {
				s.t.Fatalf("the shell has ended after %q, before %q", all.String(), text)
			}
			all.WriteString(part)
		case <-deadline:
			s.t.Fatalf("%q has not come, but %q", text, all.String())
		}
	}
	return all.String()
}

// wait returns the status at the end.
func (s *runningShell) wait() int {
	s.t.Helper()
	select {
	case <-s.end:
	case <-time.After(30 * time.Second):
		s.t.Fatal("the shell does not end")
	}
	ws, ok := s.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return s.cmd.ProcessState.ExitCode()
}

// processes finds what belongs to the shells of a person, by the verb.
func (p *person) processes() map[string]int {
	found := map[string]int{}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		p.t.Fatal(err)
	}
	for _, dir := range dirs {
		line, err := os.ReadFile(dir + "/cmdline")
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(string(line), "\x00")
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || len(args) < 2 || args[0] != "plyfs" || !p.owns(dir) {
			continue
		}
		found[args[1]] = pid
	}
	return found
}

// owns reports whether a process works for the store of a person: its environment
// or its arguments say so; of init, those of its parent.
func (p *person) owns(procDir string) bool {
	for _, name := range []string{"/environ", "/cmdline"} {
		if b, err := os.ReadFile(procDir + name); err == nil && bytes.Contains(b, []byte(p.dir+"/")) {
			return true
		}
	}
	b, err := os.ReadFile(procDir + "/stat")
	if err != nil {
		return false
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	parent := "/proc/" + f[1]
	line, err := os.ReadFile(parent + "/cmdline")
	return err == nil && bytes.HasPrefix(line, []byte("plyfs\x00shell-keeper")) && p.owns(parent)
}

// waitNone waits until nothing of a person runs.
func (p *person) waitNone() {
	p.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		left := p.processes()
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("still there: %v", left)
		}
		<-time.After(wait)
	}
}

// exists reports whether a file is there.
func exists(name string) bool {
	_, err := os.Lstat(name)
	return !errors.Is(err, fs.ErrNotExist)
}
