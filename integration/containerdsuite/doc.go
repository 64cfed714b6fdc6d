// Package containerdsuite runs containerd's own tests of snapshotters against `plyfs
// snapshotter`, through its socket. It is a module of its own, so that what containerd
// depends on stays out of plyfs. `make snapshotter-suite` builds the binary and runs it,
// as root.
package containerdsuite
