package main

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// listBuffer is how much of a directory is asked for at a time, as by the C
// library.
const listBuffer = 32 << 10

// treeWork goes through the tree File as find(1), chown -R or rm -r do: it
// opens a directory relative to its parent, lists it, looks at each name.
//
//	walk     lstat of every name
//	chown    the same, and lchown to another group
//	remove   the same, and unlink, directories last
//	readdir  one directory, names only
//
// It counts names.
type treeWork struct {
	op    string
	root  int
	top   cstr
	gid   int
	count int
	st    unix.Statx_t
	free  [][]byte // listing buffers
}

// maxDepth of directories, for which buffers are made beforehand.
const maxDepth = 24

func newTreeWork(j *job, root int, top cstr) *treeWork {
	w := &treeWork{op: j.Op, root: root, top: top, gid: 12}
	for range maxDepth {
		w.free = append(w.free, newBuffer(listBuffer))
	}
	return w
}

func (w *treeWork) run() ([]part, error) {
	c := start()
	var err error
	if w.op == "readdir" {
		err = w.list()
	} else {
		err = w.dir(w.root, w.top)
	}
	return []part{c.part(w.count)}, err
}

func (w *treeWork) list() error {
	fd, err := rawOpen(w.root, w.top, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", w.top, err)
	}
	for {
		n, err := rawGetdents(fd, w.free[0])
		if err != nil {
			return fmt.Errorf("list %s: %w", w.top, err)
		}
		if n == 0 {
			return rawClose(fd)
		}
		for rest := w.free[0][:n]; len(rest) > 0; w.count++ {
			_, _, rest = dirent(rest)
		}
	}
}

func (w *treeWork) dir(parent int, name cstr) error {
	fd, err := rawOpen(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("open directory %s: %w", name, err)
	}
	if len(w.free) == 0 {
		return fmt.Errorf("directory %s lies deeper than %d", name, maxDepth)
	}
	buf := w.free[len(w.free)-1]
	w.free = w.free[:len(w.free)-1]
	for {
		n, err := rawGetdents(fd, buf)
		if err != nil {
			return fmt.Errorf("list directory %s: %w", name, err)
		}
		if n == 0 {
			break
		}
		for rest := buf[:n]; len(rest) > 0; {
			var child cstr
			var kind byte
			child, kind, rest = dirent(rest)
			if child.dots() {
				continue
			}
			if err := w.entry(fd, child, kind); err != nil {
				return err
			}
		}
	}
	w.free = append(w.free, buf)
	return rawClose(fd)
}

func (w *treeWork) entry(dir int, name cstr, kind byte) error {
	w.count++
	if err := rawLstat(dir, name, &w.st); err != nil {
		return fmt.Errorf("lstat %s: %w", name, err)
	}
	isDir := w.st.Mode&unix.S_IFMT == unix.S_IFDIR
	if kind != unix.DT_UNKNOWN && isDir != (kind == unix.DT_DIR) {
		return fmt.Errorf("lstat and listing do not agree on the type of %s", name)
	}
	if w.op == "chown" {
		if err := rawLchown(dir, name, 0, w.gid); err != nil {
			return fmt.Errorf("lchown %s: %w", name, err)
		}
	}
	if isDir {
		if err := w.dir(dir, name); err != nil {
			return err
		}
	}
	if w.op != "remove" {
		return nil
	}
	flags := 0
	if isDir {
		flags = unix.AT_REMOVEDIR
	}
	if err := rawUnlink(dir, name, flags); err != nil {
		return fmt.Errorf("unlink %s: %w", name, err)
	}
	return nil
}

// nameWork does one system call on each of Names, Count times over. To rename
// is to append ".renamed".
type nameWork struct {
	op    string
	root  int
	names []cstr
	to    []cstr
	times int
	st    unix.Statx_t
}

func newNameWork(j *job, root int, names []cstr) *nameWork {
	w := &nameWork{op: j.Op, root: root, names: names, times: max(j.Count, 1)}
	if j.Op == "rename" {
		for _, n := range j.Names {
			w.to = append(w.to, newCstr(n+".renamed"))
		}
	}
	return w
}

func (w *nameWork) run() ([]part, error) {
	c := start()
	for range w.times {
		for i, n := range w.names {
			if err := w.one(i); err != nil {
				return nil, fmt.Errorf("%s: %w", n, err)
			}
		}
	}
	return []part{c.part(len(w.names) * w.times)}, nil
}

var errFound = errors.New("exists, and should not")

func (w *nameWork) one(i int) error {
	switch w.op {
	case "missing":
		err := rawLstat(w.root, w.names[i], &w.st)
		if err == nil {
			return errFound
		}
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	case "chmod":
		return rawChmod(w.root, w.names[i], 0o600)
	case "unlink":
		return rawUnlink(w.root, w.names[i], 0)
	case "rename":
		return rawRename(w.root, w.names[i], w.to[i])
	}
	return rawLstat(w.root, w.names[i], &w.st)
}

// mkdirWork makes the directories Names. It is never shown, only prepares.
type mkdirWork struct {
	root  int
	names []cstr
}

func (w *mkdirWork) run() ([]part, error) {
	c := start()
	for _, n := range w.names {
		if err := unix.Mkdirat(w.root, string(n[:len(n)-1]), 0o755); err != nil {
			return nil, fmt.Errorf("mkdir %s: %w", n, err)
		}
	}
	return []part{c.part(len(w.names))}, nil
}
