package transport

import (
	"bytes"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/fuseop"
)

// The requests that come by the thousand are decoded here, in the buffer they
// were read into and without allocation; all others by go-fuse.

// Reader is what a file system may implement so that data is read straight into
// the reply.
type Reader interface {
	// ReadInto is Read that stores the data in buf and returns how much there is.
	ReadInto(in *fuse.ReadIn, buf []byte) (int, fuse.Status)
}

// Idler is what a file system may implement that can prepare for requests to come.
type Idler interface {
	// HasWork reports whether Idle has anything to do.
	HasWork() bool
	// Idle does a small piece of work. It is called when no request is there.
	Idle()
}

// Diary is what a file system may implement that writes down requests until they are
// answered: those that change names, extended attributes, or what is open.
type Diary interface {
	// Answered is called when the answer to a request has been sent, with its unique
	// number.
	Answered(unique uint64)
}

// noted reports whether requests of this kind are written down.
func noted(op uint32) bool {
	const which = 1<<fuseop.Symlink | 1<<fuseop.Mknod | 1<<fuseop.Mkdir | 1<<fuseop.Unlink | 1<<fuseop.Rmdir | 1<<fuseop.Rename | 1<<fuseop.Link | 1<<fuseop.Open |
		1<<fuseop.Release | 1<<fuseop.Setxattr | 1<<fuseop.Removexattr | 1<<fuseop.Create | 1<<fuseop.Rename2 | 1<<fuseop.Tmpfile
	return uint64(which)&(1<<op) != 0
}

// Never closed: no request is interrupted.
var neverCancelled = make(chan struct{})

// in views the request as T; nil if it is too short for that.
func in[T any](b []byte) *T {
	var t T
	if uintptr(len(b)) < unsafe.Sizeof(t) {
		return nil
	}
	return (*T)(unsafe.Pointer(unsafe.SliceData(b)))
}

// reply views the body of the reply as T, set to zero.
func reply[T any](out []byte) *T {
	p := (*T)(unsafe.Pointer(unsafe.SliceData(out[outHeaderSize:])))
	var zero T
	*p = zero
	return p
}

func sizeOf[T any]() int {
	var t T
	return int(unsafe.Sizeof(t))
}

// nameAt returns the string that begins at off and ends with a NUL. It is valid
// as long as the buffer.
func nameAt(b []byte, off int) (string, bool) {
	if off >= len(b) {
		return "", false
	}
	end := bytes.IndexByte(b[off:], 0)
	if end < 0 {
		return "", false
	}
	return unsafe.String(&b[off], end), true
}

// noReply is what dispatch returns for requests that have none.
const noReply = -1

// dispatch answers a hot request: body is the size of the reply without its header,
// or noReply. done is false for all other requests, and for those that are not
// as they should be: go-fuse has the word for that.
func (l *loop) dispatch(b, out []byte) (body int, status fuse.Status, done bool) {
	h := in[fuse.InHeader](b)
	if h.TotalExtlen != 0 {
		return 0, 0, false
	}
	switch h.Opcode {
	case fuseop.Lookup:
		name, ok := nameAt(b, inHeaderSize)
		if !ok {
			break
		}
		return sizeOf[fuse.EntryOut](), l.fs.Lookup(neverCancelled, h, name, reply[fuse.EntryOut](out)), true
	case fuseop.Getattr:
		r := in[fuse.GetAttrIn](b)
		if r == nil {
			break
		}
		return sizeOf[fuse.AttrOut](), l.fs.GetAttr(neverCancelled, r, reply[fuse.AttrOut](out)), true
	case fuseop.Forget:
		r := in[fuse.ForgetIn](b)
		if r == nil {
			break
		}
		l.fs.Forget(r.NodeId, r.Nlookup)
		return noReply, 0, true
	case fuseop.BatchForget:
		return noReply, 0, l.forgetAll(b)
	case fuseop.Open:
		r := in[fuse.OpenIn](b)
		if r == nil {
			break
		}
		return sizeOf[fuse.OpenOut](), l.fs.Open(neverCancelled, r, reply[fuse.OpenOut](out)), true
	case fuseop.Release:
		r := in[fuse.ReleaseIn](b)
		if r == nil {
			break
		}
		l.fs.Release(neverCancelled, r)
		return 0, fuse.OK, true
	case fuseop.Read:
		r := in[fuse.ReadIn](b)
		if r == nil || l.reader == nil || int(r.Size) > len(out)-outHeaderSize {
			break
		}
		n, status := l.reader.ReadInto(r, out[outHeaderSize:outHeaderSize+int(r.Size)])
		return n, status, true
	case fuseop.Write:
		r := in[fuse.WriteIn](b)
		if r == nil || len(b) != sizeOf[fuse.WriteIn]()+int(r.Size) {
			break
		}
		n, status := l.fs.Write(neverCancelled, r, b[sizeOf[fuse.WriteIn]():])
		reply[fuse.WriteOut](out).Size = n
		return sizeOf[fuse.WriteOut](), status, true
	case fuseop.Getxattr:
		return l.getxattr(b, out)
	}
	return 0, 0, false
}

// forgetAll handles BATCH_FORGET.
func (l *loop) forgetAll(b []byte) (done bool) {
	type batch struct {
		fuse.InHeader
		count, _ uint32
	}
	type one struct{ node, nlookup uint64 }
	r := in[batch](b)
	if r == nil || (len(b)-sizeOf[batch]())/sizeOf[one]() < int(r.count) {
		return false
	}
	b = b[sizeOf[batch]():]
	for range r.count {
		o := in[one](b)
		l.fs.Forget(o.node, o.nlookup)
		b = b[sizeOf[one]():]
	}
	return true
}

func (l *loop) getxattr(b, out []byte) (body int, status fuse.Status, done bool) {
	r := in[fuse.GetXAttrIn](b)
	if r == nil || int(r.Size) > len(out)-outHeaderSize {
		return 0, 0, false
	}
	name, ok := nameAt(b, sizeOf[fuse.GetXAttrIn]())
	if !ok {
		return 0, 0, false
	}
	n, status := l.fs.GetXAttr(neverCancelled, &r.InHeader, name, out[outHeaderSize:outHeaderSize+int(r.Size)])
	if r.Size == 0 {
		if status == fuse.ERANGE {
			status = fuse.OK // the size was asked for
		}
		reply[fuse.GetXAttrOut](out).Size = n
		return sizeOf[fuse.GetXAttrOut](), status, true
	}
	return int(n), status, true
}

// answer finishes a reply that dispatch has made; its length includes the header.
func answer(out, in []byte, body int, status fuse.Status) []byte {
	if status != fuse.OK {
		return errorReply(out, in, unix.Errno(status))
	}
	out = out[:outHeaderSize+body]
	header := (*struct {
		length uint32
		errno  int32
		unique [8]byte
	})(unsafe.Pointer(unsafe.SliceData(out)))
	header.length, header.errno = uint32(len(out)), 0
	copy(header.unique[:], in[8:16])
	return out
}
