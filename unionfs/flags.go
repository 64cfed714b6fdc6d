package unionfs

import (
	"encoding/binary"
	"errors"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// Inode flags (chattr(1)) are those of the real file, except for "immutable"
// and "append only": set on a file of the upper they would keep us from copying
// and moving it, so they are kept in the attribute "protattr", as kernel
// overlayfs does (ovl_set_protattr), and obeyed here.

// protection is what a file or directory is protected from.
type protection uint8

const (
	immutable protection = 1 << iota
	appendOnly
)

// The ioctls that the kernel passes on besides those of package fsat, and where
// they have the two flags.
const (
	fsIocFsGetXattr = 0x801c581f
	fsIocFsSetXattr = 0x401c5820

	flagsSize   = 4  // of the flags
	fsxattrSize = 28 // struct fsxattr; the flags come first

	fsImmutable = 0x10
	fsAppend    = 0x20
	xImmutable  = 0x8
	xAppend     = 0x10
)

// flagBits tells which bits of an ioctl's flags stand for the protections.
type flagBits struct {
	size              int
	immutable, append uint32
}

var (
	inodeFlags  = flagBits{flagsSize, fsImmutable, fsAppend}
	fsxattrBits = flagBits{fsxattrSize, xImmutable, xAppend}
)

func (b flagBits) of(p protection) (bits uint32) {
	if p&immutable != 0 {
		bits |= b.immutable
	}
	if p&appendOnly != 0 {
		bits |= b.append
	}
	return bits
}

func (b flagBits) protection(bits uint32) (p protection) {
	if bits&b.immutable != 0 {
		p |= immutable
	}
	if bits&b.append != 0 {
		p |= appendOnly
	}
	return p
}

// Ioctl implements IOCTL for the inode flags; there are no others.
func (fs *FS) Ioctl(_ <-chan struct{}, in *fuse.IoctlIn, inbuf []byte, _ *fuse.IoctlOut, outbuf []byte) fuse.Status {
	n := fs.node(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	var err error
	switch in.Cmd {
	case fsat.IocGetFlags:
		err = fs.getFlags(n, in.Cmd, inodeFlags, outbuf)
	case fsIocFsGetXattr:
		err = fs.getFlags(n, in.Cmd, fsxattrBits, outbuf)
	case fsat.IocSetFlags:
		err = fs.setFlags(n, fsat.IocGetFlags, in.Cmd, inodeFlags, inbuf)
	case fsIocFsSetXattr:
		err = fs.setFlags(n, fsIocFsGetXattr, in.Cmd, fsxattrBits, inbuf)
	default:
		return fuse.Status(unix.ENOTTY)
	}
	return fs.status("ioctl", n, err)
}

func (fs *FS) getFlags(n *inode, cmd uint32, b flagBits, out []byte) error {
	if len(out) < b.size {
		return unix.EINVAL
	}
	n.mu.RLock()
	defer n.mu.RUnlock()
	var buf [fsxattrSize]byte
	err := fs.withFileLocked(n, func(fd int) error { return fsat.Ioctl(fd, cmd, buf[:]) })
	if err != nil {
		return err
	}
	flags := binary.NativeEndian.Uint32(buf[:]) &^ b.of(immutable|appendOnly)
	binary.NativeEndian.PutUint32(buf[:], flags|b.of(n.prot))
	copy(out, buf[:b.size])
	return nil
}

// setFlags gives the file the flags in want. Who may do that has been checked
// by the kernel, which compares with the flags there were.
func (fs *FS) setFlags(n *inode, get, set uint32, b flagBits, want []byte) error {
	if len(want) < b.size {
		return unix.EINVAL
	}
	if err := fs.ensureUpper(n); err != nil {
		return err
	}
	if n.isDir() {
		// Not while an object is made that would inherit them.
		n.dir.opMu.Lock()
		defer n.dir.opMu.Unlock()
		defer n.dir.flags.Store(nil)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	flags := binary.NativeEndian.Uint32(want)
	if p := b.protection(flags); p != n.prot {
		if err := fs.setProtection(n, p); err != nil {
			return err
		}
	}
	var buf, have [fsxattrSize]byte
	copy(buf[:], want[:b.size])
	binary.NativeEndian.PutUint32(buf[:], flags&^b.of(immutable|appendOnly))
	err := fs.withFileLocked(n, func(fd int) error {
		if err := fsat.Ioctl(fd, get, have[:]); err != nil {
			return err
		}
		if have == buf {
			return nil
		}
		return fsat.Ioctl(fd, set, buf[:])
	})
	if e := n.ext.Load(); e != nil {
		e.noAtime.Store(false)
	}
	fs.staleAttr(n) // st_ctime: for the kernel an ioctl changes nothing
	return err
}

// protattr is the attribute that holds an object's protections.
const protattr = "protattr"

// value is how the attribute writes them; nil if there are none.
func (p protection) value() (v []byte) {
	if p&appendOnly != 0 {
		v = append(v, 'a')
	}
	if p&immutable != 0 {
		v = append(v, 'i')
	}
	return v
}

// setProtection records the protections of an object in the upper.
// Preconditions: n.mu is held exclusively.
func (fs *FS) setProtection(n *inode, p protection) error {
	v := p.value()
	err := fs.withRealLocked(n, func(dirfd int, name string) error {
		attr := fs.upper.dialect.Attr(protattr)
		if v == nil {
			err := fsat.Removexattr(dirfd, name, attr)
			if errors.Is(err, unix.ENODATA) {
				err = nil
			}
			return err
		}
		return fsat.Setxattr(dirfd, name, attr, v, 0)
	})
	if err == nil {
		n.prot = p
	}
	return err
}

// readProtection reads what setProtection has recorded.
func (fs *FS) readProtection(dirfd int, name string) (p protection, err error) {
	v, err := fsat.GetxattrValue(dirfd, name, fs.upper.dialect.Attr(protattr))
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
		return 0, nil
	}
	for _, c := range v {
		switch c {
		case 'a':
			p |= appendOnly
		case 'i':
			p |= immutable
		}
	}
	return p, err
}

// protectionOf tells the protections that an object has by the flags of its own
// file system, from its STATX_ATTR_*: so it is with lower objects, and with those
// of an upper that somebody else has prepared.
func protectionOf(attributes uint64) (p protection) {
	if attributes&unix.STATX_ATTR_IMMUTABLE != 0 {
		p |= immutable
	}
	if attributes&unix.STATX_ATTR_APPEND != 0 {
		p |= appendOnly
	}
	return p
}

// withFileLocked calls fn with a descriptor of the file or directory that is
// open for reading. Preconditions: n.mu is held.
func (fs *FS) withFileLocked(n *inode, fn func(fd int) error) error {
	if n.typ() != unix.S_IFREG && !n.isDir() {
		return unix.ENOTTY
	}
	return fs.withRealLocked(n, func(dirfd int, name string) error { return openReal(n, dirfd, name, fn) })
}

// openReal calls fn with a descriptor of the file or directory behind n, which
// is (dirfd, name), open for reading.
func openReal(n *inode, dirfd int, name string, fn func(fd int) error) (err error) {
	var fd int
	if n.isDir() {
		if name == "" {
			name = "."
		}
		fd, err = fsat.OpenName(dirfd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	} else if name == "" {
		fd, err = fsat.Reopen(dirfd, unix.O_RDONLY)
	} else {
		fd, err = fsat.OpenRegular(dirfd, name, unix.O_RDONLY)
	}
	if err != nil {
		return err
	}
	defer fsat.Close(fd)
	return fn(fd)
}

// handedDown are the inode flags that a directory hands down.
type handedDown struct{ file, dir uint32 }

// flagsFor returns the inode flags of a new object of the type in the directory of
// the upper behind dirfd. Most are made elsewhere first, where the file system would
// give them other flags. One that has no flags hands down none.
func (d *dirState) flagsFor(dirfd int, typ uint32) uint32 {
	h := d.flags.Load()
	if h == nil {
		h = new(handedDown)
		if fd, err := fsat.OpenName(dirfd, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0); err == nil {
			if file, dir, err := fsat.InheritedFlags(fd); err == nil {
				h.file, h.dir = file, dir
			}
			fsat.Close(fd)
		}
		d.flags.Store(h)
	}
	switch typ {
	case unix.S_IFREG:
		return h.file
	case unix.S_IFDIR:
		return h.dir
	}
	return 0
}

// protectionNow returns the protections.
func (n *inode) protectionNow() protection {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.prot
}

// protected returns EPERM if n has one of the protections.
func (n *inode) protected(from protection) error {
	if n.protectionNow()&from != 0 {
		return unix.EPERM
	}
	return nil
}

// mayOpen refuses to open a protected file for what it is protected from
// (kernel: may_open, inode_permission).
func (n *inode) mayOpen(flags uint32) error {
	write, trunc := flags&unix.O_ACCMODE != unix.O_RDONLY, flags&unix.O_TRUNC != 0
	var p protection
	if write || trunc {
		p |= immutable
	}
	if write && flags&unix.O_APPEND == 0 || trunc {
		p |= appendOnly
	}
	if p == 0 {
		return nil
	}
	return n.protected(p)
}

// maySetAttr refuses to change a protected object's attributes (kernel:
// may_setattr, vfs_truncate, do_ftruncate).
func (n *inode) maySetAttr(in *fuse.SetAttrInCommon) error {
	const own = fuse.FATTR_MODE | fuse.FATTR_UID | fuse.FATTR_GID
	var p protection
	_, size := in.GetSize()
	_, byHandle := in.GetFh()
	if size {
		p |= appendOnly
		if !byHandle {
			p |= immutable
		}
	}
	if in.Valid&own != 0 ||
		in.Valid&fuse.FATTR_ATIME != 0 && in.Valid&fuse.FATTR_ATIME_NOW == 0 ||
		in.Valid&fuse.FATTR_MTIME != 0 && in.Valid&fuse.FATTR_MTIME_NOW == 0 {
		p |= immutable | appendOnly
	}
	if in.Valid&(fuse.FATTR_ATIME|fuse.FATTR_MTIME) != 0 && !size {
		p |= immutable
	}
	if p == 0 {
		return nil
	}
	return n.protected(p)
}
