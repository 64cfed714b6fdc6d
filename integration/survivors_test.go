package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/oracle"
)

// survivors are programs that work in a directory and notice when an operation fails, is
// lost, or happens twice.
var survivors = map[string]func(dir string, r *rand.Rand, stop <-chan struct{}) (ops int, err error){
	"names": surviveNames, "data": surviveData, "unlinked": surviveUnlinked, "attributes": surviveAttributes,
	"appends": surviveAppends, "unnamed": surviveUnnamed, "exclusive": surviveExclusive, "listings": surviveListings,
	"opens": surviveOpens, "locks": surviveLocks, "maps": surviveMaps,
}

// workshop is the layer that the survivors begin with.
func workshop() oracle.Layer {
	l := oracle.Layer{}
	for name := range survivors {
		l.Entries = append(l.Entries, oracle.Entry{Path: oracle.Name(name), Kind: oracle.Dir}, oracle.Entry{Path: oracle.Name(name + "/deep"), Kind: oracle.Dir})
		for i := range 40 {
			for _, dir := range []string{name, name + "/deep"} {
				l.Entries = append(l.Entries, oracle.Entry{Path: oracle.Name(fmt.Sprintf("%s/low%d", dir, i)), Kind: oracle.File, Size: int64(20000 * (i % 3)), Seed: int64(i)})
			}
		}
	}
	return l
}

func stopped(stop <-chan struct{}) bool {
	select {
	case <-stop:
		return true
	default:
		return false
	}
}

// surviveNames changes names at random and expects each change once.
func surviveNames(dir string, r *rand.Rand, stop <-chan struct{}) (ops int, err error) {
	content := map[string]string{}
	for i := range 40 {
		name := fmt.Sprintf("low%d", i)
		content[name] = string(oracle.Pattern(int64(i), int64(20000*(i%3))))
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	pick := func() string {
		names := make([]string, 0, len(content))
		for n := range content {
			names = append(names, n)
		}
		slices.Sort(names)
		return names[r.IntN(len(names))]
	}
	fresh := func() string { return fmt.Sprintf("n%d", r.IntN(1e9)) }
	for ; !stopped(stop); ops++ {
		switch r.IntN(9) {
		case 0:
			name := fresh()
			content[name] = fmt.Sprint("content of ", name)
			err = os.WriteFile(at(name), []byte(content[name]), 0o644)
		case 1, 2:
			old, name := pick(), fresh()
			err = os.Rename(at(old), at(name))
			content[name] = content[old]
			delete(content, old)
		case 3: // over another one
			old, name := pick(), pick()
			if old == name || content[old] == content[name] {
				continue
			}
			err = os.Rename(at(old), at(name))
			content[name] = content[old]
			delete(content, old)
		case 4:
			a, b := pick(), pick()
			if a == b {
				continue
			}
			err = unix.Renameat2(unix.AT_FDCWD, at(a), unix.AT_FDCWD, at(b), unix.RENAME_EXCHANGE)
			content[a], content[b] = content[b], content[a]
		case 5:
			if len(content) < 10 {
				continue
			}
			name := pick()
			err = os.Remove(at(name))
			delete(content, name)
		case 6: // a second name for a moment
			old, name := pick(), fresh()
			if err = os.Link(at(old), at(name)); err == nil {
				err = os.Remove(at(old))
			}
			content[name] = content[old]
			delete(content, old)
		case 7: // a directory that comes, moves and goes
			a, b := at(fresh()), at(fresh())
			if err = os.Mkdir(a, 0o755); err == nil {
				err = errors.Join(os.WriteFile(a+"/x", nil, 0o644), os.Rename(a, b), os.Rename(b+"/x", b+"/y"), os.Remove(b+"/y"), os.Remove(b))
			}
		case 8:
			name := pick()
			var b []byte
			if b, err = os.ReadFile(at(name)); err == nil && string(b) != content[name] {
				err = fmt.Errorf("%s has %d bytes, not its %d", name, len(b), len(content[name]))
			}
		}
		if err != nil {
			return ops, err
		}
	}
	list, err := os.ReadDir(dir)
	if err != nil {
		return ops, err
	}
	for _, e := range list {
		b, err := os.ReadFile(at(e.Name()))
		switch {
		case e.Name() == "deep":
		case err != nil || string(b) != content[e.Name()]:
			return ops, fmt.Errorf("%s at the end: %d bytes, %w", e.Name(), len(b), err)
		default:
			delete(content, e.Name())
		}
	}
	if len(content) > 0 {
		return ops, fmt.Errorf("missing at the end: %d names", len(content))
	}
	return ops, nil
}

// exercise reads, writes and truncates an open file at random, and knows what is in it.
func exercise(f *os.File, model []byte, r *rand.Rand, steps int) ([]byte, error) {
	for range steps {
		off := r.IntN(len(model) + 1)
		switch r.IntN(6) {
		case 0, 1:
			b := make([]byte, 1+r.IntN(30000))
			for i := range b {
				b[i] = byte(r.Uint32())
			}
			if _, err := f.WriteAt(b, int64(off)); err != nil {
				return model, err
			}
			if end := off + len(b); end > len(model) {
				model = append(model, make([]byte, end-len(model))...)
			}
			copy(model[off:], b)
		case 2:
			size := r.IntN(200000)
			if err := f.Truncate(int64(size)); err != nil {
				return model, err
			}
			if size > len(model) {
				model = append(model, make([]byte, size-len(model))...)
			}
			model = model[:size]
		case 3:
			if err := f.Sync(); err != nil {
				return model, err
			}
		case 4:
			n := min(len(model)-off, 1+r.IntN(20000))
			if n <= 0 {
				continue
			}
			if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n)); err != nil {
				return model, err
			}
			clear(model[off : off+n])
		case 5:
			b := make([]byte, len(model)-off)
			n, err := f.ReadAt(b, int64(off))
			if err != nil && (err != io.EOF || n < len(b)) {
				return model, err
			}
			if !bytes.Equal(b, model[off:]) {
				return model, fmt.Errorf("%s: other data from %d on", f.Name(), off)
			}
			st, err := f.Stat()
			if err != nil {
				return model, err
			}
			if st.Size() != int64(len(model)) {
				return model, fmt.Errorf("%s has %d bytes, not %d", f.Name(), st.Size(), len(model))
			}
		}
	}
	return model, nil
}

