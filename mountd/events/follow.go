package events

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Query says which events are wanted.
type Query struct {
	// Since begins with events of that time or later that are in the log; zero: with what
	// happens from now on.
	Since time.Time
	// Until ends with that time, which may be to come; zero: never.
	Until time.Time
	// Types and Actions are wanted; empty: all. [TypeLog] is always.
	Types   []string
	Actions []string
	// Started, if set, is called once the reader has its place: what happens from then on
	// it will see.
	Started func()
}

func (q *Query) wants(e *Event) bool {
	if !q.Since.IsZero() && e.Time.Before(q.Since) || !q.Until.IsZero() && e.Time.After(q.Until) {
		return false
	}
	if e.Type == TypeLog {
		return true
	}
	return (len(q.Types) == 0 || slices.Contains(q.Types, e.Type)) && (len(q.Actions) == 0 || slices.Contains(q.Actions, e.Action))
}

// pollTime is how often the log is looked at if nothing is heard of it: on a file system of
// the network changes by others make no sound.
const pollTime = time.Second

// absentTime is the same while there is no log that could be watched.
const absentTime = 50 * time.Millisecond

// Follow calls f for each event that q wants, in order, until q.Until, the end of ctx, which
// is returned as its error, or an error of f. f may take its time: it keeps nobody but
// itself waiting, and is told what it has missed.
func (l *Log) Follow(ctx context.Context, q Query, f func(Event) error) error {
	w := newWatch(l.dir)
	defer w.close()
	r := &reader{log: l, q: q, f: f}
	defer r.close()
	if err := r.begin(); err != nil {
		return err
	}
	if q.Started != nil {
		q.Started()
	}
	for {
		over := !q.Until.IsZero() && !time.Now().Before(q.Until)
		if err := r.read(ctx); err != nil {
			return err
		}
		if over {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		wait := pollTime
		if !q.Until.IsZero() {
			wait = min(wait, max(time.Until(q.Until), 0))
		}
		w.wait(ctx, wait)
	}
}

// reader is the place of one reader in the log.
type reader struct {
	log  *Log
	q    Query
	f    func(Event) error
	file *os.File // nil: there is no log yet
	br   *bufio.Reader
	part []byte // of a line whose end has not come
	skip bool   // the line is too long, and is left out
	last uint64 // number of the last event seen
	bad  bool   // a line since then could not be read

	known bool // last is one; else the first event that is found is the first
}

func (r *reader) close() {
	if r.file != nil {
		_ = r.file.Close() // only read
	}
}

// begin goes to where q begins.
func (r *reader) begin() error {
	names := []string{logName, oldName} // the next event makes the former, if it is not there
	if !r.q.Since.IsZero() {
		names = []string{oldName, logName}
	}
	for _, n := range names {
		err := r.open(n)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil || !r.q.Since.IsZero() {
			return err
		}
		st, err := r.file.Stat()
		if err != nil {
			return err
		}
		r.last, _, err = lastSeq(r.file, st.Size())
		r.known = r.last > 0
		if err == nil {
			_, err = r.file.Seek(st.Size(), io.SeekStart)
		}
		return err
	}
	r.known = true // nothing has happened yet
	return nil
}

func (r *reader) open(name string) error {
	f, err := openOld(filepath.Join(r.log.dir, name))
	if err != nil {
		return err
	}
	r.close()
	r.file, r.br = f, bufio.NewReaderSize(f, 2*MaxLine)
	r.part, r.skip = nil, false
	return nil
}

// read hands over all that is in the log by now.
func (r *reader) read(ctx context.Context) error {
	for ctx.Err() == nil {
		if r.file != nil {
			if err := r.lines(ctx); err != nil {
				return err
			}
		}
		moved, err := r.next()
		if err != nil || !moved {
			return err
		}
	}
	return ctx.Err()
}

// next goes on with the file that follows the one that was read, if there is one.
func (r *reader) next() (bool, error) {
	name := oldName // what is new may have been renamed already
	if r.file != nil {
		name = logName
		is, err := r.is(logName)
		if err != nil || is {
			return false, err
		}
		// Nobody writes to a file that has been renamed; but something may have come
		// between the last look and that.
		if err := r.lines(context.Background()); err != nil {
			return false, err
		}
		old, err := r.is(oldName)
		if err != nil {
			return false, err
		}
		if !old {
			name = oldName // more than one file behind
		}
	}
	err := r.open(name)
	if name == oldName && errors.Is(err, fs.ErrNotExist) { // somebody has removed the log
		err = r.open(logName)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// is reports whether the file that is read has this name.
func (r *reader) is(name string) (bool, error) {
	own, err := r.file.Stat()
	if err != nil {
		return false, err
	}
	st, err := os.Lstat(filepath.Join(r.log.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(own, st), err
}

// lines reads to the end of the file.
func (r *reader) lines(ctx context.Context) error {
	for ctx.Err() == nil {
		b, err := r.br.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull) || len(r.part)+len(b) > MaxLine:
			r.skip, r.part = true, nil
		case !r.skip:
			r.part = append(r.part, b...)
		}
		if err == nil {
			line, skip := r.part, r.skip
			r.part, r.skip = r.part[:0], false
			if err := r.line(line, skip); err != nil {
				return err
			}
			continue
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	}
	return ctx.Err()
}

// line hands over the event of one line.
func (r *reader) line(line []byte, skip bool) error {
	line = bytes.TrimSpace(line)
	if len(line) == 0 && !skip {
		return nil
	}
	var e Event
	if skip || json.Unmarshal(line, &e) != nil || e.Seq == 0 || e.Type == TypeLog {
		r.bad = true
		return nil
	}
	missed := uint64(0)
	if r.known && e.Seq > r.last+1 {
		missed = e.Seq - r.last - 1
	}
	bad := r.bad
	r.last, r.known, r.bad = e.Seq, true, false
	if missed > 0 || bad {
		m := Event{Time: e.Time, Type: TypeLog, Action: Lost, Missed: &Missed{Events: missed}}
		if r.q.wants(&m) {
			if err := r.f(m); err != nil {
				return err
			}
		}
	}
	if !r.q.wants(&e) {
		return nil
	}
	return r.f(e)
}
