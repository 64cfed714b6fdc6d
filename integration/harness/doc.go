// Package harness starts and stops what the integration tests compare: it
// builds the plyfs binary once, mounts a stack of directories with plyfs,
// kernel overlayfs or fuse-overlayfs, and takes care that nothing outlives a
// test: mounts, processes, descriptors, hanging requests.
//
// Nothing here reads or writes through a mount; that is done by agents in
// other processes (package oracle), since a process that hangs in a request
// to a FUSE server cannot be killed before the connection is aborted.
package harness
