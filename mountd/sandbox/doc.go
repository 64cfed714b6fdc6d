// Package sandbox runs a program in the root of an image: namespaces, ids,
// /proc, /dev, /sys, the identity that the image's configuration asks for. It
// knows no store and no union; it is given a directory. It is no container
// engine: the network and the cgroups are those of the caller.
//
//	outer     the command that a person typed, or its caller's script
//	  | pipe: "mapped", then what to do; its end is the outer's end
//	  | socket: the terminal of the command, if there is one
//	keeper    user namespace (not as root) and mount namespace; pids of the machine.
//	  |       Mounts the union on a directory that only its namespace has, and
//	  |       unmounts it when init has ended
//	  | pipe: the Spec; its end is the keeper's end
//	init      mount, pid, uts, ipc and cgroup namespace. Builds the root, pivots
//	  |       into it, passes signals on, reaps
//	command   what the image or the user says; a session of its own
//
// Keeper and init are hidden verbs of the running binary. The keeper is apart
// from init since the union's own processes live in its mount namespace: they
// must see the store, and their pids must mean something to other commands.
//
// # The image is hostile
//
//   - Nothing of it is looked up by a path of ours: [fsat.OpenBeneath] and
//     [fsat.OpenInRoot] walk from a descriptor of its root. Mounts are attached
//     to descriptors (move_mount(2)), so that no name can be exchanged between
//     look and use.
//   - /proc, /sys and /dev must be directories. A link in their place is refused.
//   - /etc/resolv.conf, hosts and hostname are covered as they are, links
//     included: what a link leads to is not asked.
//   - passwd and group are read as regular files of bounded size.
//   - The working directory is made and entered below the root, magic links not
//     followed, after everything of ours is closed.
//   - No device node of the image works: all mounts are nodev, but for the six
//     nodes that are bound from the machine's /dev and devpts.
//   - The command has a terminal of its own in a session of its own: what it
//     writes to it cannot become input of the caller's shell (TIOCSTI).
//   - init runs from a sealed copy of the binary: an entrypoint /proc/self/exe is
//     that copy, and no way to change the binary of the machine.
//   - init keeps capabilities that the command lacks and is not dumpable, so
//     that the command can neither trace it nor look at its descriptors.
//   - Where the kernel has Landlock, the command cannot connect to abstract
//     sockets of the machine, whose network namespace it shares.
//
// # One id
//
// A user without subordinate ids has a user namespace with one id. The kernel
// refuses every other owner before a file system is asked, so a seccomp filter
// answers such calls with success (emulate_linux.go): packages can be installed,
// their files belong to root.
//
// # What a death leaves
//
//	event             state                       who acts, how
//	----------------  --------------------------  ----------------------------------------------
//	command ends      -                           init ends, the kernel kills what it left; the
//	                                              keeper unmounts and ends with its status
//	init killed       the kernel kills all in it  the keeper, as above
//	keeper killed     its pipe to init ends       init ends; the holder of the mount sees the
//	                                              keeper's end and detaches it
//	outer killed      its pipe to the keeper ends the keeper kills init and unmounts
//	all killed        nobody uses the namespaces  the kernel drops them with their mounts
//
// Nothing is ever mounted where another process of the machine sees it, so a
// kill at any moment leaves no mount.
package sandbox
