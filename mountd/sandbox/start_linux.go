package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Hidden verbs of the binary. cmd/plyfs looks for them before any option.
const (
	VerbKeeper = "shell-keeper"
	VerbInit   = "shell-init"
)

// mappedArg is the second argument of a keeper that has its ids.
const mappedArg = "mapped"

// Descriptors of keeper and init.
const (
	specFd     = 3
	terminalFd = 4 // only if the command has a terminal
)

// Child is a keeper or an init, as its parent sees it.
type Child struct {
	cmd  *exec.Cmd
	spec *os.File // its end tells the child of ours
}

// StartKeeper starts the keeper in a mount namespace and, unless the ids are
// those of the machine, a user namespace, and hands it spec. It has standard
// input, output and error of the caller, and env. terminal may be nil.
func StartKeeper(ids IDs, spec any, terminal *os.File, env []string) (*Child, error) {
	attr := &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS,
		Setsid:     true, // signals of the terminal come by way of the outer process
	}
	if ids.Kind != HostIDs {
		attr.Cloneflags |= unix.CLONE_NEWUSER
	}
	c, err := start("/proc/self/exe", VerbKeeper, attr, terminal, env)
	switch {
	case errors.Is(err, unix.EPERM) && ids.Kind == HostIDs:
		return nil, fmt.Errorf("make a mount namespace: %w; this root lacks CAP_SYS_ADMIN", err)
	case err != nil && ids.Kind != HostIDs:
		return nil, fmt.Errorf("make a user namespace: %w; see `plyfs doctor`", err)
	case err != nil:
		return nil, err
	}
	err = ids.write(c.cmd.Process.Pid)
	if err == nil {
		_, err = c.spec.Write([]byte{'\n'})
	}
	if err == nil {
		err = c.send(spec)
	}
	if err != nil {
		c.Abandon()
		return nil, err
	}
	return c, nil
}

// start starts a verb of this binary.
func start(exe, verb string, attr *syscall.SysProcAttr, terminal *os.File, env []string) (*Child, error) {
	// What our own caller left open is no business of the child.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("close-on-exec: %w", err)
	}
	theirs, ours, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	cmd := exec.Command(exe)
	cmd.Args = []string{"plyfs", verb}
	cmd.Env = env
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	if terminal != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, terminal)
	}
	cmd.SysProcAttr = attr
	if err := cmd.Start(); err != nil {
		_ = ours.Close() // nothing was written
		return nil, fmt.Errorf("start %s: %w", verb, err)
	}
	return &Child{cmd: cmd, spec: ours}, nil
}

func (c *Child) send(spec any) error {
	if err := json.NewEncoder(c.spec).Encode(spec); err != nil {
		return fmt.Errorf("tell %s what to do: %w", c.cmd.Args[1], err)
	}
	return nil
}

// Abandon lets a child see our end, and waits for its own.
func (c *Child) Abandon() {
	_ = c.spec.Close()
	_ = c.cmd.Wait() // it fails, and has said why
}

// Signal passes a signal on.
func (c *Child) Signal(s os.Signal) { _ = c.cmd.Process.Signal(s) } // or it has ended

// Wait returns the status of the child: 128 and the signal if one killed it.
func (c *Child) Wait() int {
	err := c.cmd.Wait()
	_ = c.spec.Close()
	if ws, ok := c.cmd.ProcessState.Sys().(syscall.WaitStatus); ok {
		return statusOf(ws)
	}
	if err != nil {
		return ExitOwn
	}
	return 0
}

