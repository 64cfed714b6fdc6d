// Package engine runs container engines for tests in a place of their own, so that a
// test changes nothing of the machine and leaves nothing behind.
//
//	place.go   a directory, a mount namespace and a process in it: where engines run
//	host.go    that process: it starts commands, and inherits what they leave running
//	reap.go    how it waits for its children, adopted ones included
//	user.go    an ordinary user with subordinate ids, and a /dev/fuse that it may open
//	config.go  configuration of podman and buildah, one store for each
//	docker.go  a docker daemon of its own
//	image.go   a small image with busybox
//
// # The place
//
// A host process is the test binary, started again. Run as root it has a mount namespace
// of its own, in which copies of /etc/passwd, /etc/subuid and the like with one more user
// lie over the real ones, and links to plyfs among the programs of the system. It is a
// subreaper: whatever a command leaves in the background becomes a child of the host and
// not of process 1, which on some machines reaps nobody. So the host knows exactly
// what still runs, and [Place.Close] can insist on nothing.
//
// # Invariants
//
//   - Every command has a time limit, and is killed with its process group when that is over.
//   - The host ends with the test process: it reads from a pipe that the test holds.
//   - No mount of a place is seen outside of its namespace; the janitor of the tests (package
//     harness) removes the directory in any case.
//   - As an ordinary user there is no namespace: only what needs none can be asked for.
package engine
