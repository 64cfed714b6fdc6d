// Package ledger keeps in shared memory what a mount server knows and cannot find out
// again: which object each node id is that the kernel has, and which requests it was
// answering. The memory outlives the server; the next one reads it.
//
// # What is written down
//
//	name    id, parent, name: the object with this node id has this name. Where there
//	        are several names, there are several records. Whether the object lives in
//	        the upper is no part of it: that is found on the disk.
//	loose   id: an object without a name, of which the holder has a descriptor
//	work    id, name: one that has a name in the workdir
//	index   id, name: one that has a name in the link index
//	lower   id, path: one whose data, or all of it, is in the lowers at a path where the
//	        union does not show it any more
//	opens   id, and how often the kernel has the file open, in which way
//	op      a request that changes names, attributes or open files, see [Op]
//
// Besides, which requests are being answered at all, see [Ledger.Suspects].
// The next free node id of those that are counted is in the header, and changed there.
//
// # Invariants
//
//   - A name record is there before the kernel learns the node id, and before an object
//     that has one is copied up. It goes after the name has gone.
//   - A record is valid from one store of its state on, and invalid from another on: a
//     process that is killed leaves whole records, never parts.
//   - When a request that changes names is answered its records agree with the disk. One
//     that was not may have left either; its op record says which names to compare.
//   - Nobody who has the memory needs anything else to read it, and nothing in it is
//     trusted beyond its bounds.
//
// # Layout
//
// A header of one page, the table of requests that are being answered, then units of 64 bytes. A record takes one or several that
// follow each other, and keeps that number for ever; free ones are reused for records of
// the same size. The file grows, and never shrinks; it is mapped once, in a larger address
// space than it has. A name takes one unit up to 32 bytes, so 100 000 objects take 6 to 13 MB.
//
// The memory is for processes of one machine, one boot and one version of this package
// ([version]): all integers are the machine's.
//
// # Locks
//
// Ledger.mu is a leaf: nothing is locked while it is held.
package ledger
