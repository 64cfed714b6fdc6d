// Package transport carries FUSE requests between the kernel and a union: it
// mounts, runs the request loop, and unmounts.
//
// The loop is our own, over go-fuse's ProtocolServer, which parses requests and
// dispatches them but leaves the descriptor to us. That is what makes it
// possible to hand a living connection to another process, and it halves the
// latency of a request. go-fuse calls ProtocolServer experimental: this package
// is the only user, and go-fuse is pinned.
//
// # The loop
//
// Every worker reads a request, answers it and reads the next. A worker whose
// request leaves nobody waiting starts another before it begins to work, so a
// request that waits for a disk or a lock never keeps others from being read.
// Workers that would be the third to wait end instead. At most 256 requests are
// worked on at a time: none waits for another, so the rest may wait in the
// kernel.
//
// FUSE_INTERRUPT is answered with ENOSYS, so that the kernel stops sending it:
// no request waits for anything but the file systems below, and a Go program's
// preemption signals would send thousands.
//
// # Who owns what
//
// The mount lives as long as a descriptor of its /dev/fuse connection is open.
// Mount's caller keeps the one it got; Serve only borrows it.
package transport
