package ledger

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Record is a record of one of the public kinds.
type Record struct {
	Ref        Ref
	Kind       Kind
	ID, Parent uint64
	Ino        uint64
	Text       string
}

// OpenFile is a record of how a file is open.
type OpenFile struct {
	Ref   Ref
	ID    uint64
	Opens *Opens
}

// Past is what a server has left behind.
type Past struct {
	Records []Record
	Opens   []OpenFile
	// Pending are the requests that it had armed and that come again.
	Pending []Request
}

// Open takes over the ledger of a server that has died, and the file.
func Open(f *os.File) (*Ledger, *Past, error) {
	l := &Ledger{file: f}
	p, err := l.read()
	if err != nil {
		_ = l.Close() // the first error is the one to report
		return nil, nil, fmt.Errorf("ledger: %w", err)
	}
	return l, p, nil
}

func (l *Ledger) read() (*Past, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(l.file.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Size < growth || st.Size%growth != 0 || st.Size > space {
		return nil, ErrForeign
	}
	if err := l.mapped(st.Size); err != nil {
		return nil, err
	}
	end := l.head.end.Load()
	if l.head.magic != magic || l.head.version != version || end < uint64(first/unitSize) || end > uint64(st.Size/unitSize) {
		return nil, ErrForeign
	}
	if !l.Complete() {
		return nil, ErrIncomplete
	}
	p := &Past{}
	for at := uint64(first / unitSize); at < end; {
		r := Ref(at)
		units := l.at(r).units
		if at += uint64(units); units == 0 || at > end {
			return nil, ErrForeign
		}
		if err := l.collect(r, p); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// collect adds one record to what is known of the past.
func (l *Ledger) collect(r Ref, p *Past) error {
	rec := l.at(r)
	room := int(rec.units) * unitSize
	switch {
	case rec.state.Load() == 0:
		l.release(r) // nobody else knows l
	case rec.kind == opens:
		p.Opens = append(p.Opens, OpenFile{r, rec.id, l.opensAt(r)})
	case rec.kind == op:
		o := l.opAt(r)
		n, n2 := int(o.head.size), int(o.size2)
		if opText+n+n2 > room {
			return ErrForeign
		}
		l.ops[o.unique] = r
		if q := (Request{Code: o.code, Dir: o.dir, Dir2: o.dir2, Moved: o.moved}); q.Code != Other && Mark(o.mark.Load())&Armed != 0 {
			q.Name, q.Name2 = string(l.text(r, opText, n)), string(l.text(r, opText+n, n2))
			p.Pending = append(p.Pending, q)
		}
	case textAt+int(rec.size) > room:
		return ErrForeign
	default:
		p.Records = append(p.Records, Record{
			Ref: r, Kind: rec.kind, ID: rec.id, Parent: rec.a, Ino: rec.b, Text: string(l.text(r, textAt, int(rec.size))),
		})
	}
	return nil
}
