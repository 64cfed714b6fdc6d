// Package mountd is the service of plyfs: everything a command needs, behind
// one interface, [Service], with two implementations.
//
//	plyfs VERB -> OpenService -> socket answers? -> *Client -> unix socket -> Server -> *Local
//	                             else            -> *Local  -> layers.Store
//
// [Local] works on the store directly; the database is open only inside single
// calls of package layers. [Client] talks to a `plyfs daemon`, which serves a
// Local of its own. Code, results, error values and so messages and exit codes
// are the same both ways (see errors.go and wire.go).
//
// # Words
//
// A mount is an entry of the kernel's mount table with a pair of processes
// behind it (package holder), a run directory and a row in the database, its
// live row. A raw mount (`plyfs overlay`) has the processes only.
//
// # Life of a mount
//
//	step                                    crash here leaves               found and cured by
//	--------------------------------------  ------------------------------  ----------------------------
//	1 resolve names, check the mount point  nothing                         -
//	2 make RunDir                           an empty run directory          reconcile: no row, no process
//	3 start holder and server, prepared     processes                       they see the starter go and end
//	4 write live row (pid, start time,      a row of a holder that ends     reconcile: holder dead, not in
//	  boot id of the holder)                                                the mount table -> row removed
//	5 go: mount, live                       the mount, with a correct row   nothing to cure
//	6 umount(2), holder syncs and ends      a row without a process         reconcile
//	7 remove live row                       a run directory                 reconcile
//	8 remove RunDir                         nothing                         -
//
// A mount may be wanted (wanted.go): then step 5 is followed by a row that says how to make
// it again, which step 6 removes, if it is plyfs that unmounts. A crash between leaves a
// mount that is not wanted, of a command that has not succeeded, or one that is unmounted
// and wanted, which stays away for this boot because its holder says how it has ended.
//
// The mount of `plyfs shell` (shell.go) has all of this, in a mount namespace of
// its own: it is bound to the keeper (package sandbox), and ends with it whoever
// kills whom. Other commands see it as mounted in another namespace.
//
// What a server has counted is asked from the server itself, in the run directory
// (stats.go); the daemon turns it into metrics (prometheus.go, loopback.go).
//
// What is done is told in the log of the store (package events): by Local after it has
// done something (events.go), by the holder for its mount, and for a mount whose processes
// were both killed by whoever removes its row.
//
// Two starts of one container are kept apart by a lock on its name in the run
// directory, changes of live rows by another; both end with their process.
//
// # Invariants
//
//   - A live row is written before the mount exists and removed after it is gone.
//   - State is never stored, always derived: from the holder's pid and start
//     time, the boot id and the mount table the holder sees (see reconcile.go).
//   - The writable layer of a container has at most one server. More mount points of the
//     container are bind mounts of the first (local_share.go), and it ends with the last.
//   - Data of a mounted container is read (commit, diff, export) only after syncfs(2).
//   - The daemon opens no file a client names; archives travel over the socket.
//     A mount point is the exception: it is what the request is about.
//   - A run directory and the socket in it belong to one store root, so that a
//     command with another --root never reaches the wrong daemon.
package mountd
