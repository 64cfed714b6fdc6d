package counters

import (
	"math/bits"
	"time"
)

// Buckets is how many classes of duration there are. Number i has what took at most
// 2^i microseconds and more than half of that; the last one all that took longer than
// the one before allows, about 8 seconds.
const Buckets = 25

// Bound returns the longest duration of a bucket; the last one has none, which is 0.
func Bound(bucket int) time.Duration {
	if bucket >= Buckets-1 {
		return 0
	}
	return time.Microsecond << bucket
}

// lowest returns what everything in a bucket took longer than.
func lowest(bucket int) time.Duration {
	if bucket == 0 {
		return 0
	}
	return time.Microsecond << (bucket - 1)
}

// bucketOf returns the bucket of a duration.
func bucketOf(d time.Duration) int {
	if d <= 0 {
		return 0
	}
	return min(bits.Len64(uint64(d-1)/uint64(time.Microsecond)), Buckets-1)
}

// Histogram says how often what took how long.
type Histogram struct {
	Nanoseconds uint64   `json:"nanoseconds"` // all together
	Buckets     []uint64 `json:"buckets"`     // see [Bound]
}

// Count returns how many durations there are.
func (h Histogram) Count() uint64 {
	n := uint64(0)
	for _, b := range h.Buckets {
		n += b
	}
	return n
}

// Quantile returns the duration that the share q of all does not exceed, as if those of
// a bucket were spread evenly over it. What took longer than the last bound counts as that.
func (h Histogram) Quantile(q float64) time.Duration {
	count := h.Count()
	if count == 0 {
		return 0
	}
	rank := min(max(q, 0), 1) * float64(count)
	before := 0.0
	last := time.Duration(0)
	for i, n := range h.Buckets {
		if n == 0 {
			continue
		}
		low, high := lowest(i), Bound(i)
		if high == 0 {
			return low
		}
		if before+float64(n) >= rank {
			share := max(rank-before, 0) / float64(n)
			return low + time.Duration(share*float64(high-low))
		}
		before += float64(n)
		last = high
	}
	return last // rounding
}

// add returns the sum of two.
func (h Histogram) add(o Histogram) Histogram {
	sum := Histogram{h.Nanoseconds + o.Nanoseconds, make([]uint64, max(len(h.Buckets), len(o.Buckets)))}
	for i := range sum.Buckets {
		sum.Buckets[i] = at(h.Buckets, i) + at(o.Buckets, i)
	}
	return sum
}

// sub returns what has come since an earlier one.
func (h Histogram) sub(earlier Histogram) Histogram {
	diff := Histogram{less(h.Nanoseconds, earlier.Nanoseconds), make([]uint64, len(h.Buckets))}
	for i := range diff.Buckets {
		diff.Buckets[i] = less(h.Buckets[i], at(earlier.Buckets, i))
	}
	return diff
}

func at(s []uint64, i int) uint64 {
	if i < len(s) {
		return s[i]
	}
	return 0
}

// less is a-b, and 0 where that would be less.
func less(a, b uint64) uint64 {
	if b > a {
		return 0
	}
	return a - b
}