// surviveData changes the data of files of the lowers, copied up when they are opened.
func surviveData(dir string, r *rand.Rand, stop <-chan struct{}) (ops int, err error) {
	for i := 0; !stopped(stop); i = (i + 1) % 40 {
		name := filepath.Join(dir, fmt.Sprintf("low%d", i))
		model, err := os.ReadFile(name)
		if err != nil {
			return ops, err
		}
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return ops, err
		}
		model, err = exercise(f, model, r, 60)
		if err = errors.Join(err, f.Close()); err != nil {
			return ops, err
		}
		if b, err := os.ReadFile(name); err != nil || !bytes.Equal(b, model) {
			return ops, fmt.Errorf("%s read again: %w", name, err)
		}
		ops += 60
	}
	return ops, nil
}

// surviveUnlinked works in files that have no name any more, of the lowers and new ones.
func surviveUnlinked(dir string, r *rand.Rand, stop <-chan struct{}) (ops int, err error) {
	for i := 0; !stopped(stop); i++ {
		name, flags := filepath.Join(dir, fmt.Sprint("new", i)), os.O_RDWR|os.O_CREATE|os.O_EXCL
		var model []byte
		if i < 40 {
			name, flags = filepath.Join(dir, fmt.Sprint("low", i)), os.O_RDWR
			if i%2 == 0 {
				flags = os.O_RDONLY
			}
			model = []byte(oracle.Pattern(int64(i), int64(20000*(i%3))))
		}
		f, err := os.OpenFile(name, flags, 0o644)
		if err != nil {
			return ops, err
		}
		if err := os.Remove(name); err != nil {
			return ops, err
		}
		for range 4 {
			if flags == os.O_RDONLY {
				b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<20))
				if err != nil || !bytes.Equal(b, model) {
					return ops, fmt.Errorf("%s, removed: %d bytes, %w", name, len(b), err)
				}
				if err := f.Chmod(0o600); err != nil {
					return ops, err
				}
			} else if model, err = exercise(f, model, r, 10); err != nil {
				return ops, err
			}
			<-time.After(time.Duration(r.IntN(10)) * time.Millisecond)
		}
		if err := f.Close(); err != nil {
			return ops, err
		}
		ops += 40
	}
	return ops, nil
}

