package oracle

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Op is one operation of an agent. Which fields mean something depends on Op;
// the table in exec.go tells. Paths begin at the root of the mount, or at the
// user's working directory if Rel is set.
type Op struct {
	Op    string `json:"op"`
	User  int    `json:"user,omitempty"`  // index into Users
	Agent int    `json:"agent,omitempty"` // which process
	Path  Name   `json:"path,omitempty"`
	To    Name   `json:"to,omitempty"` // rename, link, symlink (target), linkfd
	Rel   bool   `json:"rel,omitempty"`
	FD    int    `json:"fd,omitempty"`  // slot of an open file
	FD2   int    `json:"fd2,omitempty"` // second slot (copyrange)
	Flags string `json:"flags,omitempty"`
	Mode  uint32 `json:"mode,omitempty"`
	UID   int    `json:"uid,omitempty"`
	GID   int    `json:"gid,omitempty"`
	Off   int64  `json:"off,omitempty"`
	Off2  int64  `json:"off2,omitempty"`
	Len   int64  `json:"len,omitempty"`
	Seed  int64  `json:"seed,omitempty"` // of the data written
	Text  string `json:"text,omitempty"` // the data written, instead
	Attr  string `json:"attr,omitempty"` // name of an extended attribute
	Value string `json:"value,omitempty"`
	Atime string `json:"atime,omitempty"`
	Mtime string `json:"mtime,omitempty"`
	// Expect, if not empty, is what the subject must show instead of what
	// the kernel shows: a documented difference.
	Expect string `json:"expect,omitempty"`
}

// Result is what an operation showed. Results of the same operation on both
// sides must be equal.
type Result struct {
	Err string `json:"err,omitempty"` // name of the errno; empty for success
	Out string `json:"out,omitempty"`
	// Ghosts are names that a listing showed and lstat does not know. The
	// kernel has them, see Accepted; nobody else may.
	Ghosts string `json:"ghosts,omitempty"`
	// Gone: the operation was on a descriptor whose object has no name.
	Gone bool `json:"gone,omitempty"`
}

// String is for messages.
func (r Result) String() string {
	switch {
	case r.Ghosts != "":
		return r.Out + " and names that do not exist: " + r.Ghosts
	case r.Err != "" && r.Out != "":
		return r.Err + ": " + r.Out
	case r.Err != "":
		return r.Err
	case r.Out != "":
		return r.Out
	}
	return "ok"
}

// String writes the operation in the text form that ParseOp reads.
func (o Op) String() string {
	var b strings.Builder
	if o.User != 0 {
		fmt.Fprintf(&b, "u%d ", o.User)
	}
	b.WriteString(o.Op)
	str := func(key, v string) {
		if v == "" {
			return
		}
		if strings.ContainsAny(v, " \t\n\"") {
			v = fmt.Sprintf("%q", v)
		}
		b.WriteByte(' ')
		if key != "" {
			b.WriteString(key + "=")
		}
		b.WriteString(v)
	}
	num := func(key string, v int64) {
		if v != 0 {
			fmt.Fprintf(&b, " %s=%d", key, v)
		}
	}
	str("", o.Path.String())
	if o.To != "" {
		str("to", o.To.String())
	}
	num("fd", int64(o.FD))
	num("fd2", int64(o.FD2))
	str("flags", o.Flags)
	if o.Mode != 0 {
		fmt.Fprintf(&b, " mode=0%o", o.Mode)
	}
	num("uid", int64(o.UID))
	num("gid", int64(o.GID))
	num("off", o.Off)
	num("off2", o.Off2)
	num("len", o.Len)
	num("seed", o.Seed)
	str("text", o.Text)
	str("attr", o.Attr)
	str("value", o.Value)
	str("atime", o.Atime)
	str("mtime", o.Mtime)
	if o.Rel {
		b.WriteString(" rel=1")
	}
	return b.String()
}

// User is an identity operations are executed as.
type User struct {
	UID, GID int
	Groups   []int
}

// Users are the identities of an agent that runs as root. User 0 keeps all
// capabilities.
var Users = []User{
	{0, 0, nil},
	{1000, 1000, []int{1000, 2000}},
	{1001, 1001, []int{2000}},
}

var flagBits = map[string]int{
	"RDONLY": 0, "WRONLY": unix.O_WRONLY, "RDWR": unix.O_RDWR, "CREAT": unix.O_CREAT, "EXCL": unix.O_EXCL,
	"TRUNC": unix.O_TRUNC, "APPEND": unix.O_APPEND, "DIRECTORY": unix.O_DIRECTORY, "NOFOLLOW": unix.O_NOFOLLOW,
	"TMPFILE": unix.O_TMPFILE, "PATH": unix.O_PATH, "SYNC": unix.O_SYNC, "DSYNC": unix.O_DSYNC, "NOATIME": unix.O_NOATIME,
	"NONBLOCK": unix.O_NONBLOCK,
	// of rename, prefixed in C by RENAME_
	"NOREPLACE": unix.RENAME_NOREPLACE, "EXCHANGE": unix.RENAME_EXCHANGE, "WHITEOUT": unix.RENAME_WHITEOUT,
	// of fallocate
	"KEEP": unix.FALLOC_FL_KEEP_SIZE, "PUNCH": unix.FALLOC_FL_PUNCH_HOLE, "ZERO": unix.FALLOC_FL_ZERO_RANGE,
	// of setxattr, prefixed by XATTR_
	"XCREATE": unix.XATTR_CREATE, "XREPLACE": unix.XATTR_REPLACE,
	// of flock and open-file-description locks
	"SH": unix.LOCK_SH, "EX": unix.LOCK_EX, "UN": unix.LOCK_UN,
	// of link
	"FOLLOW": unix.AT_SYMLINK_FOLLOW,
}

// parseFlags reads "A|B".
func parseFlags(s string) (int, error) {
	bits := 0
	if s == "" {
		return 0, nil
	}
	for f := range strings.SplitSeq(s, "|") {
		b, ok := flagBits[f]
		if !ok {
			return 0, fmt.Errorf("unknown flag %q", f)
		}
		bits |= b
	}
	return bits, nil
}
