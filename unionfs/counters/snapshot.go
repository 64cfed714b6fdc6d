package counters

import "slices"

// Snapshot is what the counters have been, as a document. Operations that were never
// asked for are left out.
type Snapshot struct {
	Operations []Operation `json:"operations"`
	// Answering is how many requests are being answered, AnsweringMost the most that were.
	Answering     int64   `json:"answering"`
	AnsweringMost int64   `json:"answeringMost"`
	BytesRead     uint64  `json:"bytesRead"`
	BytesWritten  uint64  `json:"bytesWritten"`
	CopyUps       CopyUps `json:"copyUps"`
	Opens         Opens   `json:"opens"`
	// Invalidations are messages to the kernel to forget something, Stored files whose
	// data it was given unasked.
	Invalidations uint64 `json:"invalidations"`
	Stored        uint64 `json:"stored"`
}

// Operation is one kind of request.
type Operation struct {
	Name   string            `json:"name"`
	Count  uint64            `json:"count"`
	Errors map[string]uint64 `json:"errors,omitempty"` // by [Class]
	Time   Histogram         `json:"time"`
}

// CopyUps are objects that were copied to the upper.
type CopyUps struct {
	Count     uint64 `json:"count"`
	Metadata  uint64 `json:"metadata"`  // of these, files without their data
	Completed uint64 `json:"completed"` // of those, files that have got it since
	Bytes     uint64 `json:"bytes"`     // of data, copied or shared
}

// Opens are files that were opened.
type Opens struct {
	Passed uint64 `json:"passed"` // the kernel reads and writes them by itself
	Cached uint64 `json:"cached"` // through the page cache of the mount
}

// Share is the share of files that were passed through; 0 if none were opened.
func (o Opens) Share() float64 {
	if o.Passed+o.Cached == 0 {
		return 0
	}
	return float64(o.Passed) / float64(o.Passed+o.Cached)
}

// Absent returns how often the answer was that something is not there, or not offered.
func (o Operation) Absent() uint64 { return o.errors(true) }

// Failed returns how often it was an error by anybody's measure.
func (o Operation) Failed() uint64 { return o.errors(false) }

func (o Operation) errors(ordinary bool) uint64 {
	n := uint64(0)
	for _, c := range Classes() {
		if c.Ordinary() == ordinary {
			n += o.Errors[c.String()]
		}
	}
	return n
}

// Snapshot reads all counters.
func (c *Counters) Snapshot() Snapshot {
	s := Snapshot{
		Answering: c.active.Load(), AnsweringMost: c.most.Load(),
		BytesRead: c.read.Load(), BytesWritten: c.written.Load(),
		CopyUps:       CopyUps{Count: c.copied.Load(), Metadata: c.copiedMeta.Load(), Completed: c.completed.Load(), Bytes: c.copiedBytes.Load()},
		Opens:         Opens{Passed: c.passed.Load(), Cached: c.cached.Load()},
		Invalidations: c.invalidated.Load(), Stored: c.stored.Load(),
		Operations: []Operation{},
	}
	for i := range c.ops {
		if o := c.ops[i].snapshot(); o.Count > 0 {
			o.Name = opNames[i]
			s.Operations = append(s.Operations, o)
		}
	}
	return s
}

func (o *op) snapshot() Operation {
	s := Operation{Time: Histogram{Buckets: make([]uint64, Buckets)}}
	for i := range o.errors { // before the requests, which are never fewer
		if n := o.errors[i].Load(); n > 0 {
			if s.Errors == nil {
				s.Errors = map[string]uint64{}
			}
			s.Errors[Class(i).String()] = n
		}
	}
	s.Time.Nanoseconds = o.nanos.Load()
	for i := range o.buckets {
		s.Time.Buckets[i] = o.buckets[i].Load()
	}
	s.Count = s.Time.Count()
	return s
}

// Operation returns one by its name, with a count of 0 if it was never asked for.
func (s Snapshot) Operation(name string) Operation {
	for _, o := range s.Operations {
		if o.Name == name {
			return o
		}
	}
	return Operation{Name: name}
}

// Total returns all operations together.
func (s Snapshot) Total() Operation {
	sum := Operation{Name: "total", Errors: map[string]uint64{}}
	for _, o := range s.Operations {
		sum.Count += o.Count
		sum.Time = sum.Time.add(o.Time)
		for c, n := range o.Errors {
			sum.Errors[c] += n
		}
	}
	return sum
}

// Sub returns what has come since an earlier snapshot of the same server. What counts
// nothing up stays as it is.
func (s Snapshot) Sub(earlier Snapshot) Snapshot {
	d := s
	d.Operations = []Operation{}
	for _, o := range s.Operations {
		was := earlier.Operation(o.Name)
		diff := Operation{Name: o.Name, Count: less(o.Count, was.Count), Time: o.Time.sub(was.Time)}
		for c, n := range o.Errors {
			if more := less(n, was.Errors[c]); more > 0 {
				if diff.Errors == nil {
					diff.Errors = map[string]uint64{}
				}
				diff.Errors[c] = more
			}
		}
		if diff.Count > 0 {
			d.Operations = append(d.Operations, diff)
		}
	}
	d.BytesRead, d.BytesWritten = less(s.BytesRead, earlier.BytesRead), less(s.BytesWritten, earlier.BytesWritten)
	d.CopyUps = CopyUps{
		Count:     less(s.CopyUps.Count, earlier.CopyUps.Count),
		Metadata:  less(s.CopyUps.Metadata, earlier.CopyUps.Metadata),
		Completed: less(s.CopyUps.Completed, earlier.CopyUps.Completed),
		Bytes:     less(s.CopyUps.Bytes, earlier.CopyUps.Bytes),
	}
	d.Opens = Opens{less(s.Opens.Passed, earlier.Opens.Passed), less(s.Opens.Cached, earlier.Opens.Cached)}
	d.Invalidations, d.Stored = less(s.Invalidations, earlier.Invalidations), less(s.Stored, earlier.Stored)
	return d
}

// ByTime returns the operations, those first that took the most time.
func (s Snapshot) ByTime() []Operation {
	ops := slices.Clone(s.Operations)
	slices.SortStableFunc(ops, func(a, b Operation) int {
		switch {
		case a.Time.Nanoseconds > b.Time.Nanoseconds:
			return -1
		case a.Time.Nanoseconds < b.Time.Nanoseconds:
			return 1
		}
		return 0
	})
	return ops
}
