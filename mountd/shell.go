package mountd

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/sandbox"
)

// ShellRequest says what runs where. It travels from the command to the keeper
// of its namespaces (see package sandbox).
type ShellRequest struct {
	Root string `json:"root"` // of the store
	// Mount names image or container; its Target is chosen here.
	Mount           MountRequest           `json:"mount"`
	Process         sandbox.ProcessOptions `json:"process"`
	Hostname        string                 `json:"hostname,omitempty"` // default: the ID of the container
	Volumes         []sandbox.Volume       `json:"volumes,omitempty"`
	Caps            sandbox.Caps           `json:"caps"`
	NoNewPrivileges bool                   `json:"noNewPrivileges,omitempty"`
	// OneID takes no subordinate ids.
	OneID bool `json:"oneID,omitempty"`
	// Quiet leaves out everything but errors.
	Quiet bool `json:"quiet,omitempty"`

	Term   string        `json:"term,omitempty"`
	Window *unix.Winsize `json:"window,omitempty"`
}

// Shell runs a program in an image or container, with the caller's standard
// input, output and error, and returns its exit status. The caller's process
// makes no mount: all is in namespaces of others, which end with it.
func Shell(r ShellRequest, log *zap.Logger) (status int, err error) {
	if r.Root, err = CanonicalRoot(r.Root); err != nil {
		return sandbox.ExitOwn, err
	}
	ids := sandbox.OwnIDs()
	if r.OneID {
		ids = sandbox.SingleID()
	}
	log.Info("ids of the shell", zap.String("kind", string(ids.Kind)), zap.String("why", ids.Why))
	if ids.Kind != sandbox.HostIDs { // fusermount3 is of no use in a user namespace
		if d := devFuse(); !d.OK {
			return sandbox.ExitOwn, marked(ErrMount, fmt.Errorf("/dev/fuse: %s: %s", d.Found, d.Follows))
		}
	}
	// Inside everybody is root, whose store and run directory are elsewhere.
	env := sandbox.SetEnv(os.Environ(), RunDirEnv+"="+filepath.Dir(RunDir(r.Root)))
	var ours, theirs *os.File
	if sandbox.IsTerminal() {
		if ours, theirs, err = sandbox.TerminalPair(); err != nil {
			return sandbox.ExitOwn, err
		}
		defer ours.Close()
		r.Term, r.Window = sandbox.CallerTerminal()
	}
	sigs := make(chan os.Signal, 16)
	signal.Notify(sigs, sandbox.Forwarded...)
	defer signal.Stop(sigs)
	keeper, err := sandbox.StartKeeper(ids, r, theirs, env)
	if theirs != nil {
		_ = theirs.Close() // the keeper has it
	}
	if err != nil {
		return sandbox.ExitOwn, err
	}
	done := make(chan struct{})
	defer close(done)
	go func() { // ends with us
		for {
			select {
			case s := <-sigs:
				keeper.Signal(s)
			case <-done:
				return
			}
		}
	}()
	if ours != nil {
		err = sandbox.Proxy(ours)
	}
	return keeper.Wait(), err
}

// KeeperMain is the hidden verb [sandbox.VerbKeeper]. It returns the exit status.
func KeeperMain(args []string, o LocalOptions, tell func(string)) (status int, err error) {
	var r ShellRequest
	parent, err := sandbox.AwaitKeeper(args, &r)
	if err != nil {
		return sandbox.ExitOwn, err
	}
	note := tell
	if r.Quiet {
		note = func(string) {}
	}
	sigs := make(chan os.Signal, 16)
	signal.Notify(sigs, sandbox.Forwarded...)
	ctx, settle := interruptible(sigs, parent.Gone)
	defer settle()
	o.Bound = true
	l, err := OpenLocal(ctx, r.Root, o)
	if err != nil {
		return sandbox.ExitOwn, err
	}
	defer l.Close() // holds nothing that could be lost
	dir, err := l.shellDir()
	if err != nil {
		return sandbox.ExitOwn, err
	}
	r.Mount.Target = Path(filepath.Join(dir, "root"))
	// An image's set-user-id programs work (su, sudo, apt): nobody outside of the
	// namespaces can reach them. Its device nodes do not: there are no cgroups to
	// say which may be opened.
	r.Mount.Suid, r.Mount.Dev = true, false
	_, noContainer := l.store.Container(ctx, r.Mount.Source)
	res, err := l.Mount(ctx, r.Mount)
	if err != nil {
		return sandbox.ExitOwn, err
	}
	if noContainer != nil && res.Container != nil {
		note("container " + res.Container.Name)
	}
	settle() // from here on the command gets the signals
	status, err = l.runIn(r, res, dir, parent, sigs, note)
	return l.leave(res, status, err, note)
}

// interruptible returns a context that ends with a signal or with gone, and a
// function that ends the watch.
func interruptible(sigs <-chan os.Signal, gone <-chan struct{}) (ctx context.Context, settle func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		select {
		case s := <-sigs:
			cancel(fmt.Errorf("stopped by signal: %v", s))
		case <-gone:
			cancel(errors.New("the command has ended"))
		case <-quit:
		}
	}()
	settled := false
	return ctx, func() {
		if !settled {
			settled = true
			close(quit)
			<-done
		}
	}
}

