package metadata

import (
	"errors"
	"fmt"
)

var (
	// ErrNotFound: no such row.
	ErrNotFound = errors.New("no such record")
	// ErrExists: a row or a name is taken.
	ErrExists = errors.New("record exists")
	// ErrInUse: other rows still name this one.
	ErrInUse = errors.New("record in use")
	// ErrInvariant: the change would break an invariant of the schema.
	ErrInvariant = errors.New("database invariant violated")
	// ErrLocked: another process held the database for longer than the timeout.
	ErrLocked = errors.New("database is locked")
	// ErrSchema: the database was written by a newer version, or is none of ours.
	ErrSchema = errors.New("unknown database schema")
	// ErrCorrupt: the file or a row cannot be read.
	ErrCorrupt = errors.New("corrupt database")
	// ErrFile: the file as a whole cannot be used. It matches ErrCorrupt, too.
	ErrFile = fmt.Errorf("%w file", ErrCorrupt)
)

func errInvariantf(format string, a ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrInvariant}, a...)...)
}
