// Package holder runs one mount as a pair of processes of its own, apart from
// the command or daemon that asked for it.
//
//	starter (plyfs mount, plyfs overlay, plyfs daemon)
//	   | status socket: spec ->, <- prepared, go ->, <- live
//	   v
//	holder       setsid; owns the mount's /dev/fuse descriptor, the spec, the ledger
//	   |         and descriptors of what has no name
//	   | control socket: spec ->, <- prepared, serve + /dev/fuse ->, <- live ... <- done
//	   v
//	mount server setsid; unionfs and the request loop; no database, no store
//
// Both are hidden verbs ([VerbHolder], [VerbServer]) of the running binary,
// started through /proc/self/exe, so that a replaced binary does not matter.
//
// # Order of a start
//
//  1. The starter makes the holder and sends the spec.
//  2. The holder makes the mount server, which opens every layer. A missing
//     layer or a bad upper is found here, before anything is mounted.
//  3. "prepared": the starter now knows process id and start time of the
//     holder and writes its record of the mount (row before mount).
//  4. "go": the holder mounts, hands /dev/fuse to the server by SCM_RIGHTS.
//  5. "live": the kernel's INIT was answered. Only now does the starter report
//     success.
//
// # Invariants
//
//   - A starter that disappears before "live" leaves no mount: the holder sees
//     the end of the status socket, detaches what it mounted and exits.
//   - A descriptor is inherited only by being named: every start marks all
//     others close-on-exec (see spawn).
//   - Neither process keeps standard input, output or error of the starter.
//   - A holder that was made by its server waits for that by pid; for the next one, as
//     its parent.
//   - The holder exits only after the server: who waits for the holder's exit
//     after umount(2) knows that the upper has been synced.
//   - A server of root's is started without any capability that files do not need
//     (drop_linux.go), and with no_new_privs cannot gain any.
//   - No path is looked up after the start but below procfs; the working directory is "/".
//   - A server that is confined (confine.go, package confine) starts no process and unmounts
//     nothing. What has to be done when its holder is killed is done by the spare holder.
//
// # The spare holder
//
// For a mount that outlives its holder the holder forks a copy of itself and gives the server a
// socket to that ("spare"). It waits, without any descriptor but that socket and standard error,
// and ends with the server. What a server starts would be confined as it is, for good: a filter of
// system calls and a root directory are inherited. When the holder is killed the server writes
// to the socket what a holder must know ("adopt"), the spare executes the holder's verb, and that makes
// the next spare. It has the rights of the first holder. A server whose holder and spare are both killed
// serves until it is unmounted, and cannot unmount by itself. A spare is forked for each server.
//
// # Confinement
//
//	mount                        its server
//	---------------------------  ---------------------------------------------------------
//	root's, in the background    sees procfs, read-only, as root directory, and what is open;
//	                             filtered calls
//	root's, in the foreground    filtered calls and umount2(2), for the end of its holder; no
//	or bound to its starter      CAP_SYS_CHROOT
//	a user's, in the background  filtered calls, no_new_privs
//	a user's otherwise           nothing: it may have to execute fusermount3
//	with GoFuse                  nothing: for comparison only
//
// It happens when everything is open and before the first request. What cannot be had is one line
// in the log. The variables PLYFS_NO_SECCOMP and PLYFS_NO_CHROOT in the environment of
// whoever starts the mount turn each off.
//
// # What a server says about itself
//
// A server with a run directory answers there, on the socket [StatsFile], with its
// counters ([Stats]), and on [ControlFile] with what it is made of, what is done with it, and which
// faults its requests meet ([Control]). The sockets are made before the mount is served; the next server puts
// another one in its place. It answers besides the request loop, to a few at once and for
// a limited time, so that no client is in the way of the mount.
//
// # What happens when a process ends
//
//	event                        state                        who acts, how
//	---------------------------  ---------------------------  --------------------------------
//	umount(2) by anyone          server's read gives ENODEV   server syncs, closes, says done; both exit 0
//	server killed or crashed,    holder keeps the connection  holder starts another one, which goes on:
//	resumable                                                 clients have waited, that is all
//	the same, 10 times in a row  -                            as when it is not resumable
//	within a second
//	server killed or crashed     holder keeps the connection  holder detaches the mount (lazy) and closes
//	                                                          /dev/fuse: clients get ENOTCONN, not a hang
//	holder killed                server has its own copy of   server gives the spare holder the spec, the
//	                             /dev/fuse                    connection and what the next server needs
//	the same in the foreground,  the same                     server goes on until the mount is unmounted
//	twice within a second, or
//	with the spare
//	both killed                  kernel aborts the connection dead entry in the mount table, removed by
//	                                                          the next command that lists or mounts
//	starter killed before live   status socket ends           holder detaches, both exit
//	starter of a bound mount     status socket ends           holder, or without one server, detaches
//	ends                                                      (lazy); both end with the last user
//	SIGTERM, SIGINT to holder    -                            unmount; busy: refused, logged; second
//	                                                          signal: lazy unmount
//	SIGUSR1 to holder or server  -                            the server prints on standard error how
//	                                                          many objects the kernel knows
//	SIGTERM, SIGINT to server    -                            ignored while the holder lives, else as above
//
// # Another server
//
// A server says with "live" whether another one can go on where it dies, and what
// that one needs: the INIT request of the kernel and its answer (transport.Resume), and
// its ledger (unionfs/ledger), which is memory that both processes have: which object
// each node id is, how files are open, and how far requests have come. A read-only union
// of indexed layers needs no ledger: there a node id tells everything.
//
// What has no name any more, or has none yet, cannot be found again by anybody. The
// server sends a descriptor of it before the name goes ("keep") if the kernel has it open,
// or else when it has stayed for a moment, and "drop" when the kernel forgets it.
//
// The new server opens the layers, the upper by the same private copy of its mount, is
// handed all this and then the descriptor of the connection, makes the objects of the
// ledger again, makes the same agreement with itself as the kernel had with the first,
// and has the kernel send again what was not answered (FUSE_NOTIFY_RESEND). A request
// that the old server had carried out is answered and not carried out again. What the new
// server cannot agree to ends the mount. It is the same binary as the holder's, also if
// that was replaced.
//
//	killed while                       the new server finds
//	---------------------------------  -------------------------------------------------
//	a request waits in the kernel      nothing: the kernel hands it out
//	a request is answered              it again: by its op record, and the disk, it knows
//	                                   whether it has been carried out
//	an answer has been sent            nothing, or an op record that nobody asks for
//	a copy is built                    it in the workdir, where it is swept; the request
//	                                   that needs the copy builds another one
//	a FORGET is read                   the object in the ledger until the mount ends
//	an object without a name is sent   the descriptor: what is in a socket outlives its sender
//
// # Files
//
// A spec with a run directory makes the holder keep there, for whoever comes
// later: state.json ([State]: the pids, the device number of the mount, its end), log
// (standard error of both) and, if the end was not clean, exit.json ([Exit]).
//
// A mount of no store has a run directory of its own (OwnRunDir): the holder removes it at its end, and
// where both processes were killed the next such mount does.
//
// A spec with an [EventSource] makes it write what becomes of the mount to the log of the
// store (package events); the event of the end comes before "ended" in state.json, so that
// nobody else tells of it.
package holder
