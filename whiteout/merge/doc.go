// Package merge holds the rule that makes one directory out of many: what a
// union shows for a directory that several layers have. It is a pure function:
// no I/O inside, and the order in which a mount is looked at cannot matter.
//
// The rule, for each name, from the topmost layer down (kernel: ovl_lookup and
// ovl_dir_read_merged in fs/overlayfs):
//
//   - the first object found decides what the name is;
//   - anything but a directory ends the search, and so does a whiteout;
//   - a directory goes on collecting directories of that name below it;
//   - an object and a whiteout of one name in one layer (aufs dialect): the
//     object counts, the whiteout hides what lies below;
//   - nothing below an opaque directory is looked at.
//
// Merge is associative: merging the merged listing of the lower layers with an
// upper one gives the same as merging them all at once. The union file system
// relies on this.
package merge
