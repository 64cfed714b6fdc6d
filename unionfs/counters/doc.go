// Package counters counts what the server of one mount does: requests by operation
// with the time that answering them takes, bytes, copy-ups, and how files are opened.
//
// Counting has to cost next to nothing, because the request it counts may take no
// more than some microseconds. So there is no lock and no allocation: counters are
// atomic, those of one operation lie on cache lines of their own, and the clock is read
// once before and once after. Only [Counters.Snapshot] does more, for who asks.
//
// # What is timed
//
// The making of an answer, from when the request has been read to when the answer is
// about to be written. The way through the kernel and the wait for a worker come on top.
// As soon as it is written the client runs, perhaps in our place: then its time would be
// taken for ours.
//
// # What always holds
//
//   - Counters only grow, except the number of requests being answered.
//   - The count of an operation is the sum of its buckets.
//   - A snapshot is not of one instant: counters are read one after the other, while
//     requests go on. Of each counter, a later snapshot has no less.
package counters