// surviveAttributes makes and removes extended attributes where either must not be there
// already, and changes modes and times.
func surviveAttributes(dir string, r *rand.Rand, stop <-chan struct{}) (ops int, err error) {
	for ; !stopped(stop); ops++ {
		name := filepath.Join(dir, fmt.Sprint("low", r.IntN(40)))
		mode := 0o600 + r.Uint32N(0o100)
		mtime := time.Unix(int64(r.Uint32()), 5000)
		err := errors.Join(
			unix.Setxattr(name, "user.survives", []byte("1"), unix.XATTR_CREATE), unix.Setxattr(name, "user.survives", []byte("22"), unix.XATTR_REPLACE),
			os.Chmod(name, os.FileMode(mode)), os.Chtimes(name, mtime, mtime), unix.Removexattr(name, "user.survives"))
		if err != nil {
			return ops, err
		}
		st, err := os.Stat(name)
		if err != nil {
			return ops, err
		}
		if uint32(st.Mode().Perm()) != mode || !st.ModTime().Equal(mtime) {
			return ops, fmt.Errorf("%s: mode %v, time %v; set %o and %v", name, st.Mode(), st.ModTime(), mode, mtime)
		}
	}
	return ops, nil
}

// surviveAppends appends by two descriptors and expects every record once.
func surviveAppends(dir string, _ *rand.Rand, stop <-chan struct{}) (ops int, err error) {
	name := filepath.Join(dir, "log")
	var want bytes.Buffer
	for !stopped(stop) {
		a, err := os.OpenFile(name, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			return ops, err
		}
		b, err := os.OpenFile(name, os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			return ops, err
		}
		for range 50 {
			for _, f := range []*os.File{a, b} {
				fmt.Fprintf(&want, "record %d\n", ops)
				if _, err := fmt.Fprintf(f, "record %d\n", ops); err != nil {
					return ops, err
				}
				ops++
			}
		}
		if err := errors.Join(a.Close(), b.Close()); err != nil {
			return ops, err
		}
	}
	got, err := os.ReadFile(name)
	if err == nil && !bytes.Equal(got, want.Bytes()) {
		err = fmt.Errorf("%d bytes, expected %d", len(got), want.Len())
	}
	return ops, err
}

// surviveUnnamed makes files without a name and gives them one.
func surviveUnnamed(dir string, r *rand.Rand, stop <-chan struct{}) (ops int, err error) {
	for ; !stopped(stop); ops++ {
		f, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, 0o644)
		if err != nil {
			return ops, err
		}
		model, err := exercise(f, nil, r, 10)
		if err != nil {
			return ops, err
		}
		name := filepath.Join(dir, fmt.Sprint("named", ops))
		if err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, name, unix.AT_SYMLINK_FOLLOW); err != nil {
			return ops, err
		}
		if model, err = exercise(f, model, r, 10); err != nil {
			return ops, err
		}
		b, err := os.ReadFile(name)
		if err != nil || !bytes.Equal(b, model) {
			return ops, fmt.Errorf("%s: %d bytes, expected %d: %w", name, len(b), len(model), err)
		}
		if err := errors.Join(os.Remove(name), f.Close()); err != nil {
			return ops, err
		}
	}
	return ops, nil
}

// surviveExclusive makes what must not be there yet and removes what must, in all forms.
func surviveExclusive(dir string, _ *rand.Rand, stop <-chan struct{}) (ops int, err error) {
	name := filepath.Join(dir, "deep", "only")
	for ; !stopped(stop); ops++ {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return ops, err
		}
		err = errors.Join(f.Close(), os.Remove(name), os.Mkdir(name, 0o700), os.Remove(name), os.Symlink("target", name), os.Remove(name),
			unix.Mkfifo(name, 0o600), os.Rename(name, name+"2"), os.Link(name+"2", name), os.Remove(name), os.Remove(name+"2"))
		if err != nil {
			return ops, err
		}
	}
	return ops, nil
}

