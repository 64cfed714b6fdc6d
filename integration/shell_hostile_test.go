package integration

import (
	"context"
	"crypto/sha256"
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/oracle"
)

// TestShellHostile runs images that are made to reach what is not theirs. What
// they may not reach has a secret in it; what they may not change is compared.
func TestShellHostile(t *testing.T) {
	as(t, func(t *testing.T, p *person) {
		const secret = "secret of the machine"
		outside := p.path("outside")
		if err := errors.Join(os.Mkdir(outside, 0o755), os.WriteFile(outside+"/secret", []byte(secret+"\nevil:x:0:0::/:/bin/sh\n"), 0o644),
			os.Chown(outside, p.uid, p.gid), os.Chown(outside+"/secret", p.uid, p.gid)); err != nil {
			t.Fatal(err)
		}
		up := strings.Repeat("../", 30)
		link := func(path, target string) oracle.Entry {
			return oracle.Entry{Path: oracle.Name(path), Kind: oracle.Symlink, Target: oracle.Name(target)}
		}
		file := func(path, text string) oracle.Entry {
			return oracle.Entry{Path: oracle.Name(path), Kind: oracle.File, Text: text}
		}
		etc := oracle.Entry{Path: "etc", Kind: oracle.Dir}
		for name, c := range map[string]struct {
			config map[string]any
			tree   []oracle.Entry
			args   []string // default: true
			want   string
			stderr string
			status int
		}{
			"proc is a link":      {tree: []oracle.Entry{link("proc", "/etc")}, status: 125, stderr: "/proc of the image is no directory"},
			"proc is a link up":   {tree: []oracle.Entry{link("proc", up+outside)}, status: 125, stderr: "/proc of the image is no directory"},
			"proc is a file":      {tree: []oracle.Entry{file("proc", "x")}, status: 125, stderr: "/proc of the image is no directory"},
			"sys is a link":       {tree: []oracle.Entry{link("sys", "tmp")}, status: 125, stderr: "/sys of the image is no directory"},
			"dev is a link":       {tree: []oracle.Entry{link("dev", outside)}, status: 125, stderr: "/dev of the image is no directory"},
			"dev is a fifo":       {tree: []oracle.Entry{{Path: "dev", Kind: oracle.Fifo}}, status: 125, stderr: "/dev of the image is no directory"},
			"etc is a link out":   {tree: []oracle.Entry{link("etc", up+outside)}, stderr: "no directory /etc"},
			"etc leads to /":      {tree: []oracle.Entry{link("etc", up)}, args: []string{"cat", "/hosts"}, want: "127.0."},
			"etc and a user":      {tree: []oracle.Entry{link("etc", up+outside)}, args: []string{"-u", "evil", "true"}, status: 125, stderr: "no such user"},
			"passwd is a fifo":    {tree: []oracle.Entry{etc, {Path: "etc/passwd", Kind: oracle.Fifo}}, status: 125, stderr: "not a regular file"},
			"passwd is huge":      {tree: []oracle.Entry{etc, {Path: "etc/passwd", Kind: oracle.File, Size: 9 << 20}}, status: 125, stderr: "more than the"},
			"passwd is a link":    {tree: []oracle.Entry{etc, link("etc/passwd", outside+"/secret")}, args: []string{"-u", "evil", "true"}, status: 125, stderr: "no such user"},
			"passwd is magic":     {tree: []oracle.Entry{etc, link("etc/passwd", "/proc/self/root"+outside+"/secret")}, args: []string{"-u", "evil", "true"}, status: 125, stderr: "no such user"},
			"group is a link":     {tree: []oracle.Entry{etc, link("etc/group", up+outside+"/secret")}, args: []string{"-u", "0:evil", "true"}, status: 125, stderr: "no such group"},
			"resolv.conf":         {tree: []oracle.Entry{etc, link("etc/resolv.conf", outside+"/secret")}, args: []string{"cat", "/etc/resolv.conf"}},
			"hosts":               {tree: []oracle.Entry{etc, link("etc/hosts", up+outside+"/secret")}, args: []string{"cat", "/etc/hosts"}, want: "127.0."},
			"resolv.conf is dir":  {tree: []oracle.Entry{etc, {Path: "etc/resolv.conf", Kind: oracle.Dir}}, stderr: "/etc/resolv.conf of the image stays"},
			"directory is up":     {config: map[string]any{"WorkingDir": up + outside}, args: []string{"sh", "-c", "pwd; ls; echo x > made"}, want: outside},
			"directory is a link": {config: map[string]any{"WorkingDir": "/w/made"}, tree: []oracle.Entry{link("w", up+outside)}, status: 125, stderr: "leads nowhere"},
			"directory is magic":  {config: map[string]any{"WorkingDir": "/proc/self/fd/3"}, status: 125, stderr: "working directory"},
			"magic link":          {config: map[string]any{"WorkingDir": "/w"}, tree: []oracle.Entry{link("w", "/proc/1/root")}, status: 125, stderr: "working directory"},
			"directory is a file": {config: map[string]any{"WorkingDir": "/bin/busybox"}, status: 125, stderr: "not a directory"},
			"volume at a link":    {tree: []oracle.Entry{link("v", up+outside)}, args: []string{"-v", p.dir + ":/v/made", "true"}, status: 125, stderr: "leads nowhere"},
			"program is a link":   {config: map[string]any{"Entrypoint": []string{"/e"}}, tree: []oracle.Entry{link("e", up+outside+"/secret")}, status: 127},
			"program is ours":     {config: map[string]any{"Entrypoint": []string{"/proc/self/exe"}}, args: []string{"version"}, want: "plyfs "},
			"write to init":       {args: []string{"sh", "-c", "echo x > /proc/1/exe || echo x > /proc/1/mem || echo refused"}, want: "refused"},
			"user is nonsense":    {config: map[string]any{"User": "../../x"}, status: 125, stderr: "no such user"},
			"NUL in environment":  {config: map[string]any{"Env": []string{"A=\x00"}}, status: 125, stderr: "NUL"},
			"no program":          {config: map[string]any{"Entrypoint": []string{""}}, status: 125, stderr: "is empty"},
			"terminal":            {args: []string{"sh", "-c", "cut -d' ' -f7 /proc/self/stat"}, want: "0\n"},
		} {
			t.Run(name, func(t *testing.T) {
				q := *p
				q.t = t
				q.load(shellImage(t, c.config, c.tree...))
				args := c.args
				if args == nil {
					args = []string{"true"}
				}
				var opts []string
				if strings.HasPrefix(args[0], "-") {
					opts, args = args[:2], args[2:]
				}
				if strings.Contains(name, "passwd") && opts == nil {
					opts = []string{"-u", "app"}
				}
				out, errs, status := q.try(append(append(append([]string{"shell", "--rm"}, opts...), "shell:1"), args...)...)
				if status != c.status || !strings.Contains(out, c.want) || !strings.Contains(errs, c.stderr) {
					t.Errorf("status %d, want %d\nstdout: %q\n  want: %q\nstderr: %q\n  want: %q", status, c.status, out, c.want, errs, c.stderr)
				}
				if strings.Contains(out+errs, secret) {
					t.Errorf("the secret came out:\n%s%s", out, errs)
				}
			})
		}
		if entries, err := os.ReadDir(outside); err != nil || len(entries) != 1 {
			t.Errorf("outside of the image: %v, %v", entries, err)
		}
	})
}

