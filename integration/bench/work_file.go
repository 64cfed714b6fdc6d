package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// smallWork opens, reads to the end and closes each of Names, divided among
// Threads.
type smallWork struct {
	root  int
	names []cstr
	bufs  [][]byte
}

// maxSmall is the size up to which a file counts as small. It is read with one
// call, and the end of it with another.
const maxSmall = 16 << 10

func newSmallWork(j *job, root int, names []cstr) *smallWork {
	w := &smallWork{root: root, names: names}
	for range max(j.Threads, 1) {
		w.bufs = append(w.bufs, newBuffer(maxSmall+4096))
	}
	return w
}

func (w *smallWork) run() ([]part, error) {
	if len(w.bufs) == 1 {
		c := start()
		err := w.read(0)
		return []part{c.part(len(w.names))}, err
	}
	// All threads are there before the clock starts.
	var ready, done sync.WaitGroup
	begin := make(chan struct{})
	errs := make([]error, len(w.bufs))
	for t := range w.bufs {
		ready.Add(1)
		done.Go(func() {
			runtime.LockOSThread()
			ready.Done()
			<-begin
			errs[t] = w.read(t)
		})
	}
	ready.Wait()
	c := start()
	close(begin)
	done.Wait()
	return []part{c.part(len(w.names))}, errors.Join(errs...)
}

func (w *smallWork) read(thread int) error {
	buf := w.bufs[thread]
	for i := thread; i < len(w.names); i += len(w.bufs) {
		name := w.names[i]
		fd, err := rawOpen(w.root, name, unix.O_RDONLY, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", name, err)
		}
		for n := 1; n > 0; {
			if n, err = rawRead(fd, buf); err != nil {
				return fmt.Errorf("read %s: %w", name, err)
			}
		}
		if err := rawClose(fd); err != nil {
			return fmt.Errorf("close %s: %w", name, err)
		}
	}
	return nil
}

// writeSmallWork writes Block bytes to each of Names: to a new file (create),
// or to the end of one that is there (append).
type writeSmallWork struct {
	op    string
	root  int
	names []cstr
	data  []byte
}

func (w *writeSmallWork) run() ([]part, error) {
	flags := unix.O_WRONLY | unix.O_APPEND
	if w.op == "create" {
		flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL
	}
	c := start()
	for _, name := range w.names {
		fd, err := rawOpen(w.root, name, flags, 0o644)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", name, err)
		}
		if _, err := rawWrite(fd, w.data); err != nil {
			return nil, fmt.Errorf("write %s: %w", name, err)
		}
		if err := rawClose(fd); err != nil {
			return nil, fmt.Errorf("close %s: %w", name, err)
		}
	}
	return []part{c.part(len(w.names))}, nil
}

// bigWork reads or writes File in blocks of Block bytes:
//
//	read          from the beginning to the end
//	read-random   Count blocks at random places of the first Size bytes
//	read-mapped   one byte of each page, through mmap
//	write         a new file of Size bytes
//	write-random  Count blocks at random places of the first Size bytes
//
// Opening and closing are part of it. Operations are bytes for read, read-mapped
// and write, blocks otherwise. What writes has two parts: without fsync, and both
// together.
type bigWork struct {
	op     string
	root   int
	file   cstr
	size   int64
	buf    []byte
	places []int64
	sum    byte
}

func newBigWork(j *job, root int, file cstr) *bigWork {
	w := &bigWork{op: j.Op, root: root, file: file, size: j.Size, buf: newBuffer(max(j.Block, 1))}
	if j.Count > 0 {
		random := rand.New(rand.NewPCG(1, 2))
		for range j.Count {
			w.places = append(w.places, random.Int64N(j.Size/int64(j.Block))*int64(j.Block))
		}
	}
	return w
}

func (w *bigWork) run() ([]part, error) {
	flags := unix.O_RDONLY
	switch w.op {
	case "write":
		flags = unix.O_WRONLY | unix.O_CREAT
	case "write-random":
		flags = unix.O_WRONLY
	}
	c := start()
	fd, err := rawOpen(w.root, w.file, flags, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", w.file, err)
	}
	var ops int
	switch w.op {
	case "read":
		ops, err = w.read(fd)
	case "read-random":
		ops, err = w.readRandom(fd)
	case "read-mapped":
		ops, err = w.readMapped(fd)
	case "write":
		ops, err = w.write(fd)
	case "write-random":
		ops, err = w.writeRandom(fd)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", w.file, err)
	}
	parts := []part{c.part(ops)}
	if flags != unix.O_RDONLY {
		if err := rawFsync(fd); err != nil {
			return nil, fmt.Errorf("fsync %s: %w", w.file, err)
		}
		parts = append(parts, c.part(ops))
	}
	err = rawClose(fd)
	if flags == unix.O_RDONLY {
		parts[0] = c.part(ops)
	}
	return parts, err
}

func (w *bigWork) read(fd int) (ops int, err error) {
	for {
		n, err := rawRead(fd, w.buf)
		if err != nil || n == 0 {
			return ops, err
		}
		ops += n
	}
}

var errShort = errors.New("short read or write")

func (w *bigWork) readRandom(fd int) (int, error) {
	for _, at := range w.places {
		if n, err := rawPread(fd, w.buf, at); err != nil || n < len(w.buf) {
			return 0, errors.Join(err, short(n, w.buf))
		}
	}
	return len(w.places), nil
}

func short(n int, buf []byte) error {
	if n == len(buf) {
		return nil
	}
	return errShort
}

func (w *bigWork) readMapped(fd int) (int, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("stat: %w", err)
	}
	m, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, fmt.Errorf("mmap: %w", err)
	}
	for i := 0; i < len(m); i += 4096 {
		w.sum += m[i]
	}
	return len(m), unix.Munmap(m)
}

func (w *bigWork) write(fd int) (int, error) {
	for at := int64(0); at < w.size; at += int64(len(w.buf)) {
		if n, err := rawWrite(fd, w.buf); err != nil || n < len(w.buf) {
			return 0, errors.Join(err, short(n, w.buf))
		}
	}
	return int(w.size), nil
}

func (w *bigWork) writeRandom(fd int) (int, error) {
	for _, at := range w.places {
		if n, err := rawPwrite(fd, w.buf, at); err != nil || n < len(w.buf) {
			return 0, errors.Join(err, short(n, w.buf))
		}
	}
	return len(w.places), nil
}
