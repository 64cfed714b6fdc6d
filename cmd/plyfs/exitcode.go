package main

import (
	"context"
	"errors"
	"fmt"

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

// errFindings makes `plyfs check` end with its own code, without a message.
var errFindings = errors.New("problems found")

// statusError ends a command with a status of its own: that of a program which
// `plyfs shell` has run, one of docker's for its failures, or what the caller of a
// mount helper expects. Without an error there is nothing to say.
type statusError struct {
	status int
	err    error
}

func (e statusError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.status)
	}
	return e.err.Error()
}

func (e statusError) Unwrap() error { return e.err }

// withCode gives an error an exit code; nil stays nil.
func withCode(err error, code int) error {
	if err == nil {
		return nil
	}
	return statusError{code, err}
}

// silent reports an error that has been told already, or is none.
func silent(err error) bool {
	var s statusError
	return errors.Is(err, errFindings) || errors.As(err, &s) && s.err == nil
}

// exitCode gives the code of an error.
func exitCode(err error) int {
	if s, ok := errors.AsType[statusError](err); ok {
		return s.status
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