// surviveListings lists a directory slowly while names come and go: those that stay are
// seen once.
func surviveListings(dir string, r *rand.Rand, stop <-chan struct{}) (ops int, err error) {
	stay := map[string]bool{}
	for i := range 600 {
		name := fmt.Sprint("stays", i)
		if err := os.WriteFile(filepath.Join(dir, "deep", name), nil, 0o600); err != nil {
			return ops, err
		}
		stay[name] = true
	}
	for ; !stopped(stop); ops++ {
		d, err := os.Open(filepath.Join(dir, "deep"))
		if err != nil {
			return ops, err
		}
		seen := map[string]int{}
		for {
			names, err := d.Readdirnames(50)
			for _, n := range names {
				seen[n]++
			}
			if err == io.EOF {
				break
			}
			if err != nil {
				return ops, err
			}
			temp := filepath.Join(dir, "deep", fmt.Sprint("temp", r.IntN(1e6)))
			if err := errors.Join(os.WriteFile(temp, nil, 0o600), os.Remove(temp)); err != nil {
				return ops, err
			}
		}
		if err := d.Close(); err != nil {
			return ops, err
		}
		for n := range stay {
			if seen[n] != 1 {
				return ops, fmt.Errorf("%s is listed %d times", n, seen[n])
			}
		}
	}
	return ops, nil
}

// surviveOpens opens files in all ways, before and after they are copied up.
func surviveOpens(dir string, r *rand.Rand, stop <-chan struct{}) (ops int, err error) {
	var open []*os.File
	for ; !stopped(stop); ops++ {
		flags := []int{os.O_RDONLY, os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_WRONLY | os.O_APPEND}[r.IntN(5)]
		f, err := os.OpenFile(filepath.Join(dir, fmt.Sprint("low", r.IntN(40))), flags, 0)
		if err != nil {
			return ops, err
		}
		if flags != os.O_WRONLY && flags&os.O_APPEND == 0 {
			if _, err := io.Copy(io.Discard, f); err != nil {
				return ops, err
			}
		}
		if flags == os.O_RDWR {
			if _, err := f.WriteAt([]byte("x"), 5); err != nil {
				return ops, err
			}
		}
		open = append(open, f)
		for len(open) > r.IntN(40) {
			if err := open[0].Close(); err != nil {
				return ops, err
			}
			open = open[1:]
		}
	}
	for _, f := range open {
		err = errors.Join(err, f.Close())
	}
	return ops, err
}

// surviveLocks holds locks that nobody else may get.
func surviveLocks(dir string, _ *rand.Rand, stop <-chan struct{}) (ops int, err error) {
	name := filepath.Join(dir, "low1")
	held, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer held.Close()
	whole := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := errors.Join(unix.Flock(int(held.Fd()), unix.LOCK_EX), unix.FcntlFlock(held.Fd(), unix.F_OFD_SETLK, &whole)); err != nil {
		return 0, err
	}
	for ; !stopped(stop); ops++ {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return ops, err
		}
		theirs := whole
		if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			return ops, fmt.Errorf("a second flock: %w", err)
		}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &theirs); !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
			return ops, fmt.Errorf("a second lock: %w", err)
		}
		if err := f.Close(); err != nil {
			return ops, err
		}
		<-time.After(time.Millisecond)
	}
	return ops, nil
}

// surviveMaps writes through a shared mapping and reads by a descriptor, and the other way
// round.
func surviveMaps(dir string, r *rand.Rand, stop <-chan struct{}) (ops int, err error) {
	const size = 256 << 10
	f, err := os.OpenFile(filepath.Join(dir, "mapped"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return 0, err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unix.Munmap(m)) }()
	for ; !stopped(stop); ops++ {
		off := r.IntN(size - 8)
		text := fmt.Sprintf("%08d", ops)
		copy(m[off:], text)
		if ops%16 == 0 {
			if err := unix.Msync(m, unix.MS_SYNC); err != nil {
				return ops, err
			}
		}
		b := make([]byte, 8)
		if _, err := f.ReadAt(b, int64(off)); err != nil || string(b) != text {
			return ops, fmt.Errorf("read at %d: %q, expected %q: %w", off, b, text, err)
		}
		if _, err := f.WriteAt([]byte("written."), int64(off)); err != nil {
			return ops, err
		}
		if got := string(m[off : off+8]); got != "written." {
			return ops, fmt.Errorf("mapped at %d: %q", off, got)
		}
	}
	return ops, nil
}
