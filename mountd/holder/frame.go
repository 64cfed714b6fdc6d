package holder

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/transport"
)

// kind names a message of the status or the control socket.
type kind string

const (
	kindSpec     kind = "spec"     // down: what to mount
	kindPrepared kind = "prepared" // up: all layers are open
	kindGo       kind = "go"       // starter -> holder: mount now
	kindServe    kind = "serve"    // holder -> server: with /dev/fuse
	kindLive     kind = "live"     // up: INIT was answered
	kindDone     kind = "done"     // server -> holder: unmounted, upper synced
	kindError    kind = "error"    // up: gave up
	kindAdopt    kind = "adopt"    // server -> new holder: with /dev/fuse
	kindKeep     kind = "keep"     // server -> holder, and later -> next server: a descriptor
	kindDrop     kind = "drop"     // server -> holder: it is not needed any more
	kindRefused  kind = "refused"  // server -> holder: a request has been refused
	kindSpare    kind = "spare"    // holder -> server: with the socket of a spare holder
)

// message is one frame: four bytes of length, then JSON. Descriptors travel
// with the first byte: with serve and adopt /dev/fuse and, where the server keeps one, the
// ledger; that alone with live; with keep that of an object without a name. The private
// copy of the mount that the upper lies in follows the ledger with live and adopt, and comes
// alone with spec to the next server.
type message struct {
	Kind  kind       `json:"kind"`
	Spec  *Spec      `json:"spec,omitempty"`
	State *State     `json:"state,omitempty"`
	Error *wireError `json:"error,omitempty"`
	// Keep, with serve, tells the server to see to a new holder when ours is killed.
	Keep bool `json:"keep,omitempty"`
	// Resume comes from a live server that another one can take over from, and goes
	// to that one.
	Resume *transport.Resume `json:"resume,omitempty"`
	// Restarts, with spec and serve, is how many servers have died before.
	Restarts int `json:"restarts,omitempty"`
	// Crashed, with serve, says that the last server has ended by an error of its own.
	Crashed bool `json:"crashed,omitempty"`
	// Node, with keep and drop, is the node id of the object.
	Node uint64 `json:"node,omitempty"`
}

// wireError carries an error between processes: the sentence, and the errno
// for programs.
type wireError struct {
	Text  string     `json:"text"`
	Errno unix.Errno `json:"errno,omitempty"`
}

func toWire(err error) *wireError {
	w := &wireError{Text: err.Error()}
	_ = errors.As(err, &w.Errno)
	return w
}

// Error returns the sentence.
func (w *wireError) Error() string { return w.Text }

// Unwrap makes errors.Is(err, unix.EBUSY) work across the process boundary.
func (w *wireError) Unwrap() error {
	if w.Errno == 0 {
		return nil
	}
	return w.Errno
}

// maxFrame bounds a frame; 64 MiB holds a stack of 10 000 layers with long paths.
const maxFrame = 64 << 20

// link is one end of a socket pair between two processes of a mount.
type link struct {
	c  *net.UnixConn
	mu sync.Mutex // guards writes: frames must not mix
}

// socketPair returns this end as a link and the other end as a file for a child.
func socketPair() (*link, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "socket of child")
	ours, err := linkFromFile(os.NewFile(uintptr(fds[0]), "socket to child"))
	if err != nil {
		_ = theirs.Close() // never used
		return nil, nil, err
	}
	return ours, theirs, nil
}

// linkFromFile takes over f.
func linkFromFile(f *os.File) (*link, error) {
	defer f.Close() // FileConn has made a copy
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("socket of parent: %w", err)
	}
	uc, ok := c.(*net.UnixConn)
	if !ok {
		_ = c.Close()
		return nil, errors.New("socket of parent: not a unix socket")
	}
	return &link{c: uc}, nil
}

func (l *link) close() { _ = l.c.Close() } // nothing is buffered

// send writes one frame, with those files attached that are not nil.
func (l *link) send(m message, files ...*os.File) error {
	var fds []int
	for _, f := range files {
		if f != nil {
			fds = append(fds, int(f.Fd()))
		}
	}
	return l.sendFds(m, fds...)
}

// sendFds is send for descriptors.
func (l *link) sendFds(m message, fds ...int) error {
	body, err := json.Marshal(m)
	if err != nil {
		return err
	}
	frame := binary.BigEndian.AppendUint32(nil, uint32(len(body)))
	frame = append(frame, body...)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	n, _, err := l.c.WriteMsgUnix(frame, oob, nil)
	if err == nil && n < len(frame) {
		_, err = l.c.Write(frame[n:])
	}
	if err != nil {
		return fmt.Errorf("send %s: %w", m.Kind, err)
	}
	return nil
}

// maxFds is how many descriptors a frame can bring.
const maxFds = 3

// files are the descriptors that came with a message.
type files []*os.File

// at returns one of them, or nil.
func (f files) at(i int) *os.File {
	if i < len(f) {
		return f[i]
	}
	return nil
}

func (f files) close() {
	for _, one := range f {
		_ = one.Close() // nothing is buffered in it
	}
}

// recv reads one frame and the descriptors that came with it.
// The other end being gone is io.EOF.
func (l *link) recv() (m message, f files, err error) {
	defer func() {
		if err != nil {
			f.close() // of no use without their message
			f = nil
		}
	}()
	var head [4]byte
	oob := make([]byte, unix.CmsgSpace(4*maxFds))
	for got := 0; got < len(head); {
		n, oobn, _, _, err := l.c.ReadMsgUnix(head[got:], oob)
		if n == 0 && err == nil {
			err = io.EOF
		}
		if err != nil {
			if errors.Is(err, unix.ECONNRESET) { // it died with unread data
				err = io.EOF
			}
			return m, f, err
		}
		if oobn > 0 {
			if f, err = filesFromRights(oob[:oobn]); err != nil {
				return m, f, err
			}
		}
		got += n
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxFrame {
		return m, f, fmt.Errorf("message of %d bytes is too long", n)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(l.c, body); err != nil {
		return m, f, fmt.Errorf("message cut short: %w", err)
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return m, f, fmt.Errorf("message: %w", err)
	}
	return m, f, nil
}

func filesFromRights(oob []byte) (f files, err error) {
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("descriptor from parent: %w", err)
	}
	for _, c := range cmsgs {
		fds, err := unix.ParseUnixRights(&c)
		if err != nil {
			return nil, fmt.Errorf("descriptor from parent: %w", err)
		}
		for _, fd := range fds { // Go asks for MSG_CMSG_CLOEXEC
			f = append(f, os.NewFile(uintptr(fd), "from parent"))
		}
	}
	return f, nil
}

// expect receives one message of kind k; an error message becomes its error.
func (l *link) expect(k kind) (message, files, error) {
	m, f, err := l.recv()
	switch {
	case err != nil:
		return m, f, err
	case m.Kind == kindError && m.Error != nil:
		return m, f, m.Error
	case m.Kind != k:
		f.close()
		return m, nil, fmt.Errorf("expected message %q, got %q", k, m.Kind)
	}
	return m, f, nil
}
