// Package oracle compares two mounts of the same layers, operation by
// operation.
//
//   - A Recipe describes a layer stack; Build makes it on disk, as often as
//     wanted, always the same.
//   - An Op is one operation: a system call or a few, done as one of several
//     users, on a path or on a numbered slot that holds an open file.
//   - An Agent is a process that is chrooted into a mount and executes
//     operations. Its answer is a Result: an errno name and text, both free of
//     anything that may differ between two right answers (inode numbers, the
//     time now, the order of a listing).
//   - A Trial builds a recipe twice, executes operations on both, compares,
//     mounts the uppers again (also crosswise) and compares once more.
//   - GenRecipe and GenOps make both at random from a seed; Reduce makes a
//     failing trial small; Save and Load keep it.
//
// # What is compared
//
// Names, types, modes, owners, sizes of files, link counts of files, which
// names are hard links of each other, device numbers, link targets, extended
// attributes, contents, holes, and which lower object a name is by its inode
// number. A modification time is compared exactly when it
// lies in the past or the future; one within minutes of the run is "recent".
// What is left out, with reasons, stands in accepted.go.
//
// # Text form
//
// Named cases are written as text, see Parse.
package oracle
