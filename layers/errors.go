package layers

import "errors"

// Sentinel errors. Every error that leaves this package wraps at most one of
// them; callers test with errors.Is and turn them into exit codes.
var (
	// ErrNotFound: no image, container, layer or mount of that name.
	ErrNotFound = errors.New("not found")
	// ErrExists: the name is taken by something else.
	ErrExists = errors.New("already exists")
	// ErrInUse: something named in the message still needs the object.
	ErrInUse = errors.New("in use")
	// ErrInvalid: the caller's argument (a reference, a name, an archive that
	// is not one) cannot be used.
	ErrInvalid = errors.New("invalid argument")
	// ErrCorrupt: data does not match its digest, an archive is truncated or
	// contradicts itself, or the store fails its own invariants.
	ErrCorrupt = errors.New("corrupt data")
	// ErrLocked: another process holds the database longer than we wait.
	ErrLocked = errors.New("store is locked")
	// ErrUnsupported: well-formed, but not something this store can hold.
	ErrUnsupported = errors.New("not supported")
)
