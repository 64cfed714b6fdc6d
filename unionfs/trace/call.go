package trace

import (
	"encoding/binary"
	"fmt"
	"path"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/fuseop"
)

// Call is a request that is being answered while somebody listens.
type Call struct {
	hub      *Hub
	resolver Resolver
	event    Event
	opcode   uint32
	node     uint64 // of the header
	object   uint64 // whose layer counts; 0: not known yet
	layer    int    // of object
	dirLayer int    // of node
	began    time.Time
}

const (
	headerIn  = 40
	headerOut = 16
)

// Begin notes a request before it is carried out. It returns nil for what the kernel says on
// its own account. in is not kept.
func (h *Hub) Begin(opcode uint32, op string, in []byte, r Resolver) *Call {
	switch opcode {
	case fuseop.Forget, fuseop.BatchForget, fuseop.Init, fuseop.Interrupt, fuseop.Destroy, fuseop.NotifyReply:
		return nil
	}
	if len(in) < headerIn {
		return nil
	}
	now := time.Now()
	c := &Call{hub: h, resolver: r, opcode: opcode, began: now, node: binary.NativeEndian.Uint64(in[16:]), layer: -1, dirLayer: -1}
	e := &c.event
	e.Time, e.Op = now, op
	e.UID, e.GID, e.Thread = binary.NativeEndian.Uint32(in[24:]), binary.NativeEndian.Uint32(in[28:]), binary.NativeEndian.Uint32(in[32:])
	who := h.people.of(e.Thread, now)
	e.Pid, e.Command, e.Container = who.pid, who.command, who.container
	e.Path, c.dirLayer = r.Where(c.node)
	c.decode(body(in[headerIn:]))
	if c.object != 0 {
		_, c.layer = r.Where(c.object)
	}
	if c.dirLayer > 0 || c.layer > 0 {
		c.countDirs()
	}
	return c
}

// countDirs notes how many directories above what may be copied up would be, too.
func (c *Call) countDirs() {
	target := c.node // of a new name, its directory
	if c.layer > 0 && c.object != 0 && c.copies() {
		target = c.object
	}
	_, c.event.Dirs = c.resolver.Lower(target)
}

// copies reports whether the request is one that copies up the object, not its directory.
func (c *Call) copies() bool {
	switch c.opcode {
	case fuseop.Unlink, fuseop.Rmdir:
		return false
	}
	return true
}

// body is what follows the header of a request. Reading past its end gives zeros.
type body []byte

func (b body) u32(at int) uint32 {
	if len(b) < at+4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b[at:])
}

func (b body) u64(at int) uint64 {
	if len(b) < at+8 {
		return 0
	}
	return binary.NativeEndian.Uint64(b[at:])
}

// names returns the strings from at on, each with a NUL at its end.
func (b body) names(at int) (first, second string) {
	if len(b) <= at {
		return "", ""
	}
	first, rest, _ := strings.Cut(string(b[at:]), "\x00")
	second, _, _ = strings.Cut(rest, "\x00")
	return first, second
}

// named makes the event one about a name in the directory of the header.
func (c *Call) named(name string) {
	c.object = c.resolver.Child(c.node, name)
	c.event.Path = join(c.event.Path, name)
}

// join is a name in a directory; "" if the directory has no path.
func join(dir, name string) string {
	if dir == "" {
		return ""
	}
	return path.Join(dir, name)
}

