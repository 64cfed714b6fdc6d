package cow

import (
	"io"
	"sync"

	"golang.org/x/sys/unix"
)

// copyData copies the first size bytes of src to the empty file dst. A source
// that is shorter than size is copied as far as it goes.
func copyData(dst, src int, size int64) error {
	var st unix.Stat_t
	if err := unix.Fstat(src, &st); err != nil {
		return err
	}
	if st.Size == size && unix.IoctlFileClone(dst, src) == nil {
		return nil
	}
	size = min(size, st.Size)
	if st.Blocks*512 >= st.Size {
		return copyRange(dst, src, 0, size)
	}
	if err := unix.Ftruncate(dst, size); err != nil {
		return err
	}
	for off := int64(0); off < size; {
		data, err := unix.Seek(src, off, unix.SEEK_DATA)
		if err == unix.ENXIO { // a hole up to the end
			return nil
		}
		if err != nil {
			return copyRange(dst, src, off, size)
		}
		hole, err := unix.Seek(src, data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if data >= size {
			return nil
		}
		if err := copyRange(dst, src, data, min(hole, size)); err != nil {
			return err
		}
		off = hole
	}
	return nil
}

var copyBufs = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

func copyRange(dst, src int, from, to int64) error {
	const chunk = 64 << 20
	for from < to {
		in, out := from, from
		n, err := unix.CopyFileRange(src, &in, dst, &out, int(min(to-from, chunk)), 0)
		switch {
		case err == unix.EINTR:
		case err == unix.EXDEV, err == unix.EOPNOTSUPP, err == unix.ENOSYS, err == unix.EINVAL, err == unix.EPERM:
			return copyBuffered(dst, src, from, to)
		case err != nil:
			return err
		case n == 0:
			// Some file systems report zero where they cannot; only read(2)
			// tells the end of the file for certain.
			return copyBuffered(dst, src, from, to)
		default:
			from += int64(n)
		}
	}
	return nil
}

func copyBuffered(dst, src int, from, to int64) error {
	bp := copyBufs.Get().(*[]byte)
	defer copyBufs.Put(bp)
	for from < to {
		n, err := unix.Pread(src, (*bp)[:min(to-from, int64(len(*bp)))], from)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		for done := 0; done < n; {
			m, err := unix.Pwrite(dst, (*bp)[done:n], from+int64(done))
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return err
			}
			if m == 0 {
				return io.ErrShortWrite
			}
			done += m
		}
		from += int64(n)
	}
	return nil
}
