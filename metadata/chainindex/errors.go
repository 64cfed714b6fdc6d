package chainindex

import "errors"

var (
	// ErrCorrupt: the bytes contradict their checksum or each other. Remove the index and build it again.
	ErrCorrupt = errors.New("index is damaged")
	// ErrVersion: a good header of another format version. Build the index again.
	ErrVersion = errors.New("index has another format version")
	// ErrFault: the mapping could not be read (disk error, or the file was cut off under the reader).
	ErrFault = errors.New("index cannot be read")
	// ErrNotDir: a directory operation on a slot that is something else.
	ErrNotDir = errors.New("not a directory")
	// ErrNoSlot: the index has no such slot.
	ErrNoSlot = errors.New("no such inode in the index")
	// ErrClosed: the Index was used after Close, or the Writer after Commit, WriteTo or Discard.
	ErrClosed = errors.New("index is closed")
	// ErrInvalid: the Writer was given something that an index cannot hold, or in the wrong order. Nothing usable was written.
	ErrInvalid = errors.New("invalid index content")
)
