package counters

import (
	"encoding/json"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestBuckets(t *testing.T) {
	for _, c := range []struct {
		d    time.Duration
		want int
	}{
		{-1, 0},
		{0, 0},
		{1, 0},
		{time.Microsecond, 0},
		{time.Microsecond + 1, 1},
		{2 * time.Microsecond, 1},
		{2*time.Microsecond + 1, 2},
		{4 * time.Microsecond, 2},
		{time.Millisecond, 10},
		{1024 * time.Microsecond, 10},
		{1<<23*time.Microsecond - 1, 23},
		{1 << 23 * time.Microsecond, 23},
		{1<<23*time.Microsecond + 1, 24},
		{time.Hour, 24},
	} {
		if got := bucketOf(c.d); got != c.want {
			t.Errorf("%v is in bucket %d, want %d", c.d, got, c.want)
		}
	}
}

func TestBucketHoldsItsDurations(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := time.Duration(rapid.Int64Range(1, int64(20*time.Second)).Draw(t, "duration"))
		i := bucketOf(d)
		if d <= lowest(i) || Bound(i) != 0 && d > Bound(i) {
			t.Fatalf("%v is in bucket %d: more than %v, at most %v", d, i, lowest(i), Bound(i))
		}
	})
}

// A quantile lies in the bucket where the duration of that rank is.
func TestQuantileIsInItsBucket(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := Histogram{Buckets: rapid.SliceOfN(rapid.Uint64Range(0, 1000), Buckets, Buckets).Draw(t, "buckets")}
		q := rapid.Float64Range(0, 1).Draw(t, "q")
		got := h.Quantile(q)
		if h.Count() == 0 {
			if got != 0 {
				t.Fatalf("nothing took %v", got)
			}
			return
		}
		rank, before, want := q*float64(h.Count()), 0.0, 0
		for i, n := range h.Buckets {
			if n > 0 {
				want = i
				if before += float64(n); before >= rank {
					break
				}
			}
		}
		if got < lowest(want) || Bound(want) != 0 && got > Bound(want) {
			t.Fatalf("quantile %v is %v, not in bucket %d from %v to %v", q, got, want, lowest(want), Bound(want))
		}
	})
}

func TestQuantilesGrow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := Histogram{Buckets: rapid.SliceOfN(rapid.Uint64Range(0, 9), Buckets, Buckets).Draw(t, "buckets")}
		a, b := rapid.Float64Range(0, 1).Draw(t, "a"), rapid.Float64Range(0, 1).Draw(t, "b")
		if a <= b && h.Quantile(a) > h.Quantile(b) {
			t.Fatalf("%v at %v is more than %v at %v", h.Quantile(a), a, h.Quantile(b), b)
		}
	})
}

func TestCountsOfManyWorkers(t *testing.T) {
	c := New()
	const workers, each = 8, 2000
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := range each {
				began := c.Begin()
				errno := syscall.Errno(0)
				if i%4 == 0 {
					errno = syscall.ENOENT
				} else if i%100 == 1 {
					errno = syscall.EIO
				}
				c.End(1, began, errno)
				c.Read(10)
			}
		})
	}
	wg.Wait()
	s := c.Snapshot()
	o := s.Operation("lookup")
	if o.Count != workers*each || o.Absent() != workers*each/4 || o.Failed() != workers*each/100 {
		t.Errorf("%+v", o)
	}
	if s.BytesRead != 10*workers*each || s.Answering != 0 || s.AnsweringMost < 1 || s.AnsweringMost > workers {
		t.Errorf("%+v", s)
	}
	if total := s.Total(); total.Count != o.Count || total.Failed() != o.Failed() {
		t.Errorf("%+v", total)
	}
}

func TestUnknownOpcode(t *testing.T) {
	c := New()
	for _, op := range []uint32{0, 7, 63, 64, 4096, 1 << 31} {
		c.End(op, c.Begin(), 0)
	}
	if n := c.Snapshot().Operation("other").Count; n != 6 {
		t.Errorf("%d", n)
	}
}

func TestDifferenceOfSnapshots(t *testing.T) {
	c := New()
	c.End(1, c.Begin(), syscall.ENOENT)
	c.End(3, c.Begin(), 0)
	c.CopiedUp(5)
	before := c.Snapshot()
	c.End(1, c.Begin(), 0)
	c.CopiedUpMeta()
	c.Completed(7)
	c.OpenedPassed()
	d := c.Snapshot().Sub(before)
	if len(d.Operations) != 1 || d.Operations[0].Name != "lookup" || d.Operations[0].Count != 1 || d.Operations[0].Errors != nil {
		t.Errorf("%+v", d.Operations)
	}
	if diff := cmp.Diff(CopyUps{Count: 1, Metadata: 1, Completed: 1, Bytes: 7}, d.CopyUps); diff != "" {
		t.Error(diff)
	}
	if d.Opens.Share() != 1 {
		t.Errorf("%+v", d.Opens)
	}
}

func TestSnapshotAsJSON(t *testing.T) {
	c := New()
	c.End(16, c.Begin(), syscall.ENOSPC)
	c.Written(4096)
	want := c.Snapshot()
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got Snapshot
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestOperationsShareNoCacheLine(t *testing.T) {
	if n := unsafe.Sizeof(op{}); n%cacheLine != 0 {
		t.Errorf("%d bytes", n)
	}
}

func TestCountingDoesNotAllocate(t *testing.T) {
	c := New()
	if n := testing.AllocsPerRun(100, func() { c.End(1, c.Begin(), syscall.ENOENT); c.Read(1) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkCount(b *testing.B) {
	c := New()
	for b.Loop() {
		c.End(1, c.Begin(), 0)
	}
}
