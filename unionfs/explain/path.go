package explain

import "github.com/plyfs/plyfs/unionfs/trace"

// Path is a path, or another text, of any bytes, in the form that events have.
type Path = trace.Text
