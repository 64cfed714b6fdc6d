package layers

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// sink finishes small files in the background: the unpacker creates them, so
// that the names of a tar come into being in its order, and goes on to the next
// entry while content and attributes are written.
type sink struct {
	powers     powers
	jobs       chan fileJob
	pending    sync.WaitGroup
	workers    sync.WaitGroup
	incomplete atomic.Bool

	mu  sync.Mutex
	err error // the first; guarded by mu
}

// fileJob is a file that has been created. The descriptor belongs to the job.
type fileJob struct {
	fd    int
	data  *[]byte
	attrs *attrs
	made  made
	node  *node // for messages
}

// sinkFile is the largest file that is finished in the background.
const sinkFile = 128 << 10

var sinkBufs = sync.Pool{New: func() any { b := make([]byte, 0, sinkFile); return &b }}

func newSink(p powers) *sink {
	s := &sink{powers: p, jobs: make(chan fileJob, 64)}
	for range min(runtime.GOMAXPROCS(0), 4) {
		s.workers.Go(func() {
			for j := range s.jobs {
				s.done(j, s.finish(j))
			}
		})
	}
	return s
}

func (s *sink) put(j fileJob) {
	s.pending.Add(1)
	s.jobs <- j
}

func (s *sink) finish(j fileJob) error {
	if err := writeAll(j.fd, *j.data); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	complete, err := s.powers.apply(j.fd, "", kindFile, j.attrs, &j.made)
	if !complete {
		s.incomplete.Store(true)
	}
	return err
}

// end releases what a job holds.
func (j fileJob) end() error {
	*j.data = (*j.data)[:0]
	sinkBufs.Put(j.data)
	if err := unix.Close(j.fd); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	return nil
}

func (s *sink) done(j fileJob, err error) {
	if cerr := j.end(); err == nil {
		err = cerr
	}
	if err != nil {
		s.mu.Lock()
		if s.err == nil {
			s.err = fmt.Errorf("entry %q: %w", j.node.path(), err)
		}
		s.mu.Unlock()
	}
	s.pending.Done()
}

// failed returns the first error of a file so far.
func (s *sink) failed() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// wait returns when all files are finished.
func (s *sink) wait() error {
	s.pending.Wait()
	return s.failed()
}

// close ends the workers.
func (s *sink) close() error {
	close(s.jobs)
	s.workers.Wait()
	return s.failed()
}

func writeAll(fd int, p []byte) error {
	for len(p) > 0 {
		n, err := unix.Write(fd, p)
		if err != nil && err != unix.EINTR {
			return err
		}
		p = p[max(n, 0):]
	}
	return nil
}

// made is what an object has got by being made.
type made struct {
	uid, gid int
	mode     uint32
}

// maker knows what objects of the stage get by being made.
type maker struct {
	uid, gid int
	umask    uint32
	plain    bool // and that it is only that
}

// newMaker looks at the root of a stage, in which nothing has been made yet.
func newMaker(diff int, foreignXattrs bool) (maker, error) {
	var st unix.Stat_t
	if err := fsat.Fstat(diff, &st); err != nil {
		return maker{}, err
	}
	m := maker{uid: int(st.Uid), gid: int(st.Gid), umask: umask()}
	// An inherited ACL, or group, is another matter.
	m.plain = !foreignXattrs && st.Mode&unix.S_ISGID == 0 && m.uid == os.Geteuid() && m.gid == os.Getegid()
	return m, nil
}

// mode is the mode to create a file with that is to have mode want, and what it
// gets by it.
func (m maker) mode(want uint32) (create uint32, got made) {
	if !m.plain {
		return 0o600, made{uid: -1, gid: -1, mode: ^uint32(0)}
	}
	create = want & 0o777
	return create, made{uid: m.uid, gid: m.gid, mode: create &^ m.umask}
}

// umask reads the process's umask; all bits if it cannot be told.
func umask() uint32 {
	raw, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0o777
	}
	for line := range strings.SplitSeq(string(raw), "\n") {
		if v, ok := strings.CutPrefix(line, "Umask:"); ok {
			if n, err := strconv.ParseUint(strings.TrimSpace(v), 8, 32); err == nil {
				return uint32(n)
			}
		}
	}
	return 0o777
}

// setTimes is futimens.
func setTimes(fd int, ts [2]unix.Timespec) error {
	err := unix.UtimesNanoAt(fd, "", ts[:], unix.AT_EMPTY_PATH)
	if err == unix.ENOENT || err == unix.EINVAL { // before Linux 5.8
		return fsat.Utimes(fd, "", ts)
	}
	return err
}
