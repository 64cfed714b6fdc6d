package ledger

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	magic   = 0x706c79666c656467 // "plyfledg"
	version = 1

	pageSize = 4096
	unitSize = 64
	// first is where the records begin.
	first   = pageSize + (unsafe.Sizeof(table{})+pageSize-1)/pageSize*pageSize
	growth  = 1 << 20  // the file grows by this
	space   = 8 << 30  // what is mapped
	maxText = 16 << 10 // of one record
	textAt  = 32       // where the text of a record begins
)

// Errors of [Open].
var (
	// ErrForeign: the memory is not a ledger, or one of another version.
	ErrForeign = errors.New("not a ledger of this version")
	// ErrIncomplete: there was a time when nothing more could be written.
	ErrIncomplete = errors.New("the ledger is incomplete: there was no memory for it")
)

// Ref is the place of a record; 0: none.
type Ref uint32

// Ledger is the memory, mapped. A nil Ledger takes everything and remembers nothing.
type Ledger struct {
	file  *os.File
	mem   []byte
	head  *header
	table *table

	mu   sync.Mutex
	size int64          // of the file; guarded by mu
	free [256][]Ref     // by number of units; guarded by mu
	ops  map[uint64]Ref // of requests that are not answered; guarded by mu
}

type header struct {
	magic, version uint64
	incomplete     atomic.Uint64
	end            atomic.Uint64 // units that have been used, with those that the header takes
	nextID         atomic.Uint64
}

// Kind tells records apart.
type Kind uint8

// The kinds of records, see the package comment.
const (
	Name Kind = iota + 1
	Loose
	Work
	Lower
	Index
	opens
	op
)

// record is how each begins.
type record struct {
	state atomic.Uint32 // 0: free
	kind  Kind
	units uint8
	size  uint16 // of the text
	id    uint64
	a, b  uint64 // parent and inode number of a name
}

// New makes an empty ledger. Node ids are counted up from after.
func New(after uint64) (*Ledger, error) {
	fd, err := unix.MemfdCreate("plyfs-ledger", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate("plyfs-ledger", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("ledger: shared memory: %w", err)
	}
	l := &Ledger{file: os.NewFile(uintptr(fd), "ledger")}
	// Whoever has the descriptor must not be able to take away what is mapped.
	_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK)
	if err == nil {
		err = unix.Ftruncate(fd, growth)
	}
	if err == nil {
		err = l.mapped(growth)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("ledger: %w", err), l.Close())
	}
	l.head.magic, l.head.version = magic, version
	l.head.end.Store(uint64(first / unitSize))
	l.head.nextID.Store(after)
	return l, nil
}

func (l *Ledger) mapped(size int64) (err error) {
	l.mem, err = unix.Mmap(int(l.file.Fd()), 0, space, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map: %w", err)
	}
	l.head = (*header)(unsafe.Pointer(unsafe.SliceData(l.mem)))
	l.table = (*table)(unsafe.Pointer(&l.mem[pageSize]))
	l.size, l.ops = size, make(map[uint64]Ref)
	return nil
}

// File is the memory, to be handed to another process. It stays the ledger's.
func (l *Ledger) File() *os.File {
	if l == nil {
		return nil
	}
	return l.file
}

// Close lets go of the memory, which lives while another process has it.
func (l *Ledger) Close() error {
	if l == nil {
		return nil
	}
	var err error
	if l.mem != nil {
		err = unix.Munmap(l.mem)
		l.mem = nil
	}
	return errors.Join(err, l.file.Close())
}

// NextID counts up. It is nobody else's, also of no process that comes later.
func (l *Ledger) NextID() uint64 { return l.head.nextID.Add(1) }

// Complete reports whether everything could be written down so far.
func (l *Ledger) Complete() bool { return l != nil && l.head.incomplete.Load() == 0 }

func (l *Ledger) at(r Ref) *record {
	return (*record)(unsafe.Pointer(&l.mem[int64(r)*unitSize]))
}

// text is the variable part of a record, of n bytes from off on.
func (l *Ledger) text(r Ref, off, n int) []byte {
	start := int(r)*unitSize + off
	return l.mem[start : start+n : start+n]
}

// take finds room for a record with a text of n bytes at offset at; 0 if there is none.
func (l *Ledger) take(at, n int) Ref {
	if n > maxText-at {
		l.head.incomplete.Store(1)
		return 0
	}
	units := uint8((at + n + unitSize - 1) / unitSize)
	l.mu.Lock()
	defer l.mu.Unlock()
	if f := l.free[units]; len(f) > 0 {
		r := f[len(f)-1]
		l.free[units] = f[:len(f)-1]
		return r
	}
	end := l.head.end.Load()
	next := end + uint64(units)
	if int64(next)*unitSize > l.size {
		size := l.size + growth
		if size > space || unix.Ftruncate(int(l.file.Fd()), size) != nil {
			l.head.incomplete.Store(1)
			return 0
		}
		l.size = size
	}
	r := Ref(end)
	l.at(r).units = units
	l.head.end.Store(next)
	return r
}

// Drop removes a record; it need not exist.
func (l *Ledger) Drop(r Ref) {
	if l == nil || r == 0 {
		return
	}
	l.at(r).state.Store(0)
	l.mu.Lock()
	l.release(r)
	l.mu.Unlock()
}

// release makes the room of a record free. Preconditions: mu is held.
func (l *Ledger) release(r Ref) {
	units := l.at(r).units
	l.free[units] = append(l.free[units], r)
}

// Add writes a record of one of the public kinds: the object id has the name text in
// parent, and the inode number ino; or text says where else it is.
func (l *Ledger) Add(k Kind, id, parent uint64, text string, ino uint64) Ref {
	if l == nil {
		return 0
	}
	r := l.take(textAt, len(text))
	if r == 0 {
		return 0
	}
	rec := l.at(r)
	rec.kind, rec.size, rec.id, rec.a, rec.b = k, uint16(len(text)), id, parent, ino
	copy(l.text(r, textAt, len(text)), text)
	rec.state.Store(1)
	return r
}

// SetIno changes the inode number in a record.
func (l *Ledger) SetIno(r Ref, ino uint64) {
	if l != nil && r != 0 {
		atomic.StoreUint64(&l.at(r).b, ino)
	}
}

// Opens counts how the kernel has a file open.
type Opens struct {
	head record8
	id   uint64
	// Passed and Cached are as in unionfs; Writers are those for writing among both.
	Passed, Cached, Writers atomic.Int32
	// Backing is the id of the registration with the kernel; 0: none.
	Backing atomic.Int32
}

type record8 struct {
	state atomic.Uint32
	kind  Kind
	units uint8
	size  uint16
}

// AddOpens writes a record of an open file, which the caller changes in place; nil if
// there is no room.
func (l *Ledger) AddOpens(id uint64) (*Opens, Ref) {
	if l == nil {
		return nil, 0
	}
	r := l.take(textAt, 0)
	if r == 0 {
		return nil, 0
	}
	rec := l.at(r)
	rec.kind, rec.size, rec.id, rec.a, rec.b = opens, 0, id, 0, 0
	rec.state.Store(1)
	return l.opensAt(r), r
}

func (l *Ledger) opensAt(r Ref) *Opens { return (*Opens)(unsafe.Pointer(l.at(r))) }
