// Package fault ends the process at named steps, for crash tests.
//
// The steps are those of the crash tables of packages cow and unionfs: between
// two system calls that change the upper. [Point] costs one atomic load where no
// fault was asked for. A fault is asked for in the environment of the mount
// server, which alone reads it, once, at its start:
//
//	PLYFS_FAULT=NAME        the first arrival at the point NAME ends the process, if it
//	                        is the first that serves its mount
//	PLYFS_FAULT=NAME:N      the Nth does
//	PLYFS_FAULT=mount:NAME  the same, and its parent, so that no other goes on
//	PLYFS_FAULT=mount:NAME:N
//	PLYFS_FAULT=crash:NAME  every arrival ends the process by exit status 70, as an error
//	                        in the program would, whether it is the first or not
//	PLYFS_FAULT=trace:FILE  no fault: every arrival appends its name to FILE
//
// The end is SIGKILL: nothing is cleaned up and nothing is said. This is for
// tests; no other behaviour depends on it.
package fault
