package integration

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/harness"
)

// runTool runs a program in the root of the module and returns what it prints.
func runTool(t *testing.T, env []string, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = ".."
	cmd.Env = append(append(os.Environ(), "MAKEFLAGS="), env...) // make test may be what runs us
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func mustRun(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := runTool(t, nil, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// needTool skips where a program is not installed.
func needTool(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		harness.Skip(t, "needs %s", name)
	}
}

// installed lists what is below dir: regular files with their mode, links with
// their target.
func installed(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		what := st.Mode().String()
		if st.Mode()&fs.ModeSymlink != 0 {
			if what, err = os.Readlink(p); err != nil {
				return err
			}
		}
		found[strings.TrimPrefix(p, dir)] = what
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// packaged are files that make install puts below PREFIX, beside the pages of
// the commands.
var packaged = map[string]string{
	"/bin/plyfs":                                    "-rwxr-xr-x",
	"/sbin/mount.plyfs":                             "../bin/plyfs",
	"/sbin/mount.fuse.plyfs":                        "../bin/plyfs",
	"/lib/systemd/system/plyfs.service":             "-rw-r--r--",
	"/lib/systemd/system/plyfs-snapshotter.service": "-rw-r--r--",
	"/lib/systemd/system/plyfs-restore.service":     "-rw-r--r--",
	"/lib/systemd/system/plyfs.socket":              "-rw-r--r--",
	"/lib/systemd/user/plyfs.service":               "-rw-r--r--",
	"/share/bash-completion/completions/plyfs":      "-rw-r--r--",
	"/share/zsh/site-functions/_plyfs":              "-rw-r--r--",
	"/share/fish/vendor_completions.d/plyfs.fish":   "-rw-r--r--",
	"/share/man/man1/plyfs.1":                       "-rw-r--r--",
	"/share/man/man8/mount.plyfs.8":                 "-rw-r--r--",
	"/share/man/man8/mount.fuse.plyfs.8":            "mount.plyfs.8",
	"/share/doc/plyfs/README.md":                    "-rw-r--r--",
	"/share/doc/plyfs/docs/fuse-overlayfs.md":       "-rw-r--r--",
	"/share/doc/plyfs/examples/storage.conf":        "-rw-r--r--",
	"/share/doc/plyfs/examples/storage-user.conf":   "-rw-r--r--",
	"/share/doc/plyfs/examples/docker-daemon.json":  "-rw-r--r--",
	"/share/doc/plyfs/examples/containerd.toml":     "-rw-r--r--",
}

// makeInstalled runs make install and returns DESTDIR and PREFIX in it.
func makeInstalled(t *testing.T, args ...string) (dest, prefix string) {
	t.Helper()
	needTool(t, "make")
	dest = t.TempDir()
	args = append([]string{"install", "OUT=" + t.TempDir(), "DESTDIR=" + dest, "PREFIX=/usr"}, args...)
	mustRun(t, "make", args...)
	return dest, dest + "/usr"
}

func TestInstall(t *testing.T) {
	dest, prefix := makeInstalled(t)
	found := installed(t, prefix)
	for name, want := range packaged {
		if found[name] != want {
			t.Errorf("%s is %q, not %q", name, found[name], want)
		}
	}
	if found["/bin/fuse-overlayfs"] != "" {
		t.Error("/bin/fuse-overlayfs is another package's, and nobody has asked for it")
	}
	for name := range found {
		if strings.Contains(name, "/man/") || strings.HasPrefix(name, "/bin/") {
			continue
		}
		if text, err := os.ReadFile(prefix + name); err != nil || regexp.MustCompile(`@[A-Z]+DIR@`).Match(text) {
			t.Errorf("%s: a variable was not filled in (%v)", name, err)
		}
	}
	for _, name := range []string{"storage.conf", "storage-user.conf"} {
		text, err := os.ReadFile(prefix + "/share/doc/plyfs/examples/" + name)
		if want := "\nmount_program = \"/usr/bin/plyfs\"\n"; err != nil || !strings.Contains(string(text), want) {
			t.Errorf("%s: no line %q (%v)", name, want, err)
		}
	}
	t.Run("commands have pages", func(t *testing.T) {
		bin := prefix + "/bin/plyfs"
		out, err := exec.Command(bin, "__complete", "").Output()
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for line := range strings.Lines(string(out)) {
			name, _, described := strings.Cut(line, "\t")
			if !described || name == "help" {
				continue
			}
			n++
			if found["/share/man/man1/plyfs-"+name+".1"] == "" {
				t.Errorf("no manual page of plyfs %s", name)
			}
		}
		if n < 20 {
			t.Errorf("%d commands found only: nothing was checked", n)
		}
	})
	t.Run("manual", func(t *testing.T) { checkManual(t, prefix+"/share/man") })
	t.Run("completions", func(t *testing.T) { checkCompletions(t, prefix+"/share") })
	t.Run("units", func(t *testing.T) { checkUnits(t, prefix) })

	mustRun(t, "make", "uninstall", "DESTDIR="+dest, "PREFIX=/usr")
	if left := installed(t, dest); len(left) > 0 {
		t.Errorf("make uninstall has left %v", left)
	}
	if _, err := os.Stat(prefix + "/share/doc/plyfs"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("make uninstall has left a directory of ours: %v", err)
	}
}

// TestInstallBeside: a fuse-overlayfs of others is neither replaced nor removed.
func TestInstallBeside(t *testing.T) {
	dest, prefix := makeInstalled(t, "FUSE_OVERLAYFS=1", "SBINDIR=/sbin")
	for name, want := range map[string]string{"/usr/bin/fuse-overlayfs": "plyfs", "/sbin/mount.plyfs": "/usr/bin/plyfs"} {
		if got, err := os.Readlink(dest + name); got != want {
			t.Errorf("%s leads to %q, not %q (%v)", name, got, want, err)
		}
	}
	theirs := prefix + "/bin/fuse-overlayfs"
	if err := errors.Join(os.Remove(theirs), os.WriteFile(theirs, []byte("theirs"), 0o755)); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	env := []string{"OUT=" + out, "DESTDIR=" + dest, "PREFIX=/usr", "SBINDIR=/sbin", "FUSE_OVERLAYFS=1"}
	for _, c := range []struct{ verb, says string }{
		{"install", "make build man"}, // nothing is built in OUT
		{"uninstall", ""},
	} {
		got, err := runTool(t, env, "cmd/plyfs/dist/install", c.verb)
		if (err != nil) != (c.says != "") || !strings.Contains(got, c.says) {
			t.Errorf("%s: %v, it says %q, not %q", c.verb, err, got, c.says)
		}
	}
	if err := errors.Join(os.Mkdir(out+"/share", 0o755), os.WriteFile(out+"/plyfs", nil, 0o755)); err != nil {
		t.Fatal(err)
	}
	if got, err := runTool(t, env, "cmd/plyfs/dist/install", "install"); err == nil || !strings.Contains(got, "not ours") {
		t.Errorf("install over a file of others: %v %q", err, got)
	}
	if b, err := os.ReadFile(theirs); string(b) != "theirs" {
		t.Errorf("the other fuse-overlayfs is now %q (%v)", b, err)
	}
}

func checkManual(t *testing.T, dir string) {
	pages, err := filepath.Glob(dir + "/man?/*.?")
	if err != nil || len(pages) < 20 {
		t.Fatalf("%d pages (%v)", len(pages), err)
	}
	needTool(t, "groff")
	for _, p := range pages {
		// Of an ASCII terminal every character must be one that it has.
		for _, device := range []string{"-Tascii", "-Tutf8"} {
			cmd := exec.Command("groff", "-mandoc", "-ww", device, p)
			var warnings bytes.Buffer
			cmd.Stderr = &warnings
			text, err := cmd.Output()
			if err != nil || warnings.Len() > 0 || len(text) < 500 {
				t.Errorf("groff %s %s: %v, %d bytes\n%s", device, filepath.Base(p), err, len(text), &warnings)
			}
		}
	}
	needTool(t, "mandoc")
	if out, err := runTool(t, nil, "mandoc", append([]string{"-T", "lint", "-W", "warning"}, pages...)...); err != nil {
		t.Errorf("mandoc: %v\n%s", err, out)
	}
}

func checkCompletions(t *testing.T, share string) {
	for shell, file := range map[string]string{
		"bash": "bash-completion/completions/plyfs",
		"zsh":  "zsh/site-functions/_plyfs",
		"fish": "fish/vendor_completions.d/plyfs.fish",
	} {
		t.Run(shell, func(t *testing.T) {
			needTool(t, shell)
			mustRun(t, shell, "-n", filepath.Join(share, file))
		})
	}
}

// hidingOptions are those of systemd.exec(5) that give a unit a mount
// namespace: what is mounted in it nobody else sees.
var hidingOptions = regexp.MustCompile(`(?m)^(Private(Tmp|Devices|Mounts|Users|Network)|Protect\w+|Read(Only|Write)Paths|InaccessiblePaths|` +
	`ExecPaths|NoExecPaths|TemporaryFileSystem|Bind(ReadOnly)?Paths|Root\w+|MountFlags|MountAPIVFS|DynamicUser|` +
	`(State|Cache|Logs|Runtime)Directory|LoadCredential\w*)=`)

func checkUnits(t *testing.T, prefix string) {
	for _, name := range []string{"system/plyfs.service", "system/plyfs-snapshotter.service", "system/plyfs-restore.service", "user/plyfs.service"} {
		kind, file := filepath.Split(name)
		kind = strings.TrimSuffix(kind, "/")
		text, err := os.ReadFile(filepath.Join(prefix, "lib/systemd", name))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), "\nKillMode=process\n") {
			t.Errorf("%s: without KillMode=process systemd ends the mounts with the daemon", name)
		}
		if bad := hidingOptions.Find(text); bad != nil {
			t.Errorf("%s: %s makes a mount namespace", name, bad)
		}
		if strings.Contains(string(text), "\nNoNewPrivileges=") {
			t.Errorf("%s: with NoNewPrivileges= fusermount3 cannot mount for a user", name)
		}
		t.Run(name, func(t *testing.T) {
			needTool(t, "systemd-analyze")
			// It looks for the program where the unit says that it is.
			unit := filepath.Join(t.TempDir(), file)
			text := strings.ReplaceAll(string(text), "/usr/bin/plyfs", prefix+"/bin/plyfs")
			if err := os.WriteFile(unit, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			out, err := runTool(t, []string{"XDG_RUNTIME_DIR=" + t.TempDir()}, "systemd-analyze", "verify", "--man=no", "--"+kind, unit)
			if err != nil || strings.Contains(out, file) {
				t.Errorf("systemd-analyze: %v\n%s", err, out)
			}
		})
	}
}

func TestDebVersion(t *testing.T) {
	needTool(t, "dpkg")
	const day = "SOURCE_DATE_EPOCH=1767312000" // 2026-01-02
	var versions []string
	for _, c := range []struct{ git, want string }{ // in the order that dpkg must see
		{"abcdef0", "0~20260102.abcdef0"},
		{"abcdef0-dirty", "0~20260102.abcdef0+dirty"},
		{"v0.9.0-rc.1", "0.9.0~rc.1"},
		{"v0.9.0-rc.1-2-gabcdef0", "0.9.0~rc.1+2.gabcdef0"},
		{"v0.9.0", "0.9.0"},
		{"v0.9.0-4-gabcdef0-dirty", "0.9.0+4.gabcdef0+dirty"},
		{"v0.9.0-12-gabcdef0", "0.9.0+12.gabcdef0"},
		{"v0.10.0", "0.10.0"},
	} {
		out, err := runTool(t, []string{day, "VERSION=" + c.git}, "cmd/plyfs/dist/deb", "version")
		got := strings.TrimSuffix(out, "\n")
		if err != nil || got != c.want {
			t.Errorf("%s becomes %q, not %q (%v)", c.git, got, c.want, err)
		}
		mustRun(t, "dpkg", "--validate-version", got)
		versions = append(versions, got)
	}
	for i := range versions[1:] {
		mustRun(t, "dpkg", "--compare-versions", versions[i], "lt", versions[i+1])
	}
}

// unreachable is what the go command says without a way to the module proxy.
var unreachable = regexp.MustCompile(`dial tcp|no such host|i/o timeout|TLS handshake|connection refused|GOPROXY=off|proxyconnect|403 Forbidden|5\d\d [A-Z]`)

// makeDeb makes the package in a fresh directory.
func makeDeb(t *testing.T) string {
	t.Helper()
	needTool(t, "make")
	needTool(t, "dpkg-deb")
	dir := t.TempDir()
	if out, err := runTool(t, nil, "make", "deb", "OUT="+dir); err != nil {
		if unreachable.MatchString(out) {
			harness.Skip(t, "cannot fetch nfpm from the Go module proxy")
		}
		t.Fatalf("make deb: %v\n%s", err, out)
	}
	debs, err := filepath.Glob(dir + "/plyfs_*.deb")
	if err != nil || len(debs) != 1 {
		t.Fatalf("make deb has made %v (%v)", debs, err)
	}
	return debs[0]
}

func TestDeb(t *testing.T) {
	deb := makeDeb(t)
	t.Run("fields", func(t *testing.T) {
		for field, want := range map[string]string{
			"Package": "plyfs", "Depends": "fuse3", "Recommends": "uidmap", "Provides": "", "Conflicts": "",
		} {
			if got := strings.TrimSpace(mustRun(t, "dpkg-deb", "-f", deb, field)); got != want {
				t.Errorf("%s: %q, not %q", field, got, want)
			}
		}
	})
	t.Run("contents", func(t *testing.T) {
		list := strings.Split(mustRun(t, "dpkg-deb", "-c", deb), "\n")
		want := []string{"./usr/share/zsh/vendor-completions/_plyfs"}
		for name := range packaged {
			switch {
			case strings.HasPrefix(name, "/share/man/"):
				name += ".gz"
			case strings.HasPrefix(name, "/share/zsh/"):
				continue
			}
			want = append(want, "./usr"+name)
		}
		for _, name := range want {
			if !slices.ContainsFunc(list, func(l string) bool { f := strings.Fields(l); return len(f) > 5 && f[5] == name }) {
				t.Errorf("%s is not in the package", name)
			}
		}
		for _, l := range list {
			if l != "" && !strings.Contains(l, " root/root ") || strings.Contains(l, "bin/fuse-overlayfs") {
				t.Errorf("in the package: %s", l)
			}
		}
	})
	t.Run("reproducible", func(t *testing.T) {
		a, errA := os.ReadFile(deb)
		b, errB := os.ReadFile(makeDeb(t))
		if errA != nil || errB != nil || !bytes.Equal(a, b) {
			t.Errorf("two builds differ (%v, %v)", errA, errB)
		}
	})
	t.Run("install and remove", func(t *testing.T) {
		harness.NeedRoot(t)
		root := t.TempDir()
		for _, d := range []string{"info", "updates"} {
			if err := os.MkdirAll(filepath.Join(root, "var/lib/dpkg", d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(root, "var/lib/dpkg/status"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		dpkg := func(args ...string) string {
			// There is no shell below root for the script.
			return mustRun(t, "dpkg", append([]string{"--root=" + root, "--force-depends", "--force-script-chrootless"}, args...)...)
		}
		dpkg("--install", deb)
		if out := mustRun(t, root+"/usr/bin/plyfs", "--version"); !strings.HasPrefix(out, "plyfs ") {
			t.Errorf("the installed binary says %q", out)
		}
		dpkg("--remove", "plyfs")
		if _, err := os.Stat(root + "/usr/bin/plyfs"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("still there after dpkg --remove: %v", err)
		}
	})
}
