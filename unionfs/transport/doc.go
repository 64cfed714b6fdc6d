// Package transport carries FUSE requests between the kernel and a union: it
// mounts, runs the request loop, and unmounts.
//
// The loop is our own, over go-fuse's ProtocolServer, which parses requests and
// dispatches them but leaves the descriptor to us. That is what makes it
// possible to hand a living connection to another process, and it halves the
// latency of a request. The requests that come by the thousand are decoded here,
// where they were read, without allocation (dispatch.go). go-fuse calls
// ProtocolServer experimental: this package is the only user, and go-fuse is pinned.
// ServeOptions.GoFuse leaves the connection to go-fuse's own server instead.
//
// # The loop
//
// One worker reads at a time, the one that holds the token. It answers what it
// has read by itself and reads on: as long as one request comes after the other
// everything stays on one thread, which is what a round trip's time depends on.
// It passes the token to another worker first when the request is bound to
// wait for a disk (FSYNC and the like) or when requests of several clients are there;
// and if it is stuck in a request for longer than a few milliseconds, the watch
// passes the token on in its place. So a request that waits for a disk or a
// lock never keeps others from being read for long.
//
// Workers come as they are needed, at most 256: no request waits for another,
// so the rest may wait in the kernel. Two may wait for the token; more end.
//
// When no request is there, the reader first does what the file system can prepare
// (Idler), and before it sleeps it looks for the next request for a while, because
// waking a halted processor costs more than everything else in a round trip.
// Whether it does depends on whether that has paid lately (spinner); it never
// looks on a machine with one processor, nor while other workers are busy, and
// once asleep it looks again only after a request has come. What that costs is
// counted in looks, not in time: while the client runs in our place we use no
// processor. (Measured on a virtual machine: a LOOKUP takes 11 us if reader and
// client take turns on one processor, 15 if the reader sleeps in between, 20 from
// processor to processor, and 36 if the client's has to be woken from its halt. To
// have the reader follow its client from processor to processor, with a policy that
// lets the client stay, brought nothing in the end: it cost as much as it won.)
//
// FUSE_INTERRUPT is answered with ENOSYS, so that the kernel stops sending it:
// no request waits for anything but the file systems below, and a Go program's
// preemption signals would send thousands.
//
// Each request is counted, with the time that making its answer takes (package counters).
//
// While somebody watches, or rules for faults are in force (watch.go), a request is looked at once more
// before it is carried out, and told of before its answer is sent; so it is when it may copy something up and
// there is a history of that. Otherwise that costs two loads.
//
// # Another server
//
// A connection can go on with another process when the one that served it has died
// (resume.go): what was agreed with the kernel is given to go-fuse again, and must come out
// the same; then the kernel is asked to send again what has not been answered. Such
// requests have the highest bit of their number set, and so have their answers. A request
// during which two servers have ended, by an error of their own, is refused with EIO
// (suspects.go).
//
// # Who owns what
//
// The mount lives as long as a descriptor of its /dev/fuse connection is open.
// Mount's caller keeps the one it got; Serve only borrows it.
package transport
