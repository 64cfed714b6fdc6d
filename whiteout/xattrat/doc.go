// Package xattrat reads and changes extended attributes of an object that is given
// by a directory descriptor and a plain name, which is never followed, or by a
// descriptor (O_PATH will do) and an empty name.
//
// Linux has system calls of that form since 6.13. On older ones, and for an O_PATH
// descriptor without a name, the object is reached through the magic link of the
// descriptor in procfs, which costs about three times as much.
//
// Errors are bare errnos. Calls interrupted by a signal are retried.
package xattrat
