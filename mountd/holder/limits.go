package holder

import (
	"fmt"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// Limits bound what a mount server takes of the machine.
type Limits struct {
	// Memory is what the server keeps to as well as it can, in bytes; 0: no limit. It
	// collects garbage more often when it comes near. What programs have in use it keeps
	// all the same: that is no garbage.
	Memory int64 `json:"memory,omitempty"`
	// OpenFiles is how many descriptors it may have; 0: as many as the system allows. With
	// more files open at once, programs get EMFILE.
	OpenFiles int64 `json:"openFiles,omitempty"`
}

// The least that a server can work with.
const (
	MinMemory    = 16 << 20
	MinOpenFiles = 64
)

// Validate reports limits that no server could keep.
func (l Limits) Validate() error {
	switch {
	case l.Memory != 0 && l.Memory < MinMemory:
		return fmt.Errorf("memory limit of %d bytes: a mount server needs at least %d", l.Memory, MinMemory)
	case l.OpenFiles != 0 && l.OpenFiles < MinOpenFiles:
		return fmt.Errorf("limit of %d open files: a mount server needs at least %d", l.OpenFiles, MinOpenFiles)
	}
	return nil
}

// obey gives the calling process, a server, its limits.
func (l Limits) obey() error {
	if l.Memory > 0 {
		debug.SetMemoryLimit(l.Memory + ballast) // which counts, but takes nothing
	}
	if l.OpenFiles == 0 {
		return nil
	}
	var now unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &now); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	n := min(uint64(l.OpenFiles), now.Max)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: n}); err != nil {
		return fmt.Errorf("limit of %d open files: %w", n, err)
	}
	return nil
}
