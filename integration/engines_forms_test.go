package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/engine"
	"github.com/plyfs/plyfs/integration/harness"
)

// formsScript makes the directories that the forms mount.
const formsScript = `set -eu
mkdir -p lower2 lower1/dir upper work merged "a:b" "c,d" src
echo one > lower1/file; echo two > lower2/file; echo below > lower1/dir/below; echo colon > "a:b/colon"; echo comma > "c,d/comma"
`

// use changes something in a mount, and shows that it is one.
const use = `set -eu
cat merged/file; cat merged/dir/below; echo new > merged/new; rm merged/dir/below; ls merged/dir; cat upper/new
`

// TestForms mounts in the ways in which scripts do. Each starts with the same
// directories, relative to where the script runs, and ends with nothing mounted.
func TestForms(t *testing.T) {
	harness.NeedKernelOverlay(t)
	eachForm(t, []form{
		{name: "plain", script: `fuse-overlayfs -o lowerdir=lower2:lower1,upperdir=upper,workdir=work merged`},
		{name: "source", script: `fuse-overlayfs -o lowerdir=lower2:lower1,upperdir=upper,workdir=work overlay merged`},
		{name: "options last", script: `fuse-overlayfs merged -o lowerdir=lower2:lower1,upperdir=upper,workdir=work`},
		{name: "joined", script: `fuse-overlayfs -olowerdir=lower2:lower1 -oupperdir=upper -o workdir=work merged`},
		{name: "engine", script: `fuse-overlayfs -o lowerdir=lower2:lower1,upperdir=upper,workdir=work,,volatile,private, merged`},
		{name: "own name", script: `plyfs -o lowerdir=lower2:lower1,upperdir=upper,workdir=work, merged`},
		{name: "unknown words", script: `fuse-overlayfs -o lowerdir=lower2:lower1,upperdir=upper,workdir=work,metacopy=on,index=off,lazytime,whatever=1 --strange merged`},
		{name: "label", script: `fuse-overlayfs -o 'lowerdir=lower2:lower1,upperdir=upper,workdir=work,context="system_u:object_r:container_file_t:s0:c1,c2"' merged`},
		{name: "foreground", script: `fuse-overlayfs -f -o lowerdir=lower2:lower1,upperdir=upper,workdir=work merged > log 2>&1 &
for i in $(seq 100); do mountpoint -q merged && break; sleep 0.1; done`},
		{name: "umount", root: true, end: "umount merged", script: `fuse-overlayfs -o lowerdir=lower2:lower1,upperdir=upper,workdir=work merged`},
		{name: "lazy umount", root: true, end: "umount -l merged", script: `fuse-overlayfs -o lowerdir=lower2:lower1,upperdir=upper,workdir=work merged`},
		{name: "mount -t fuse.fuse-overlayfs", root: true, script: `mount -t fuse.fuse-overlayfs overlay merged -o lowerdir=$PWD/lower2:$PWD/lower1,upperdir=$PWD/upper,workdir=$PWD/work`},
		{name: "mount -t fuse.plyfs", root: true, script: `mount -t fuse.plyfs plyfs merged -o lowerdir=lower2:lower1,upperdir=upper,workdir=work`},
		{name: "mount -t plyfs", root: true, script: `mount -t plyfs none merged -o lowerdir=lower2:lower1,upperdir=upper,workdir=work`},
		{name: "fstab", root: true, end: "umount -T fstab merged || umount merged", script: `echo "none $PWD/merged plyfs lowerdir=$PWD/lower2:$PWD/lower1,upperdir=$PWD/upper,workdir=$PWD/work,noauto,nofail,x-systemd.automount 0 0" > fstab; mount -T fstab merged`},
		{name: "fstab fuse", root: true, script: `echo "overlay $PWD/merged fuse.plyfs defaults,_netdev,lowerdir=$PWD/lower2:$PWD/lower1,upperdir=$PWD/upper,workdir=$PWD/work 0 0" > fstab; mount -T fstab -a`},
		{name: "fstab fuse-overlayfs", root: true, script: `echo "fuse-overlayfs#overlay $PWD/merged fuse nofail,lowerdir=$PWD/lower2:$PWD/lower1,upperdir=$PWD/upper,workdir=$PWD/work 0 0" > fstab; mount -T fstab -a`},
		{name: "mount.fuse3 type in the source", script: `mount.fuse3 plyfs#none merged -o lowerdir=lower2:lower1,upperdir=upper,workdir=work`},
		{name: "mount.fuse3 no source", script: `mount.fuse3 plyfs# merged -o lowerdir=lower2:lower1,upperdir=upper,workdir=work`},
		{name: "mount.fuse3 type", script: `mount.fuse3 src merged -o lowerdir=lower2:lower1 -o upperdir=upper,workdir=work -t plyfs`},
		{name: "mount.fuse3 as containerd calls it", script: `mount.fuse3 overlay $PWD/merged -o workdir=$PWD/work -o upperdir=$PWD/upper -o lowerdir=$PWD/lower2:$PWD/lower1 -t fuse-overlayfs`},
		{
			name: "SIGTERM", script: `fuse-overlayfs -o lowerdir=lower2:lower1,upperdir=upper,workdir=work merged`,
			end: `for p in /proc/[0-9]*; do
if tr '\0' ' ' < $p/cmdline 2>/dev/null | grep -q "mount-holder $PWD/merged"; then kill ${p#/proc/} 2>/dev/null || :; fi; done`, // the spare one ends with the first
		},
		{name: "SIGTERM in the foreground", script: `fuse-overlayfs -f -o lowerdir=lower2:lower1,upperdir=upper,workdir=work merged > log 2>&1 & p=$!
for i in $(seq 100); do mountpoint -q merged && break; sleep 0.1; done`, end: `kill $p; wait $p`},
	})
}

