// Package trace tells who does what with a mount, while it happens: each request of the
// kernel that is answered becomes an [Event] for those who listen.
//
// # Words
//
//	hub      what the request loop of one server talks to
//	call     a request that is being answered while somebody listens
//	session  one listener with its [Filter] and its buffer
//
// # What always holds
//
//   - While nobody listens a request costs one load of an atomic variable.
//   - A listener never holds up a request: its buffer is bounded, and what does not fit
//     is counted ([Session.Dropped]), not waited for.
//   - Paths are those at the moment of the request: before it is carried out for what it
//     names, so that what is removed still has a path.
//   - An event is handed on before its answer is sent to the kernel: once a program has
//     seen the result of a call, the event is in the buffers.
//   - Nothing of the mount itself is looked up, no file of it is opened: tracing does not
//     change what is traced. Only procfs is asked about processes.
//
// # What is not seen
//
// What the kernel answers from its caches, and the data of files that are passed through
// or kept in the page cache, causes no request. What it is
// depends on the mount; plyfs trace says it first.
//
// # Which process
//
// The kernel tells the thread. Its name, its process and its container are read from procfs
// while it waits for the answer, and all but the name kept for a moment. A write that the kernel makes for
// somebody else at a later time, and a FORGET or RELEASE, have no process.
package trace
