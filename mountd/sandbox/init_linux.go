package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Exit statuses beside those of the command; docker's.
const (
	ExitOwn      = 125 // plyfs itself failed
	ExitNoExec   = 126 // the command cannot be started
	ExitNotFound = 127
)

// Spec says everything about a root and what runs in it.
type Spec struct {
	Root     string   `json:"root"` // where the union is mounted
	ReadOnly bool     `json:"readOnly,omitempty"`
	Files    string   `json:"files"` // directory with resolv.conf, hosts and hostname
	Volumes  []Volume `json:"volumes,omitempty"`
	Hostname string   `json:"hostname"`

	Process         Process `json:"process"`
	Caps            Caps    `json:"caps"`
	NoNewPrivileges bool    `json:"noNewPrivileges,omitempty"`
	// Term and Window are of the caller's terminal, if the command gets one.
	Term   string        `json:"term,omitempty"`
	Window *unix.Winsize `json:"window,omitempty"`
}

// Forwarded are the signals that are passed on to the command.
var Forwarded = []os.Signal{
	unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2,
}

// InitMain is the hidden verb [VerbInit]: process 1 of the namespaces. note is
// told what the user should know. It returns the exit status.
func InitMain(note func(string)) (int, error) {
	// What is set for the command is set for one thread, which starts it.
	runtime.LockOSThread()
	// Who may not trace init may not look at what it has open.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return ExitOwn, fmt.Errorf("protect init: %w", err)
	}
	_ = os.WriteFile("/proc/self/comm", []byte("plyfs-init"), 0) // the name of a descriptor otherwise
	sigs := make(chan os.Signal, 16)
	signal.Notify(sigs, Forwarded...)
	var spec Spec
	parent, err := await(&spec)
	if err != nil {
		return ExitOwn, err
	}
	go func() {
		<-parent.Gone
		os.Exit(ExitOwn) // and the kernel kills the rest
	}()
	pid, status, err := launch(&spec, parent, note)
	if err != nil {
		return status, err
	}
	go func() { // ends with init
		for s := range sigs {
			if n, ok := s.(syscall.Signal); ok {
				_ = unix.Kill(pid, n) // it may have ended
			}
		}
	}()
	return reap(pid)
}

// reap waits for the command, and for all orphans that end before it.
func reap(command int) (int, error) {
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return ExitOwn, fmt.Errorf("wait for the command: %w", err)
		case pid == command:
			return statusOf(ws), nil
		}
	}
}

// launch builds the root and starts the command in it. The status is that of a failure.
func launch(spec *Spec, parent *Parent, note func(string)) (pid, status int, err error) {
	unix.Umask(0o022)
	r, err := openRoot(spec.Root, spec.ReadOnly)
	if err != nil {
		return 0, ExitOwn, err
	}
	defer r.close()
	user, err := LookupUser(r.fd, spec.Process.User)
	if err != nil {
		return 0, ExitOwn, err
	}
	cred, err := credential(user, note)
	if err != nil {
		return 0, ExitOwn, err
	}
	oneID := cred.NoSetGroups
	if err := buildRoot(r, spec, note); err != nil {
		return 0, ExitOwn, err
	}
	env := environment(spec, user)
	if oneID {
		if err := r.writeAptConfig(); err != nil {
			return 0, ExitOwn, err
		}
		env = defaultEnv(env, "APT_CONFIG", "/dev/"+aptConfigFile)
	}
	attr := &syscall.ProcAttr{
		Env:   env,
		Files: []uintptr{0, 1, 2},
		Sys:   &syscall.SysProcAttr{Setsid: true, Credential: cred},
	}
	var master *os.File
	if parent.Terminal != nil {
		slave, err := r.openTerminal(&master, spec.Window, user)
		if err != nil {
			return 0, ExitOwn, err
		}
		defer slave.Close()
		defer master.Close()
		attr.Files = []uintptr{slave.Fd(), slave.Fd(), slave.Fd()}
		attr.Sys.Setctty = true
	}
	if err := enterCwd(r, spec.Process.Cwd); err != nil {
		return 0, ExitOwn, err
	}
	r.close() // the command finds nothing of ours open
	if err := confineThread(spec, oneID); err != nil {
		return 0, ExitOwn, err
	}
	pid, status, err = execute(spec.Process.Args, attr)
	if err == nil && parent.Terminal != nil {
		err = sendTerminal(parent.Terminal, master)
		_ = parent.Terminal.Close()
		if err != nil {
			return 0, ExitOwn, err // our end is that of the command
		}
	}
	return pid, status, err
}

// buildRoot mounts everything and makes the root that of this process.
func buildRoot(r *root, spec *Spec, note func(string)) error {
	volumes, err := openVolumes(spec.Volumes)
	defer func() {
		for _, v := range volumes {
			_ = unix.Close(v.mount)
		}
	}()
	if err != nil {
		return err
	}
	if err := r.mountFiles(spec.Files, note); err != nil {
		return err
	}
	if err := r.mountSystem(); err != nil {
		return err
	}
	if err := r.mountVolumes(volumes); err != nil {
		return err
	}
	if err := r.pivot(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(spec.Hostname)); err != nil {
		return fmt.Errorf("host name: %w", err)
	}
	return nil
}