type form struct {
	name   string
	script string // mounts
	end    string // unmounts; fusermount3 -u
	root   bool   // root only
}

func eachForm(t *testing.T, forms []form) {
	t.Helper()
	for _, who := range []string{"root", "user"} {
		t.Run(who, func(t *testing.T) {
			t.Parallel()
			engine.Need(t, "fusermount3", "mount.fuse3", "mountpoint")
			harness.NeedRoot(t)
			drop, own := program(t, "fuse-overlayfs"), program(t, "plyfs")
			o := engine.Options{
				Sbin: map[string]string{"mount.plyfs": own, "mount.fuse.plyfs": own},
				// mount.fuse finds its programs in the usual directories, whatever PATH is.
				Local: map[string]string{"plyfs": own, "fuse-overlayfs": drop},
			}
			p := enginePlace(t, o)
			w := p.Root
			if who == "user" {
				if why := p.NeedUser(); why != "" {
					harness.Skip(t, "%s", why)
				}
				w = p.User
			}
			for i, f := range forms {
				if f.root && who == "user" {
					continue
				}
				t.Run(f.name, func(t *testing.T) { tryForm(t, w, i, f) })
			}
		})
	}
}

// TestFormsFstabUser: a user may mount and unmount what fstab says.
func TestFormsFstabUser(t *testing.T) {
	engine.Need(t, "fusermount3", "mount.fuse3")
	harness.NeedRoot(t)
	harness.NeedKernelOverlay(t)
	own := program(t, "plyfs")
	p := enginePlace(t, engine.Options{
		Sbin: map[string]string{"mount.plyfs": own}, Local: map[string]string{"plyfs": own},
	})
	if why := p.NeedUser(); why != "" {
		harness.Skip(t, "%s", why)
	}
	p.User.Run(t, "sh", "-c", formsScript)
	for _, kind := range []string{"plyfs", "fuse.plyfs"} {
		line := fmt.Sprintf("none %[1]s/merged %[2]s user,noauto,lowerdir=%[1]s/lower2:%[1]s/lower1,upperdir=%[1]s/upper,workdir=%[1]s/work 0 0\n", p.User.Home, kind)
		p.Root.Feed(t, line, "sh", "-c", "cat > /etc/fstab") // that of the place
		got := p.User.Run(t, "sh", "-c", `set -eu; mount "$HOME/merged"; cat merged/file; echo x > merged/new; fusermount3 -u merged; cat upper/new; ls merged`)
		sameText(t, kind, "two\nx\n", got)
	}
}

func tryForm(t *testing.T, w engine.Person, i int, f form) {
	if f.end == "" {
		f.end = "fusermount3 -u merged"
	}
	dir := fmt.Sprintf("form%d", i)
	script := "set -eu; mkdir " + dir + "; cd " + dir + "\n" + formsScript + f.script + "\n" + use + f.end + `
for i in $(seq 100); do mountpoint -q merged || break; sleep 0.1; done
ls -A merged; cat upper/new; find work -type f`
	start := time.Now()
	got := w.Run(t, "sh", "-c", script)
	sameText(t, "output", "two\nbelow\nnew\nnew\n", got)
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("took %s", took)
	}
	for _, m := range w.Place().Mounts() {
		t.Errorf("still mounted: %s", m)
	}
	if err := errors.Join(os.RemoveAll(filepath.Join(w.Home, dir))); err != nil {
		t.Error(err)
	}
}