// decode takes out of a request what an event says.
func (c *Call) decode(b body) {
	e := &c.event
	switch c.opcode {
	case fuseop.Lookup, fuseop.Unlink, fuseop.Rmdir:
		name, _ := b.names(0)
		c.named(name)
	case fuseop.Symlink:
		name, target := b.names(0)
		c.named(name)
		e.To = target
	case fuseop.Mknod:
		name, _ := b.names(16)
		c.named(name)
		e.Detail = modeText(b.u32(0))
	case fuseop.Mkdir:
		name, _ := b.names(8)
		c.named(name)
		e.Detail = modeText(unix.S_IFDIR | b.u32(0))
	case fuseop.Create:
		name, _ := b.names(16)
		c.named(name)
		e.Detail = openText(b.u32(0)) + " " + modeText(b.u32(4))
	case fuseop.Tmpfile:
		c.object = 0
		e.Detail = openText(b.u32(0)) + " " + modeText(b.u32(4))
	case fuseop.Rename, fuseop.Rename2:
		at := 8
		if c.opcode == fuseop.Rename2 {
			at = 16
			e.Detail = flagText(b.u32(8), renameFlags)
		}
		from, to := b.names(at)
		c.named(from)
		dir, _ := c.resolver.Where(b.u64(0))
		e.To = join(dir, to)
	case fuseop.Link:
		name, _ := b.names(8)
		e.To = join(e.Path, name)
		c.object = b.u64(0)
		e.Path, _ = c.resolver.Where(c.object)
	case fuseop.Setxattr:
		e.Detail, _ = b.names(16)
		e.Size = int64(b.u32(0))
	case fuseop.Getxattr:
		e.Detail, _ = b.names(8)
	case fuseop.Removexattr:
		e.Detail, _ = b.names(0)
	case fuseop.Open, fuseop.Opendir, fuseop.Release, fuseop.Releasedir:
		at := 0
		if c.opcode == fuseop.Release || c.opcode == fuseop.Releasedir {
			at = 8
		}
		e.Detail = openText(b.u32(at))
	case fuseop.Read, fuseop.Write, fuseop.Readdir, fuseop.Readdirplus:
		e.Offset, e.Size = int64(b.u64(8)), int64(b.u32(16))
	case fuseop.Fallocate:
		e.Offset, e.Size, e.Detail = int64(b.u64(8)), int64(b.u64(16)), flagText(b.u32(24), fallocFlags)
	case fuseop.Lseek:
		e.Offset, e.Detail = int64(b.u64(8)), whenceText(b.u32(16))
	case fuseop.CopyFileRange:
		e.Offset, e.Size = int64(b.u64(8)), int64(b.u64(40))
		c.object = b.u64(16) // what is written to
		e.To, _ = c.resolver.Where(c.object)
	case fuseop.Fsync, fuseop.Fsyncdir:
		if b.u32(8)&1 != 0 {
			e.Detail = "data only"
		}
	case fuseop.Setattr:
		e.Detail = attrText(b)
		if b.u32(0)&1<<3 != 0 {
			e.Size = int64(b.u64(16))
		}
	case fuseop.Access:
		e.Detail = fmt.Sprintf("mask %o", b.u32(0))
	case fuseop.Ioctl:
		e.Detail = fmt.Sprintf("command %#x", b.u32(12))
	}
	if !c.hasName() && c.object == 0 && c.opcode != fuseop.Tmpfile {
		c.object, c.layer = c.node, c.dirLayer
	}
}

// hasName reports whether the request is about a name in a directory.
func (c *Call) hasName() bool {
	switch c.opcode {
	case fuseop.Lookup, fuseop.Unlink, fuseop.Rmdir, fuseop.Symlink, fuseop.Mknod, fuseop.Mkdir, fuseop.Create, fuseop.Rename, fuseop.Rename2:
		return true
	}
	return false
}

// Event is what is known before the request is carried out.
func (c *Call) Event() *Event { return &c.event }

// Injected notes that the request met a fault that somebody has asked for.
func (c *Call) Injected() { c.event.Injected = true }

