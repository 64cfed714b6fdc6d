// Package confine takes from a process that serves a mount what it does not need once it
// serves: system calls ([Filter]) and the tree of files ([Root]).
//
// # Calls
//
// The filter is a list of calls that are allowed (calls.go). It was made by reading the
// packages that run in a mount server, by what their tests were seen to call, and by what
// the Go runtime calls on any version of Linux; calls that do no harm are in it although
// nobody makes them today. It is installed in all threads at once (SECCOMP_FILTER_FLAG_TSYNC).
// Calls whose arguments decide are allowed with some of them only:
//
//	clone       for threads (CLONE_THREAD)
//	kill, tgkill of this process
//	prctl       names of threads and of memory
//	prlimit64   of this process
//
// Every other call fails with ENOSYS. That is what an old kernel says: the callers here, and
// the Go runtime, have another way or hand the error on, and a call that has failed has
// changed nothing, so that no program sees a wrong byte. A process that were killed instead
// would be started again and killed again by the same request. clone3 is among them, since its
// flags lie in memory that a filter cannot read; who calls it falls back to clone. Calls of another
// architecture (i386, x32) end the process: nobody makes them by mistake.
//
// The kernel logs refused calls (SECCOMP_FILTER_FLAG_LOG; "type=1326" with the number).
//
// # Files
//
// The root directory of the process becomes a private, read-only copy of the mount of procfs:
// package fsat reaches what descriptors hold through their links there, and package unionfs
// asks there for the groups of a caller. Everything else must be open. Descriptors
// of directories should lie in private copies of mounts (fsat.CloneTree): ".." does not leave these.
package confine
