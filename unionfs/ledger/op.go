package ledger

import (
	"sync/atomic"
	"unsafe"
)

// Op is a request that is being answered. The kernel sends it again to the next server
// if this one dies, and that has to know how far it has come. A nil Op remembers
// nothing.
type Op struct {
	l   *Ledger
	ref Ref
	// Before says how far an earlier server had come with the request.
	Before Mark
}

// Mark says how far a request has come.
type Mark uint32

// The marks.
const (
	// Armed: everything has been checked, and the system call that makes the change
	// visible may have been done.
	Armed Mark = 1 << iota
	// Passed, Cached, Writer: a handle of this kind has been counted.
	Passed
	Cached
	Writer
	// Done: nothing is left to do but to answer.
	Done
)

// Code tells requests apart.
type Code uint32

// The requests of which the names have to be compared with the disk.
const (
	Other  Code = iota
	Remove      // Dir, Name
	Move        // Dir, Name to Dir2, Name2
	Swap        // the same, both ways
)

// Request describes an Op.
type Request struct {
	Code        Code
	Dir, Dir2   uint64 // node ids
	Name, Name2 string
	// Moved tells what moves, or what has been made.
	Moved
}

// Moved are node ids of what is at Name and at Name2, 0 for nothing, and for a Swap the
// numbers that the file system of the upper has for them.
type Moved struct{ Node, Node2, Ino, Ino2 uint64 }

// opRecord is how the record of a request begins.
type opRecord struct {
	head      record8
	unique    uint64
	mark      atomic.Uint32
	code      Code
	dir, dir2 uint64
	moved     Moved
	size2     uint16 // of the second name
	_         [6]byte
}

const opText = int(unsafe.Sizeof(opRecord{}))

func (l *Ledger) opAt(r Ref) *opRecord { return (*opRecord)(unsafe.Pointer(l.at(r))) }

// Begin writes down a request by its unique number. If an earlier server has done so, it
// returns that record.
func (l *Ledger) Begin(unique uint64, q Request) *Op {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	r, ok := l.ops[unique]
	l.mu.Unlock()
	if ok {
		return &Op{l, r, Mark(l.opAt(r).mark.Load())}
	}
	if r = l.take(opText, len(q.Name)+len(q.Name2)); r == 0 {
		return nil
	}
	rec := l.opAt(r)
	rec.head.kind, rec.head.size = op, uint16(len(q.Name))
	rec.unique, rec.code, rec.dir, rec.dir2 = unique, q.Code, q.Dir, q.Dir2
	rec.moved, rec.size2 = q.Moved, uint16(len(q.Name2))
	rec.mark.Store(0)
	copy(l.text(r, opText, len(q.Name)), q.Name)
	copy(l.text(r, opText+len(q.Name), len(q.Name2)), q.Name2)
	rec.head.state.Store(1)
	l.mu.Lock()
	l.ops[unique] = r
	l.mu.Unlock()
	return &Op{l: l, ref: r}
}

// Answered forgets a request, if it was written down.
func (l *Ledger) Answered(unique uint64) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	r, ok := l.ops[unique]
	if !ok {
		return
	}
	delete(l.ops, unique)
	l.at(r).state.Store(0)
	l.release(r)
}

// Set adds marks.
func (o *Op) Set(m Mark) {
	if o != nil {
		o.l.opAt(o.ref).mark.Or(uint32(m))
	}
}

// Clear takes marks away.
func (o *Op) Clear(m Mark) {
	if o != nil {
		o.l.opAt(o.ref).mark.And(^uint32(m))
	}
}

// Restart forgets how far an earlier server had come.
func (o *Op) Restart() {
	if o != nil {
		o.Before = 0
		o.l.opAt(o.ref).mark.Store(0)
		o.l.opAt(o.ref).moved = Moved{}
	}
}

// SetMoved completes the description, of a Move or Swap before it is armed.
func (o *Op) SetMoved(m Moved) {
	if o != nil {
		o.l.opAt(o.ref).moved = m
	}
}

// Moved is what SetMoved has set, now or in an earlier server.
func (o *Op) Moved() Moved {
	if o == nil {
		return Moved{}
	}
	return o.l.opAt(o.ref).moved
}

// Had reports whether an earlier server had set all of the marks.
func (o *Op) Had(m Mark) bool { return o != nil && o.Before&m == m }