// End tells the listeners. reply is the whole answer; errno what it says, also for a name
// that is absent.
func (c *Call) End(reply []byte, errno syscall.Errno) {
	e := &c.event
	e.Latency = time.Since(c.began)
	e.Error = errorName(errno)
	if errno == 0 {
		c.result(reply)
	}
	e.Node = c.object
	if e.Node == 0 {
		e.Node = c.node
	}
	e.Layer, e.Label = LayerName(c.layer), c.hub.label(c.layer)
	object, dir := c.copied(c.object, c.layer), c.copied(c.node, c.dirLayer)
	if e.CopiedUp = object || dir; !e.CopiedUp {
		e.Dirs = 0
	}
	if e.CopiedUp && c.hub.history != nil {
		c.hub.history.Add(c.line(object))
	}
	c.hub.emit(e)
}

// line is the line of the history about a copy: of the object, or else of its directory.
func (c *Call) line(object bool) Copied {
	e := &c.event
	l := Copied{
		Time: e.Time.Round(0).UTC(), Path: e.Path, Op: e.Op, Detail: e.Detail, Pid: e.Pid, Command: e.Command, Container: e.Container, UID: e.UID,
		From: LayerName(c.layer), Dirs: e.Dirs,
	}
	if !object && c.hasName() {
		l.Path, l.From = path.Dir(l.Path), LayerName(c.dirLayer)
	}
	return l
}

// MayCopy reports whether a request may copy something up: then it is worth a line of the history.
func (h *Hub) MayCopy(opcode uint32, in []byte, r Resolver) bool {
	if h.history == nil || len(in) < headerIn {
		return false
	}
	node := binary.NativeEndian.Uint64(in[16:])
	b := body(in[headerIn:])
	switch opcode {
	case fuseop.Setattr, fuseop.Symlink, fuseop.Mknod, fuseop.Mkdir, fuseop.Unlink, fuseop.Rmdir, fuseop.Write, fuseop.Setxattr, fuseop.Removexattr, fuseop.Create, fuseop.Tmpfile, fuseop.Fallocate, fuseop.Ioctl:
	case fuseop.Open:
		if b.u32(0)&unix.O_ACCMODE == unix.O_RDONLY {
			return false
		}
	case fuseop.Rename, fuseop.Rename2:
		at := 8
		if opcode == fuseop.Rename2 {
			at = 16
		}
		if lower, _ := r.Lower(b.u64(0)); lower {
			return true
		}
		from, _ := b.names(at)
		if lower, _ := r.Lower(r.Child(node, from)); lower {
			return true
		}
	case fuseop.Link:
		if lower, _ := r.Lower(b.u64(0)); lower {
			return true
		}
	case fuseop.CopyFileRange:
		node = b.u64(16)
	default:
		return false
	}
	lower, _ := r.Lower(node)
	return lower
}

// copied reports whether an object has come to the upper since the request came.
func (c *Call) copied(node uint64, before int) bool {
	if node == 0 || before <= 0 {
		return false
	}
	_, now := c.resolver.Where(node)
	return now == 0
}

// result takes out of an answer what an event says.
func (c *Call) result(reply []byte) {
	b := body(reply[min(headerOut, len(reply)):])
	switch c.opcode {
	case fuseop.Lookup, fuseop.Symlink, fuseop.Mknod, fuseop.Mkdir, fuseop.Create, fuseop.Tmpfile:
		if c.object == 0 {
			c.object = b.u64(0) // struct fuse_entry_out
			_, c.layer = c.resolver.Where(c.object)
		}
	case fuseop.Read, fuseop.Readdir, fuseop.Readdirplus:
		c.event.Bytes = int64(len(b))
	case fuseop.Write, fuseop.CopyFileRange:
		c.event.Bytes = int64(b.u32(0))
	case fuseop.Readlink:
		c.event.To = string(b)
	case fuseop.Lseek:
		c.event.Bytes = int64(b.u64(0))
	}
}

// LayerName is the name of a layer in events: 0 is the upper, 1 the topmost lower.
func LayerName(layer int) string {
	switch {
	case layer < 0:
		return ""
	case layer == 0:
		return "upper"
	}
	return fmt.Sprintf("lower:%d", layer)
}
