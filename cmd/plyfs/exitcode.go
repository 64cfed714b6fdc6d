package main

import (
	"context"
	"errors"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
)

// Exit codes are part of the interface: scripts test them. A number is never
// given another meaning.
const (
	exitOK       = 0
	exitFailure  = 1 // anything without a code of its own, and Ctrl-C
	exitUsage    = 2 // wrong options, arguments or names
	exitNotFound = 3 // no such image, container or mount
	exitConflict = 4 // exists already, in use, mounted, busy
	exitCorrupt  = 5 // damaged data, digest mismatch
	exitLocked   = 6 // the store is locked, or something took too long
	exitMount    = 7 // mounting or unmounting failed
	exitFindings = 8 // check found problems
)

// What mount(8) expects of its helpers.
const (
	exitHelperUsage = 1
	exitHelperMount = 32
)

// codedError is an error with an exit code of its own.
type codedError struct {
	error
	code int
}

func (e codedError) Unwrap() error { return e.error }

// withCode gives an error an exit code; nil stays nil.
func withCode(err error, code int) error {
	if err == nil {
		return nil
	}
	return codedError{err, code}
}

// errFindings makes `plyfs check` end with its own code, without a message.
var errFindings = errors.New("problems found")

// exitCode gives the code of an error.
func exitCode(err error) int {
	if coded, ok := errors.AsType[codedError](err); ok {
		return coded.code
	}
	for _, c := range []struct {
		is   error
		code int
	}{
		{nil, exitOK},
		{errFindings, exitFindings},
		{mountd.ErrUsage, exitUsage},
		{layers.ErrInvalid, exitUsage},
		{layers.ErrNotFound, exitNotFound},
		{layers.ErrExists, exitConflict},
		{layers.ErrInUse, exitConflict},
		{layers.ErrCorrupt, exitCorrupt},
		{layers.ErrLocked, exitLocked},
		{context.DeadlineExceeded, exitLocked},
		{mountd.ErrMount, exitMount},
	} {
		if errors.Is(err, c.is) {
			return c.code
		}
	}
	return exitFailure
}
