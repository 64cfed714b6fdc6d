// Package fuseop has the numbers of the operations that the kernel asks a file system for
// (include/uapi/linux/fuse.h): go-fuse keeps its own to itself. Their names are those of
// package counters.
package fuseop
