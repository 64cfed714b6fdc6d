// Package crash ends what runs at the worst moment, and says what may be left.
//
// # Parts
//
//	stories.go    small sequences of requests, each in a directory of its own
//	work.go       executing them; the states that they lead through
//	look.go       what a state is
//	kill.go       the mount server killed at a fault point (package cow/fault)
//	lame.go       a file system without RENAME_WHITEOUT, for an upper
//	recorder.go   a FUSE file system with one file, a disk; it logs writes,
//	              flushes and marks. It runs in a process of its own
//	loop.go       loop devices
//	disk.go       a recorded disk with ext4 or xfs on it
//	log.go        the log, and the order of what is in it
//	cut.go        what is on the disk when the power fails at a place in the log
//	verdict.go    which states of a story a loss of power allows
//	calls.go      a command whose system calls fail, or are its last, or do
//	              nothing
//
// # What is expected
//
// Where a story leads is found out by executing it on a plain directory and
// looking at it after each step. When the server dies, the step under way has
// happened or not, and all before it have. When the power fails, the directory
// is in one of the states from the last one that was synced to the last one that
// had begun. Never may it be in a mix, or hold data that nobody wrote.
//
// The stories for a loss of power are such that file systems with ordered
// metadata (ext4, xfs) hold this on their own, so a failure is one of the union:
// data that is not synced stays within one block, and sizes change by whole
// blocks.
//
// # How power is lost
//
// The upper lies on a loop device over the recorder's file. A write that was
// answered before a flush was sent is on the disk when the flush is answered. Of
// all later writes each may be there or not, and of one write each block of 4
// KiB by itself. The loop device announces a write cache and no FUA, so the
// kernel sends a flush wherever a file system relies on order; without O_DIRECT
// the writes arrive in the order in which the device was given them, and a flush
// is an fsync of the file. Marks in the log around each step tell for every
// place in it what had begun, and what had returned.
//
// Everything that waits for the recorder fails at once when it ends, and it ends
// with the test process; its loop device goes away with the last mount of it.
package crash