// shellDir makes a directory that only this mount namespace has, and in it the
// mount point "root".
func (l *Local) shellDir() (string, error) {
	if err := makeRunDir(l.runDir); err != nil {
		return "", err
	}
	at := filepath.Join(l.runDir, "shell")
	if err := os.Mkdir(at, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("run directory %q: %w", at, reason(err))
	}
	if err := ownedByUs(at); err != nil {
		return "", err
	}
	if err := unix.Mount("plyfs-shell", at, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0700,size=16m"); err != nil {
		return "", fmt.Errorf("mount a directory of our own on %q: %w", at, err)
	}
	// The rows of all namespaces are in one table, by mount point.
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	dir := filepath.Join(at, hex.EncodeToString(b[:]))
	return dir, os.MkdirAll(filepath.Join(dir, "root"), 0o755)
}

// runIn runs the command in what was mounted.
func (l *Local) runIn(r ShellRequest, res MountResult, dir string, parent *sandbox.Parent, sigs <-chan os.Signal, note func(string)) (int, error) {
	ctx := context.Background() // short, and what follows must happen
	img, err := ImageOf(ctx, l, res)
	if err != nil {
		return sandbox.ExitOwn, err
	}
	p, err := sandbox.ProcessOf(img.Config, r.Process)
	if err != nil {
		return sandbox.ExitOwn, err
	}
	for _, n := range sandbox.Notes(img.Config) {
		note(n)
	}
	host := r.Hostname
	if host == "" {
		host = ShortName(res)
	}
	if err := writeHostFiles(dir, host); err != nil {
		return sandbox.ExitOwn, err
	}
	return sandbox.Run(sandbox.Spec{
		Root: string(res.Target), ReadOnly: res.ReadOnly, Files: dir, Volumes: r.Volumes, Hostname: host,
		Process: p, Caps: r.Caps, NoNewPrivileges: r.NoNewPrivileges, Term: r.Term, Window: r.Window,
	}, parent, sigs)
}

// ShortName is the first 12 digits of the ID of what was mounted, the host name
// that engines give.
func ShortName(res MountResult) string {
	id := res.ImageID.Encoded()
	if res.Container != nil {
		id = res.Container.ID
	}
	return id[:min(12, len(id))]
}

// writeHostFiles writes the files of /etc that belong to the machine.
func writeHostFiles(dir, host string) error {
	read := func(name string) []byte {
		b, _ := os.ReadFile(name) // the image's stays if there is none
		return b
	}
	hosts := read("/etc/hosts")
	if len(hosts) > 0 && hosts[len(hosts)-1] != '\n' {
		hosts = append(hosts, '\n')
	}
	for name, text := range map[string][]byte{
		"resolv.conf": read("/etc/resolv.conf"),
		"hosts":       append(hosts, "127.0.1.1\t"+host+"\n"...),
		"hostname":    []byte(host + "\n"),
	} {
		if len(text) == 0 {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			return err
		}
		// Whatever our umask is.
		if err := os.Chmod(filepath.Join(dir, name), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// leave unmounts when the command has ended.
func (l *Local) leave(res MountResult, status int, err error, note func(string)) (int, error) {
	un, uerr := l.Unmount(context.Background(), UnmountRequest{Name: res.Target, Target: res.Target})
	switch {
	case errors.Is(uerr, layers.ErrNotFound): // somebody has killed a process of it
		uerr = errors.New("the mount has ended before the program: what it wrote last may be missing")
		fallthrough
	case uerr != nil:
		return sandbox.ExitOwn, errors.Join(err, uerr)
	}
	if un.StillInUse {
		note("still in use by " + un.By)
	}
	return status, err
}

// inShell reports whether a mount is that of a shell.
func (l *Local) inShell(a assessment) bool {
	dir, err := filepath.EvalSymlinks(l.runDir) // as targets are
	return err == nil && isBelow(a.row.Target, filepath.Join(dir, "shell"))
}

// inShellError says who has to leave.
func (l *Local) inShellError(a assessment) error {
	who := ""
	if rec, err := readRecord(a.row.RunDir); err == nil {
		who = fmt.Sprintf(" (process %d)", rec.Starter.Pid)
	}
	return markedf(layers.ErrInUse, "%s is in a shell%s: leave it, or end that process", l.describe(a.row), who)
}

// ImageOf returns the image that was mounted.
func ImageOf(ctx context.Context, s Service, res MountResult) (ocispec.Image, error) {
	in, err := s.Inspect(ctx, NameRequest{Name: res.ImageID.String()})
	if err != nil {
		return ocispec.Image{}, err
	}
	if in.Image == nil {
		return ocispec.Image{}, fmt.Errorf("image %s: not an image", res.ImageID)
	}
	return in.Image.Config, nil
}
