package sandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// openTerminal makes a terminal in the root's own /dev/pts. It belongs to the
// user, has the size of the caller's, and is /dev/console as well.
func (r *root) openTerminal(master **os.File, size *unix.Winsize, u User) (slave *os.File, err error) {
	fd, err := unix.Openat(r.pts, "ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open a terminal: %w", err)
	}
	m := os.NewFile(uintptr(fd), "terminal")
	fail := func(err error) (*os.File, error) {
		_ = m.Close()
		return nil, fmt.Errorf("open a terminal: %w", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return fail(err)
	}
	if size != nil {
		if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, size); err != nil {
			return fail(err)
		}
	}
	// By descriptor: no name is looked up.
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return fail(errno)
	}
	slave = os.NewFile(peer, "terminal of the command")
	if err = unix.Fchown(int(peer), int(u.UID), -1); err == nil {
		err = r.bindInDev("console", int(peer))
	}
	if err != nil {
		_ = slave.Close()
		return fail(err)
	}
	*master = m
	return slave, nil
}

// TerminalPair returns the two ends over which the terminal of a command comes.
func TerminalPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "terminal socket"), os.NewFile(uintptr(fds[1]), "terminal socket"), nil
}

func sendTerminal(sock, master *os.File) error {
	if err := unix.Sendmsg(int(sock.Fd()), []byte{0}, unix.UnixRights(int(master.Fd())), nil, 0); err != nil {
		return fmt.Errorf("hand over the terminal: %w", err)
	}
	return nil
}

// receiveTerminal waits for the terminal; io.EOF if the command was never started.
func receiveTerminal(sock *os.File) (*os.File, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	for {
		n, oobn, _, _, err := unix.Recvmsg(int(sock.Fd()), make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, err
		case n == 0:
			return nil, io.EOF
		}
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(msgs) != 1 {
			return nil, errors.New("no terminal received")
		}
		fds, err := unix.ParseUnixRights(&msgs[0])
		if err != nil || len(fds) != 1 {
			return nil, errors.New("no terminal received")
		}
		return os.NewFile(uintptr(fds[0]), "terminal of the command"), nil
	}
}

// Proxy joins the caller's terminal with that of a command, which comes over
// sock, until the last program has closed it.
func Proxy(sock *os.File) error {
	master, err := receiveTerminal(sock)
	if errors.Is(err, io.EOF) {
		return nil // what went wrong is told by who made it
	}
	if err != nil {
		return fmt.Errorf("terminal of the command: %w", err)
	}
	defer master.Close()
	in := int(os.Stdin.Fd())
	saved, err := term.MakeRaw(in)
	if err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	defer func() { _ = term.Restore(in, saved) }() // it may be gone: a closed window
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, unix.SIGWINCH)
	defer signal.Stop(resized)
	done := make(chan struct{})
	defer close(done)
	go func() {
		for {
			if size, err := unix.IoctlGetWinsize(in, unix.TIOCGWINSZ); err == nil {
				_ = unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, size) // its user may be gone
			}
			select {
			case <-resized:
			case <-done:
				return
			}
		}
	}()
	go func() { _, _ = io.Copy(master, os.Stdin) }() // ends with the process: nothing wakes a read of a terminal
	_, err = io.Copy(os.Stdout, master)
	if errors.Is(err, unix.EIO) { // how a terminal says that nobody has it open any more
		err = nil
	}
	return err
}

// IsTerminal reports whether a command should get a terminal: the caller types
// and reads at one.
func IsTerminal() bool {
	return term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd()))
}

// CallerTerminal returns name and size of the caller's terminal.
func CallerTerminal() (name string, size *unix.Winsize) {
	size, err := unix.IoctlGetWinsize(int(os.Stdin.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		size = &unix.Winsize{Row: 24, Col: 80}
	}
	return os.Getenv("TERM"), size
}