// TestFormsPaths mounts layers with names that need care, and many of them.
func TestFormsPaths(t *testing.T) {
	eachCaller(t, func(t *testing.T, w engine.Person) {
		w.Run(t, "sh", "-c", formsScript)
		const lines = `set -eu
fuse-overlayfs -o 'lowerdir=a\:b:c\,d:lower1' merged; cat merged/colon merged/comma merged/file; fusermount3 -u merged
printf '%s\n' 'lowerdir+=lower2' 'lowerdir+=c,d' 'lowerdir+=a:b' '# a comment' '' > "options,file"
fuse-overlayfs -o '@options\,file' merged; cat merged/colon merged/comma merged/file; fusermount3 -u merged
fuse-overlayfs -o 'lowerdir=a\\:b:lower1' merged; cat merged/colon; fusermount3 -u merged
ln -s lower1 linked; fuse-overlayfs -o lowerdir=linked/../lower2:linked merged; cat merged/file; fusermount3 -u merged
mkdir "with space"; fuse-overlayfs -o lowerdir=lower1 "with space"; cat "with space/file"; fusermount3 -u "with space"
mkdir many; for i in $(seq 400); do mkdir many/$i; echo $i > many/$i/file; echo "lowerdir+=many/$i"; done > list
fuse-overlayfs -o @list,upperdir=upper,workdir=work merged; cat merged/file; fusermount3 -u merged
cd many; fuse-overlayfs -o "lowerdir=$(seq -s : 400)" ../merged; cat ../merged/file; fusermount3 -u ../merged`
		sameText(t, "paths", "colon\ncomma\none\ncolon\ncomma\ntwo\ncolon\ntwo\none\n1\n1\n", w.Run(t, "sh", "-c", lines))
	})
}

// TestFormsErrors: exit code 1, the reason on standard error, nothing on standard output,
// nothing mounted; 1 or 32 from a helper of mount(8).
func TestFormsErrors(t *testing.T) {
	eachCaller(t, func(t *testing.T, w engine.Person) {
		w.Run(t, "sh", "-c", formsScript)
		for _, c := range []struct {
			args string
			says string
		}{
			{"fuse-overlayfs -o lowerdir=nowhere merged", `"nowhere": no such file or directory`},
			{"fuse-overlayfs -o lowerdir=lower1 nowhere", `"nowhere": no such file or directory`},
			{"fuse-overlayfs -o lowerdir=lower1/file merged", "not a directory"},
			{"fuse-overlayfs merged", "lowerdir"},
			{"fuse-overlayfs -o lowerdir=lower1", "no mount point"},
			{"fuse-overlayfs -o lowerdir=lower1,upperdir=upper merged", "workdir"},
			{"fuse-overlayfs -o lowerdir=lower1,upperdir=upper,workdir=/proc merged", "workdir"},
			{"fuse-overlayfs -o lowerdir=lower1,uidmapping=0:1 merged", "uidmapping"},
			{"plyfs -o lowerdir=nowhere merged", `"nowhere": no such file or directory`},
			{"mount.fuse3 plyfs#x merged -o lowerdir=nowhere", `"nowhere": no such file or directory`},
		} {
			args := strings.Fields(c.args)
			code := 1
			if args[0] == "mount.fuse3" {
				code = 32
			}
			if says := w.Fail(t, code, args...); !strings.Contains(says, c.says) {
				t.Errorf("%s says %q, without %q", c.args, says, c.says)
			}
		}
		if w.UID == 0 {
			// A directory that another mount covers has the path of the workdir, too.
			w.Run(t, "sh", "-c", "mkdir -p covered/work && mount -t tmpfs none covered && mkdir covered/work")
			if says := w.Fail(t, 1, "fuse-overlayfs", "-o", "lowerdir=lower1,upperdir=upper,workdir=covered/work", "merged"); !strings.Contains(says, "not on the file system") {
				t.Errorf("a workdir on another file system: %q", says)
			}
			w.Run(t, "sh", "-c", "umount covered && rmdir covered/work covered")
		}
		if got := w.Run(t, "fuse-overlayfs", "--version"); !strings.Contains(got, "fuse-overlayfs: version 1.") {
			t.Errorf("--version says %q", got)
		}
	})
}

// TestFormsParallel mounts and unmounts 128 unions at once.
func TestFormsParallel(t *testing.T) {
	eachCaller(t, func(t *testing.T, w engine.Person) {
		w.Run(t, "sh", "-c", formsScript+`for i in $(seq 128); do mkdir $i $i/u $i/w $i/m; done`)
		var all sync.WaitGroup
		for i := range 128 {
			all.Go(func() {
				script := fmt.Sprintf(`set -eu; cd %d
fuse-overlayfs -o lowerdir=../lower2:../lower1,upperdir=u,workdir=w m
cat m/file; echo %[1]d > m/dir/new; mv m/file m/moved; fusermount3 -u m; cat u/dir/new u/moved; ls m`, i+1)
				res := w.Do("", "sh", "-c", script)
				if want := fmt.Sprintf("two\n%d\ntwo\n", i+1); res.Stdout != want || res.Code != 0 || res.Held || res.Err != "" {
					t.Errorf("mount %d: %+v", i+1, res)
				}
			})
		}
		all.Wait()
	})
}

// eachCaller runs a test as root and as a user who find the names of the binary in PATH.
func eachCaller(t *testing.T, test func(t *testing.T, w engine.Person)) {
	t.Helper()
	people(t, (*engine.Place).NeedUser, func(t *testing.T, w engine.Person) {
		engine.Need(t, "fusermount3")
		bin := filepath.Dir(program(t, "fuse-overlayfs")) + ":" + filepath.Dir(program(t, "plyfs"))
		test(t, w.With(map[string]string{"PATH": bin + ":" + os.Getenv("PATH") + ":/usr/sbin:/sbin"}))
	})
}
