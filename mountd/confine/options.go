package confine

import "errors"

// NoFilter is the environment variable that, if it is not empty, leaves system calls alone.
const NoFilter = "PLYFS_NO_SECCOMP"

// ErrUnavailable says that neither this kernel nor this build can filter calls.
var ErrUnavailable = errors.New("system calls cannot be filtered here")

// Options say what is allowed besides.
type Options struct {
	// Unmount allows umount2(2).
	Unmount bool
	// Kill allows kill(2) of any process.
	Kill bool
}
