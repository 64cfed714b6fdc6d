// Package chainindex is the format, the writer and the reader of index files: the metadata of a whole tree (names, modes,
// owners, sizes, times, link targets, extended attributes) in one file that is mapped into memory and never parsed as a whole.
//
// One format serves two purposes:
//
//   - the index of one layer ([KindLayer]): what the layer's archive said, names and owners as in the archive. Entries may be
//     whiteouts, directories may be opaque or implicit (in the layer only because something below them is);
//   - the index of a chain ([KindChain]): the merged tree of all layers of an image, with the layer that holds each content.
//     It has no whiteouts. [Merge] makes it from the layers' own indexes.
//
// An index is a cache: it can be rebuilt from the layers, so every doubt about it is an error and never a guess. Nothing here
// knows FUSE or the database.
//
// # Layout
//
// All numbers are little endian. The file is a header page, the checksum table, and the payload:
//
//	0      header        4096 bytes
//	4096   checksums     4 bytes per payload block: CRC-32C; padded with zeros to a multiple of 4096
//	...    payload       blocks of 16 KiB, the last one shorter; the sections follow each other in this order
//	         inodes      128 bytes per inode, slot 1 first
//	         entries     32 bytes per directory entry; those of one directory lie together, sorted by name bytewise
//	         strings     tails of names, link targets, paths: bytes, no terminators
//	         attributes  sets of extended attributes
//
// Header (what is not listed is zero):
//
//	0 magic "plyfsidx"   8 version u32     12 kind u32          16 file size u64
//	24 payload at u64    32 payload u64    40 inodes u64        48 entries u64
//	56 strings u64       64 attributes u64 72 layers u32        76 CRC-32C of the checksum table, padding included, u32
//	80 length of id u32  128 id, up to 256 bytes (chainID, or what names the layer)
//	4092 CRC-32C of the bytes before it
//
// Inode (an object; hard links share it):
//
//	0 mode u32       4 flags u32     8 uid u32         12 gid u32      16 nlink u32       20 layer u32
//	24 size u64      32 mtime i64    40 ctime i64      48 atime i64    56 their nanoseconds 3 * u32
//	68 parent u32    72 entry u64    (slot of the directory, and number of the entry, of the first name)
//	80 value u64     directory: number of its first entry; symlink: ref of the target; device: rdev as the kernel's dev_t
//	88 count u32     entries of a directory
//	92 origin u32    slot in the index of the layer (0: this slot)
//	96 attributes    ref of the attribute set
//	104 ino u64      inode number of the content in its layer directory (0: not known); of a merged directory, of the lowest one
//	112 path         ref of the path of the content in its layer, where that is not the path in this tree
//	120 blocks u64   st_blocks of the content in its layer directory
//
// Directory entry (one name):
//
//	0 the first 16 bytes of the name, padded with zeros       16 slot u32 (0: whiteout only)
//	20 length of the name u8     21 type u8 (DT_*)    22 flags u8 (1: also a whiteout for what lies below)    23 zero
//	24 offset of the rest of the name in strings u64 (0 if the name has at most 16 bytes)
//
// A ref is offset | length<<40, in strings or in attributes; 0 is none. An attribute set is a u32 count, then for each attribute,
// sorted by name, u16 length of name, u32 length of value, name, value.
//
// # Invariants
//
//   - The root is slot 1, a directory, and its own parent. A slot is a node id of the mount that uses the index.
//   - Each other inode is reached by at least one entry; the first that was written is the one it names.
//   - A directory has exactly one entry, so the tree has no cycles and every path ends at the root.
//   - Entry ranges of directories do not overlap. Names within one are strictly ascending, 1..255 bytes, without '/' and NUL,
//     never "." or "..".
//   - The same calls to [Writer] give the same bytes.
//
// [Index.Verify] checks all of these; the other methods check what they touch.
//
// # Damage
//
// The header and the checksum table are checked when the file is opened, a block when it is first used, and every offset before
// it is followed. Wrong bytes give [ErrCorrupt]. A page that cannot be read any more (disk error, file cut off after it was
// mapped) would be a SIGBUS: readers run under debug.SetPanicOnFault and turn it into [ErrFault]. A block that was good at first
// use and is read wrongly by the disk later is not noticed by its checksum, but cannot lead outside the file either.
//
// # Crash table (Writer.Commit)
//
//	stopped after                 state                     what a restart does
//	temporary file created        NAME.tmp-* beside NAME    remove it (no name of an index contains ".tmp-")
//	written and synced            the same                  the same
//	renamed                       old or new, both whole    nothing
//
// # Locks
//
// None. An Index is immutable; its record of verified blocks is atomic, and verifying a block twice is harmless. A Writer is for
// one goroutine. Close an Index only after the last call on it has returned.
package chainindex
