package oracle

import (
	"fmt"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapped maps the part of a file that lies before its end and calls f.
func (a *agent) mapped(op Op, prot int, f func(b []byte) error) error {
	fd, err := a.fd(op.FD)
	if err != nil {
		return err
	}
	if !a.written[op.FD] && !strings.Contains(op.Flags, "RDONLY") {
		return errNotRun // see Accepted: mmap of a read-only descriptor
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	page := op.Off &^ 4095
	n := min(op.Off+op.Len, st.Size) - page
	if st.Mode&unix.S_IFMT != unix.S_IFREG || n <= op.Off-page {
		return errNotRun
	}
	b, err := unix.Mmap(fd, page, int(n), prot, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	err = f(b[op.Off-page:])
	if e := unix.Munmap(b); err == nil {
		err = e
	}
	return err
}

func opMmapRead(a *agent, op Op) (out string, err error) {
	err = a.mapped(op, unix.PROT_READ, func(b []byte) error {
		out = showBytes(slices.Clone(b))
		return nil
	})
	return out, err
}

func opMmapWrite(a *agent, op Op) (out string, err error) {
	err = a.mapped(op, unix.PROT_READ|unix.PROT_WRITE, func(b []byte) error {
		out = fmt.Sprint(copy(b, op.data()))
		return nil
	})
	if err != nil {
		return "", err
	}
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	return out, unix.Fsync(fd)
}

// opMsync stores through a mapping of one descriptor and reads through another
// one, before and after msync; then the other way round.
func opMsync(a *agent, op Op) (string, error) {
	other, err := a.fd(op.FD2)
	if err != nil {
		return "", err
	}
	var out []string
	err = a.mapped(op, unix.PROT_READ|unix.PROT_WRITE, func(b []byte) error {
		buf := make([]byte, len(b))
		look := func(when string) error {
			n, err := unix.Pread(other, buf, op.Off)
			out = append(out, fmt.Sprintf("%s: %t", when, string(buf[:max(n, 0)]) == string(b)))
			return err
		}
		copy(b, op.data())
		if err := look("stored"); err != nil {
			return err
		}
		// The start of a mapping is the start of a page.
		page := op.Off & 4095
		whole := unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(&b[0]), -int(page))), int(page)+len(b))
		if err := unix.Msync(whole, unix.MS_SYNC); err != nil {
			return fmt.Errorf("msync: %w", err)
		}
		if err := look("synced"); err != nil {
			return err
		}
		if _, err := unix.Pwrite(other, Pattern(op.Seed+1, int64(len(b))), op.Off); err != nil {
			return nil // it need not be open for writing
		}
		return look("written")
	})
	return strings.Join(out, ", "), err
}