// TestShellDevice opens a device of the machine by a node of the image, and one
// that root inside makes.
func TestShellDevice(t *testing.T) {
	as(t, func(t *testing.T, p *person) {
		p.load(shellImage(t, nil, oracle.Entry{Path: "null", Kind: oracle.Char, Mode: 0o666, Rdev: [2]uint32{1, 3}}))
		out := p.run("shell", "-q", "--rm", "shell:1", "sh", "-c",
			"for f in /null /made /dev/made /dev/shm/made; do test -e $f || mknod -m 666 $f c 1 3; test -c $f && echo x > $f && echo $f works; done 2>/dev/null; true")
		if out != "" {
			t.Errorf("devices: %s", out)
		}
	})
}

// TestShellSetuid looks for what a set-user-id program of an image gives to others.
func TestShellSetuid(t *testing.T) {
	as(t, func(t *testing.T, p *person) {
		p.load(shellImage(t, nil, oracle.Entry{Path: "home", Kind: oracle.Dir}))
		sum := func() [32]byte {
			b, err := os.ReadFile(p.bin)
			if err != nil {
				t.Fatal(err)
			}
			return sha256.Sum256(b)
		}
		before := sum()
		sh := startShell(t, p, "--name", "work", "shell:1", "sh", "-c",
			"cp /bin/busybox /suid && chmod 4755 /suid && ls -l /suid && echo 'echo outside' > /script && chmod 755 /script && echo ready && exec sleep 100")
		if out := sh.waitFor("ready"); !strings.HasPrefix(out, "-rwsr-xr-x") {
			t.Errorf("not set-user-id inside: %q", out)
		}
		found := p.processes()
		if found["shell-init"] == 0 || found["mount-server"] == 0 {
			t.Fatalf("processes: %v", found)
		}
		// The store and the run directory are closed to others, so that nobody finds
		// the file in the upper.
		for _, d := range []string{"store/rw", "store/layers", "run"} {
			st, err := os.Stat(p.path(d))
			if err != nil || st.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s: %v, %v", d, st.Mode(), err)
			}
		}
		// Nor is there a mount where we are.
		if table, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(table), p.dir) {
			t.Errorf("in the mount table of the machine: %v\n%s", err, table)
		}
		if os.Geteuid() == 0 && p.uid != nobody {
			// By way of the processes: only who may trace them gets there.
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			other := newPerson(t, nobody, nobody)
			for _, verb := range []string{"shell-init", "mount-server", "mount-holder", "shell-keeper"} {
				cmd := other.cmd(ctx, "ls", "/proc/"+strconv.Itoa(found[verb])+"/root/", "/proc/"+strconv.Itoa(found[verb])+"/cwd/")
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
				if out, err := cmd.CombinedOutput(); err == nil || strings.Contains(string(out), "bin") {
					t.Errorf("another user looks through %s: %s", verb, out)
				}
			}
		}
		if err := sh.cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Error(err)
		}
		sh.wait()
		p.run("rm", "work")
		if sum() != before {
			t.Error("the binary has changed")
		}
	})
}