func statusOf(ws syscall.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// Parent is what a keeper or an init has of the process that started it.
type Parent struct {
	// Gone is closed when it has ended.
	Gone     <-chan struct{}
	Terminal *os.File // nil: the command has none
}

// AwaitKeeper is how a keeper begins: it waits for its ids, takes on the
// privileges that go with them, and reads its spec.
func AwaitKeeper(args []string, spec any) (*Parent, error) {
	if len(args) == 0 || args[0] != mappedArg {
		var b [1]byte
		if n, err := unix.Read(specFd, b[:]); n != 1 || err != nil {
			return nil, errors.New("not started by plyfs shell, or it went away")
		}
		// A process that was started without ids lost all capabilities at that
		// moment. The next execve gives root of the namespace its own.
		err := syscall.Exec("/proc/self/exe", []string{"plyfs", VerbKeeper, mappedArg}, os.Environ())
		return nil, fmt.Errorf("start again as root of the user namespace: %w", err)
	}
	p, err := await(spec)
	if err != nil {
		return nil, err
	}
	// What the machine mounts and unmounts shows here, for the store; nothing
	// that is mounted here shows there.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return nil, fmt.Errorf("make the mounts private: %w", err)
	}
	return p, unix.Chdir("/")
}

// await reads the spec and watches for the end of the parent.
func await(spec any) (*Parent, error) {
	// Nothing here may come to who we start.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("close-on-exec: %w", err)
	}
	f := os.NewFile(specFd, "spec")
	if err := json.NewDecoder(f).Decode(spec); err != nil {
		return nil, fmt.Errorf("read what to do: %w", err)
	}
	gone := make(chan struct{})
	go func() { // ends with the parent, or with us
		_, _ = io.Copy(io.Discard, f) // its end is all that counts
		close(gone)
	}()
	p := &Parent{Gone: gone}
	var st unix.Stat_t
	if unix.Fstat(terminalFd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK {
		p.Terminal = os.NewFile(terminalFd, "terminal")
	}
	return p, nil
}

// Run starts init on spec, which is in the calling process' mount namespace, and
// waits for its end. What comes from sigs is passed on. If the parent goes, all
// is killed.
func Run(spec Spec, parent *Parent, sigs <-chan os.Signal) (status int, err error) {
	exe, err := sealedSelf()
	if err != nil {
		return ExitOwn, err
	}
	c, err := start("/proc/self/fd/"+strconv.Itoa(int(exe.Fd())), VerbInit, &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWCGROUP,
	}, parent.Terminal, []string{}) // nothing of the caller's environment
	_ = exe.Close()
	if parent.Terminal != nil {
		_ = parent.Terminal.Close() // init has it
	}
	if err != nil {
		return ExitOwn, fmt.Errorf("make the namespaces: %w", err)
	}
	if err := c.send(spec); err != nil {
		c.Abandon()
		return ExitOwn, err
	}
	done := make(chan struct{})
	go func() { // ends with init
		gone := parent.Gone
		for {
			select {
			case s := <-sigs:
				c.Signal(s)
			case <-gone:
				_ = c.cmd.Process.Kill() // and with it all that it has started
				gone = nil
			case <-done:
				return
			}
		}
	}()
	status = c.Wait()
	close(done)
	return status, nil
}

// seal keeps everybody from changing a file in memory. The kernel waits a moment for
// those who have a page of it in hand, such as its own compaction, and then says EBUSY.
func seal(f *os.File) (err error) {
	const tries = 20
	for range tries {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE)
		if err != unix.EBUSY {
			break
		}
	}
	return err
}

// sealedSelf returns the running binary as a file in memory that nobody can write.
// What runs in the root can open /proc/PID/exe of a program that the image made
// link to it, and later write to it: never to the binary of the machine.
func sealedSelf() (*os.File, error) {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return nil, fmt.Errorf("open the running binary: %w", err)
	}
	defer self.Close()
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("plyfs", flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // Linux before 6.3, where all are executable
		fd, err = unix.MemfdCreate("plyfs", flags)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "plyfs")
	// By read and write: pages that were spliced may be in use elsewhere for a while, and
	// then the file cannot be sealed.
	if _, err = io.Copy(struct{ io.Writer }{f}, struct{ io.Reader }{self}); err == nil {
		err = seal(f)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("copy the running binary: %w", err)
	}
	runtime.KeepAlive(self)
	return f, nil
}
