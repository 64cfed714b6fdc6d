package transport

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/fuseop"
)

// The kernel's side of a connection is a socket that keeps message boundaries,
// as /dev/fuse does.

// fakeFS answers GETATTR; node 2 only once it is let go.
type fakeFS struct {
	fuse.RawFileSystem
	release chan struct{}
	entered chan struct{}
}

func (f *fakeFS) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.NodeId == 2 {
		f.entered <- struct{}{}
		<-f.release
	}
	out.Ino = in.NodeId
	return fuse.OK
}

type kernel struct {
	t    *testing.T
	fd   int
	done chan error
}

func connect(t *testing.T, fs fuse.RawFileSystem, o ServeOptions) *kernel {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	opts := &fuse.MountOptions{MaxWrite: maxWrite}
	l := newLoop(fs, opts, o, zap.NewNop())
	l.fd = pair[0]
	k := &kernel{t: t, fd: pair[1], done: make(chan error, 1)}
	go func() {
		l.run()
		k.done <- l.err
	}()
	t.Cleanup(func() {
		unix.Close(pair[1])
		select {
		case <-k.done:
		case <-time.After(20 * time.Second):
			t.Error("the loop does not end with its connection")
		}
		unix.Close(pair[0])
	})
	k.send(1, fuseop.Init, 0, initBody())
	k.expect(1)
	return k
}

func initBody() []byte {
	b := make([]byte, 64)
	binary.NativeEndian.PutUint32(b, 7)
	binary.NativeEndian.PutUint32(b[4:], 45)
	return b
}

func (k *kernel) send(unique uint64, op uint32, node uint64, body []byte) {
	k.t.Helper()
	msg := make([]byte, inHeaderSize, inHeaderSize+len(body))
	msg = append(msg, body...)
	binary.NativeEndian.PutUint32(msg, uint32(len(msg)))
	binary.NativeEndian.PutUint32(msg[4:], op)
	binary.NativeEndian.PutUint64(msg[8:], unique)
	binary.NativeEndian.PutUint64(msg[16:], node)
	if _, err := unix.Write(k.fd, msg); err != nil {
		k.t.Fatal(err)
	}
}

// expect reads the next answer and checks whose it is.
func (k *kernel) expect(unique uint64) (errno int32) {
	k.t.Helper()
	p := []unix.PollFd{{Fd: int32(k.fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(p, 20000); n != 1 {
		k.t.Fatalf("no answer to request %d: %v", unique, err)
	}
	buf := make([]byte, 1<<16)
	n, err := unix.Read(k.fd, buf)
	if err != nil || n < outHeaderSize {
		k.t.Fatalf("answer of %d bytes: %v", n, err)
	}
	if got := binary.NativeEndian.Uint64(buf[8:]); got != unique {
		k.t.Fatalf("answer to request %d, want %d", got, unique)
	}
	return int32(binary.NativeEndian.Uint32(buf[4:]))
}

func TestStuckRequestStopsNobody(t *testing.T) {
	for name, o := range map[string]ServeOptions{"spinning": {}, "sleeping": {Spin: -1}} {
		t.Run(name, func(t *testing.T) {
			fs := &fakeFS{RawFileSystem: fuse.NewDefaultRawFileSystem(), release: make(chan struct{}), entered: make(chan struct{})}
			k := connect(t, fs, o)
			k.send(10, fuseop.Getattr, 2, make([]byte, 16))
			<-fs.entered
			for u := uint64(11); u < 50; u++ {
				k.send(u, fuseop.Getattr, 1, make([]byte, 16))
				if e := k.expect(u); e != 0 {
					t.Fatalf("request %d: error %d", u, e)
				}
			}
			close(fs.release)
			k.expect(10)
		})
	}
}

func TestManyStuckRequests(t *testing.T) {
	fs := &fakeFS{RawFileSystem: fuse.NewDefaultRawFileSystem(), release: make(chan struct{}), entered: make(chan struct{}, 100)}
	k := connect(t, fs, ServeOptions{})
	for u := uint64(100); u < 140; u++ {
		k.send(u, fuseop.Getattr, 2, make([]byte, 16))
		<-fs.entered
	}
	k.send(7, fuseop.Getattr, 1, make([]byte, 16))
	k.expect(7)
	close(fs.release)
}

func TestInterruptIsDeclined(t *testing.T) {
	k := connect(t, &fakeFS{RawFileSystem: fuse.NewDefaultRawFileSystem()}, ServeOptions{})
	k.send(5, fuseop.Interrupt, 0, make([]byte, 8))
	if e := k.expect(5); e != -int32(unix.ENOSYS) {
		t.Errorf("INTERRUPT is answered with %d, want ENOSYS so that the kernel sends no more", e)
	}
}

func TestReadyComesAfterInit(t *testing.T) {
	ready := make(chan struct{})
	connect(t, &fakeFS{RawFileSystem: fuse.NewDefaultRawFileSystem()}, ServeOptions{Ready: func(*Resume) { close(ready) }})
	select {
	case <-ready:
	case <-time.After(20 * time.Second):
		t.Error("Ready was not called")
	}
}

func TestSpinner(t *testing.T) {
	nothing := func() (int, error) { return 0, unix.EAGAIN }
	something := func() (int, error) { return 100, nil }
	s := spinner{budget: time.Microsecond, credit: spinCredit}
	for range spinCredit {
		if _, err := s.wait(nothing); err != unix.EAGAIN {
			t.Fatal(err)
		}
	}
	looks := 0
	for range 10 * spinProbe {
		if _, err := s.wait(func() (int, error) { looks++; return 0, unix.EAGAIN }); err != unix.EAGAIN {
			t.Fatal(err)
		}
	}
	if looks == 0 {
		t.Error("a spinner without credit never looks again")
	}
	for s.credit == 0 {
		_, _ = s.wait(something) // one in spinProbe finds it
	}
	if n, err := s.wait(something); n != 100 || err != nil {
		t.Errorf("with credit: %d, %v", n, err)
	}
	off := spinner{budget: -1, credit: spinCredit}
	if _, err := off.wait(func() (int, error) { t.Error("it looks although it must not"); return 0, nil }); err != unix.EAGAIN {
		t.Error(err)
	}
}