// credential turns a user of the image into ids of the namespace.
func credential(u User, note func(string)) (*syscall.Credential, error) {
	c := &syscall.Credential{Uid: u.UID, Gid: u.GID}
	for _, m := range []struct {
		what, file string
		id         uint32
	}{{"user", "/proc/self/uid_map", u.UID}, {"group", "/proc/self/gid_map", u.GID}} {
		ok, err := mapped(m.file, m.id)
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, fmt.Errorf("%s %d of the image does not exist in your user namespace: get more ids in %s and %s, or use --user 0",
				m.what, m.id, subuidFile, subgidFile)
		}
	}
	setgroups, err := os.ReadFile("/proc/self/setgroups")
	if err != nil {
		return nil, fmt.Errorf("ids of the user namespace: %w", err)
	}
	if strings.TrimSpace(string(setgroups)) == "deny" {
		c.NoSetGroups = true
		return c, nil
	}
	for _, g := range u.Groups {
		ok, err := mapped("/proc/self/gid_map", g)
		if err != nil {
			return nil, err
		}
		if !ok {
			note(fmt.Sprintf("group %d of the image does not exist in your user namespace: left out", g))
			continue
		}
		c.Groups = append(c.Groups, g)
	}
	return c, nil
}

// environment completes what image and user have set.
func environment(spec *Spec, u User) []string {
	env := defaultEnv(spec.Process.Env, "HOSTNAME", spec.Hostname)
	env = defaultEnv(env, "HOME", u.Home)
	if spec.Window != nil && spec.Term != "" {
		env = defaultEnv(env, "TERM", spec.Term)
	}
	return env
}

// enterCwd makes the working directory if there is none, and enters it.
func enterCwd(r *root, cwd string) error {
	fd, err := r.place(cwd, true)
	if errors.Is(err, unix.EROFS) {
		return fmt.Errorf("working directory %q is not there, and nothing can be made in a read-only mount: choose another with -w", cwd)
	}
	if err != nil {
		return fmt.Errorf("working directory: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Fchdir(fd); err != nil {
		return fmt.Errorf("working directory %q: %w", cwd, err)
	}
	return nil
}

// confineThread takes from the calling thread what the command shall not have.
func confineThread(spec *Spec, oneID bool) error {
	// The keys of the caller's session are not the image's.
	if _, err := unix.KeyctlInt(unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0); err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("session keyring: %w", err)
	}
	if err := scopeThread(); err != nil {
		return err
	}
	if oneID {
		if err := emulateThread(); err != nil {
			return err
		}
	}
	if err := spec.Caps.limitThread(); err != nil {
		return err
	}
	if spec.NoNewPrivileges {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("no new privileges: %w", err)
		}
	}
	return nil
}

// execute starts the command, which is looked for as a shell does.
func execute(args []string, attr *syscall.ProcAttr) (pid, status int, err error) {
	var file string
	if len(args) == 0 {
		for _, sh := range Shells {
			if file, err = findProgram(sh, attr.Env); err == nil {
				args = []string{sh}
				break
			}
		}
		if len(args) == 0 {
			return 0, ExitNotFound, fmt.Errorf("the image names no command and has none of %s", strings.Join(Shells, ", "))
		}
	} else if file, err = findProgram(args[0], attr.Env); err != nil {
		return 0, statusOfError(err), fmt.Errorf("command %q: %w", args[0], err)
	}
	pid, err = syscall.ForkExec(file, args, attr)
	if err != nil {
		return 0, statusOfError(err), fmt.Errorf("command %q: %w", args[0], err)
	}
	return pid, 0, nil
}

func statusOfError(err error) int {
	if errors.Is(err, fs.ErrNotExist) {
		return ExitNotFound
	}
	return ExitNoExec
}

// findProgram looks for a program in the PATH of an environment.
func findProgram(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, executable(name)
	}
	first := error(unix.ENOENT)
	for _, e := range env {
		dirs, ok := strings.CutPrefix(e, "PATH=")
		if !ok {
			continue
		}
		for _, dir := range strings.Split(dirs, ":") {
			if dir == "" {
				dir = "." // as execvp(3) does
			}
			err := executable(dir + "/" + name)
			if err == nil {
				return dir + "/" + name, nil
			}
			if errors.Is(err, fs.ErrPermission) {
				first = err
			}
		}
	}
	return "", first
}

func executable(file string) error {
	st, err := os.Stat(file)
	if err != nil {
		var p *fs.PathError
		if errors.As(err, &p) {
			err = p.Err
		}
		return err
	}
	if st.IsDir() || st.Mode()&0o111 == 0 {
		return unix.EACCES
	}
	return nil
}
