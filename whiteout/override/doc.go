// Package override knows the attribute in which an object of a layer says that it
// has another owner, mode or type than its file: override_stat. It is how a user
// without privileges keeps the owners of an image, and what fuse-overlayfs
// (-o xattr_permissions) and containers/storage (force_mask) write.
//
//	user.containers.override_stat = "0:8:2775"              owner, group, octal mode
//	user.containers.override_stat = "0:5:620:char-5-1"      and a type: file, dir, symlink,
//	                                                        pipe, socket, block-A-B, char-A-B
//
// An object without the attribute is what its file is. Only regular files and
// directories can have it, so a device, pipe or socket is an empty file that says
// what it is. So is a symbolic link that does not belong to root, with its target in
// an attribute of its own.
//
// Attributes that a user may not set, or that would be obeyed with the ids of the
// wrong user namespace, are kept beside it, under user.containers.override_ and
// their own name: security.*, trusted.* and ACLs.
//
// # Laws
//
//   - Nothing obeys the attribute unless its layer's [Form] says so: anybody who
//     owns a file can write it.
//   - In a layer with a Form, all names under the prefix are private: no user of
//     a mount sees one or sets one. One that a user gives is kept under the prefix
//     and its own name, as the others: FromDisk(ToDisk(n)) == n for every n.
//   - A file whose mode is overridden never has setuid or setgid itself, and its
//     owner, who is not root, can read and write it ([RealMode]).
//
// The package imports nothing of plyfs but whiteout/xattrat.
package override
