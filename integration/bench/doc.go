// Command bench compares plyfs with kernel overlayfs, fuse-overlayfs, other
// unions and the plain directory, on the machine it runs on. It is `make bench`.
//
// # What is timed
//
// A phase is one kind of work on one mount: a walk, 5000 renames, a copy-up.
// Its work is done by this program itself, in a process of its own (a worker,
// see worker.go) that has read its list of names, opened the mount's root and
// filled its buffers before the clock starts. The timed part makes raw system
// calls and nothing else: no garbage collection, no preemption signals (they
// would interrupt FUSE requests), no poller, no scheduler hand-over, so that a
// client costs what one written in C does. The clock is read in the worker.
//
// Not timed: making layers, mounting (except where mounting is the phase),
// copying the plain tree, unmounting, deleting.
//
// # What makes it fair
//
//   - In each round every phase runs on all systems one after the other, and
//     each round begins with another system, so a slow minute of the machine
//     hits all alike.
//   - Phases that belong together share a mount (a scene, see scene.go): warm
//     follows cold. Each scene gets a fresh mount and a fresh upper.
//   - The file systems below are synced before the clock starts.
//   - "fresh mount" phases: nothing of the mount is cached, but the layers'
//     own names, and the contents of small files, are; they are read before.
//     "all cold" phases: the kernel's caches are dropped after mounting.
//   - The layers are the same directories for all. Each system runs with the
//     options its users get by default, except where the title names others.
//   - The figure is the median of the rounds. Ratios are speed: 2 is twice as
//     fast as kernel overlayfs, per operation. They are taken round by round,
//     and the median of them is shown.
//
// # Counting requests
//
// How many LOOKUP, OPEN, READ … a phase causes does not depend on noise. An
// extra round that is not timed counts them from the kernel's trace event
// fuse_request_send, for every FUSE system alike (see counts.go).
//
// # Files
//
//	main.go machine.go install.go          flags, description of the machine, missing tools
//	place.go fixture*.go tree.go spec.go   where it runs; the layers, made here
//	system.go mount.go process.go          what is compared; mounting it and getting rid of it
//	scene*.go goal.go                      phases, what they need, what is wanted of them
//	worker.go work_*.go raw.go             the timed work
//	run.go step.go counts.go memory.go images.go    rounds, special measurements
//	result.go stats.go report.go format.go compare.go svg.go    what comes out
//
// # Clean-up
//
// Everything has a time limit. A mount that hangs is aborted through fusectl
// and detached. Another process (harness.Janitor) outlives this one however it
// ends, and takes away mounts, servers and directories.
package main
