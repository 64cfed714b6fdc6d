package unionfs

import (
	"go.uber.org/zap"

	"github.com/plyfs/plyfs/whiteout"
)

// Layer is one read-only lower directory.
type Layer struct {
	// Path is the layer's directory. It is opened once, by New, and never
	// looked up again.
	Path string
	// Dialect says how whiteouts and opaque directories are written in it.
	Dialect whiteout.Dialect
}

// Options describes one union. Lowers[0] is the topmost lower.
type Options struct {
	Lowers []Layer

	// Upper and Work are the writable directory and the scratch directory
	// on the same file system. Both empty: a read-only union.
	Upper, Work string
	// UpperDialect is what the upper is read and written in. The zero value
	// is whiteout.Overlay.
	UpperDialect whiteout.Dialect

	// Volatile drops every durability promise: no fsync reaches the disk.
	Volatile bool

	// Logger receives what an operator must know. Nil means no logging.
	Logger *zap.Logger
}
