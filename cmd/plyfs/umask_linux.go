package main

import (
	"io/fs"

	"golang.org/x/sys/unix"
)

// umask returns the mode bits that new files must not have. It can only be
// read by setting it; no other goroutine makes files meanwhile.
func umask() fs.FileMode {
	m := unix.Umask(0o077)
	unix.Umask(m)
	return fs.FileMode(m)
}
