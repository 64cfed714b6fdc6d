// Package lint holds the repository rules as tests, so that `go test ./...` is the whole gate.
//
// Rules and where they live:
//
//	imports_test.go  who may import whom: arrows of the package tree point down only, bbolt stays in metadata and snapshotter,
//	                 go-fuse in unionfs and mountd, leaves depend on the standard library and x/sys alone
//	source_test.go   calls that are not used here, with the replacement in the message; length of files
//	tree_test.go     top-level directories, doc.go with a package comment in each package, no names of files that are not
//	                 in the tree
//
// A rule that has to change is changed here first, together with the reason.
package lint
