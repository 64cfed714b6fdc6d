// Package fsat holds the file-descriptor-relative system calls that plyfs is
// built on. No path string of a layer is ever resolved through a symbolic
// link, out of the directory it started from, or across a magic link:
//
//   - OpenBeneath walks a relative path with openat2(2) and refuses all three;
//   - OpenInRoot follows links, but below the descriptor, for what runs in the root
//     of an image;
//   - every other call takes a directory descriptor and one plain name, or a
//     descriptor alone;
//   - objects are opened O_PATH first; their type is checked before Reopen
//     turns a regular file or a directory into a descriptor that can do I/O, so
//     that opening a device or a fifo of a hostile layer has no effect.
//
// Errors are bare errnos (golang.org/x/sys/unix.Errno): the caller knows what
// it was doing and wraps. Calls interrupted by a signal (EINTR) are retried.
package fsat
