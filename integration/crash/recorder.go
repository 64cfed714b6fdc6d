package crash

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// RecorderEnv, when set to a directory, turns a test binary into a recorder for
// it: call RunRecorder before anything else.
const RecorderEnv = "PLYFS_TEST_RECORDER"

// Names in the directory of a recorded disk.
const (
	imageName = "image" // what the disk holds now
	logName   = "log"
	fuseName  = "recorder" // mount point of the recorder's file system
	diskName  = "disk"     // its only file
)

// RunRecorder records the disk in dir until its input ends. Commands are lines:
// "mark TEXT" and "end"; each is answered with a line. An end without "end"
// means that nobody is left who could detach what lies on the disk: then the
// connection breaks, and everything above it fails at once.
func RunRecorder(dir string) error {
	image, err := os.OpenFile(dir+"/"+imageName, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("recorder: %w", err)
	}
	st, err := image.Stat()
	if err != nil {
		return fmt.Errorf("recorder: %w", err)
	}
	log, err := newLogWriter(dir + "/" + logName)
	if err != nil {
		return fmt.Errorf("recorder: %w", err)
	}
	r := &recorder{RawFileSystem: fuse.NewDefaultRawFileSystem(), image: image, size: st.Size(), log: log}
	server, err := fuse.NewServer(r, dir+"/"+fuseName, &fuse.MountOptions{
		DirectMountStrict: true, FsName: "recorder", Name: "recorder", MaxWrite: 1 << 20, DisableXAttrs: true,
	})
	if err != nil {
		return fmt.Errorf("recorder: %w", err)
	}
	served := make(chan struct{})
	go func() { server.Serve(); close(served) }()
	if err := server.WaitMount(); err != nil {
		return fmt.Errorf("recorder: %w", err)
	}
	fmt.Println("ready")
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		if in.Text() == "end" {
			// The file system has been unmounted by whoever says so.
			<-served
			if err := r.close(); err != nil {
				return err
			}
			fmt.Println("ok")
			return nil
		}
		text, ok := strings.CutPrefix(in.Text(), "mark ")
		if !ok {
			return fmt.Errorf("recorder: unknown command %q", in.Text())
		}
		if err := r.append(Entry{Kind: Mark, Len: int64(len(text)), Data: []byte(text)}); err != nil {
			return err
		}
		fmt.Println("ok")
	}
	return errors.New("recorder: left alone")
}

// recorder is a file system with one file. Every request that changes it is
// carried out and logged under one lock, so the log is an order in which it may
// have happened.
type recorder struct {
	fuse.RawFileSystem
	size int64

	mu    sync.Mutex
	image *os.File   // guarded by mu
	log   *logWriter // guarded by mu
}

const diskNode = 2

// long is how long the kernel may keep what it was told: nothing changes.
const long = time.Hour

func (r *recorder) String() string { return "recorder" }

func (r *recorder) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Join(r.log.close(), r.image.Close())
}

func (r *recorder) append(e Entry) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.add(e)
}

func (r *recorder) attr(node uint64, out *fuse.Attr) {
	out.Ino, out.Nlink = node, 1
	if node == diskNode {
		out.Mode, out.Size = unix.S_IFREG|0o600, uint64(r.size)
		return
	}
	out.Mode = unix.S_IFDIR | 0o700
}

func (r *recorder) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if h.NodeId != fuse.FUSE_ROOT_ID || name != diskName {
		return fuse.ENOENT
	}
	out.NodeId = diskNode
	r.attr(diskNode, &out.Attr)
	out.SetEntryTimeout(long)
	out.SetAttrTimeout(long)
	return fuse.OK
}

func (r *recorder) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	r.attr(in.NodeId, &out.Attr)
	out.SetTimeout(long)
	return fuse.OK
}

func (r *recorder) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.OK }

// Open makes every read and write of the loop device a request at once: no page
// cache stands between.
func (r *recorder) Open(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_DIRECT_IO
	return fuse.OK
}

func (r *recorder) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK }

func (r *recorder) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n, err := r.image.ReadAt(buf, int64(in.Offset))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fuse.ToStatus(err)
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

func (r *recorder) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	e := Entry{Kind: Write, Off: int64(in.Offset), Len: int64(len(data)), Data: data}
	return uint32(len(data)), r.change(e)
}

func (r *recorder) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status {
	return r.change(Entry{Kind: Flush})
}

func (r *recorder) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if in.Mode&(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_ZERO_RANGE) == 0 {
		return fuse.Status(unix.EOPNOTSUPP)
	}
	return r.change(Entry{Kind: Zero, Off: int64(in.Offset), Len: int64(in.Length)})
}

func (r *recorder) change(e Entry) fuse.Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := errors.Join(apply(r.image, e), r.log.add(e)); err != nil {
		return fuse.EIO
	}
	return fuse.OK
}

// apply does to an image what the entry says.
func apply(image *os.File, e Entry) error {
	var err error
	switch e.Kind {
	case Write:
		_, err = image.WriteAt(e.Data, e.Off)
	case Zero:
		err = unix.Fallocate(int(image.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, e.Off, e.Len)
	}
	if err != nil {
		return fmt.Errorf("apply to image: %w", err)
	}
	return nil
}
