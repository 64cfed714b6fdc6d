package oracle

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// path is one that exists, with luck.
func (g *gen) path() Name {
	switch k := g.IntN(100); {
	case k < 30 && len(g.files) > 0:
		return pick(g, g.files)
	case k < 88 && len(g.names) > 0:
		return pick(g, g.names)
	case k < 97:
		return join(pick(g, g.dirs), g.name())
	}
	return join(join(pick(g, g.dirs), g.name()), g.name())
}

// file is one that is a regular file, with more luck.
func (g *gen) file() Name {
	if len(g.files) > 0 && g.chance(80) {
		return pick(g, g.files)
	}
	return g.path()
}

func (g *gen) dir() Name {
	if g.chance(10) {
		return g.path()
	}
	return pick(g, g.dirs)
}

// fresh is a path for something new; it is remembered.
func (g *gen) fresh() Name {
	if len(g.names) > 0 && g.chance(35) {
		return pick(g, g.names) // where something was, or is
	}
	p := join(pick(g, g.dirs), g.name())
	g.names = append(g.names, p)
	return p
}

// slot is one that is open, mostly.
func (g *gen) slot() int {
	n := g.IntN(6)
	for range 6 {
		if g.open[n] || g.chance(3) {
			return n
		}
		n = (n + 1) % 6
	}
	return n
}

func (g *gen) perms() uint32 {
	return g.plainMode(pick(g, []uint32{0o644, 0o666, 0o600, 0o755, 0o777, 0o4755, 0o2755, 0o2644, 0o400, 0o000, 0o1777}))
}

// plainMode is mode, or what LateOpen and LikeNFS leave of it.
func (g *gen) plainMode(mode uint32) uint32 {
	if g.o.LateOpen || g.o.LikeNFS {
		mode &^= unix.S_ISUID | unix.S_ISGID
	}
	return mode
}

func (g *gen) follow() string {
	if g.chance(50) {
		return "NOFOLLOW"
	}
	return ""
}

func (g *gen) id() int { return pick(g, []int{-1, 0, 1000, 1001, 2000, 1000}) }

// chown completes a change of owner. A change of nothing is left to the named
// cases: a FUSE server cannot tell it from the first half of a write.
func (g *gen) chown(o Op) Op {
	o.UID, o.GID = g.id(), g.id()
	if o.UID == -1 && o.GID == -1 {
		o.GID = 2000
	}
	return o
}

func (g *gen) time() string {
	switch g.IntN(5) {
	case 0:
		return "now"
	case 1:
		return "omit"
	}
	return g.when()
}

func (g *gen) openFlags() string {
	f := pick(g, []string{"RDONLY", "RDONLY", "RDWR", "RDWR", "RDWR", "WRONLY"})
	add := func(percent int, s string) {
		if g.chance(percent) {
			f += "|" + s
		}
	}
	add(35, "CREAT")
	add(8, "EXCL")
	add(15, "TRUNC")
	add(12, "APPEND")
	add(4, "NOFOLLOW")
	add(3, "DIRECTORY")
	add(3, "SYNC")
	return f
}

// op makes one random operation.
func (g *gen) op() Op {
	for {
		o := g.anyOp()
		switch {
		case g.o.NoXattrs && (strings.Contains(o.Op, "xattr") || o.Op == "setflags"):
		case g.o.LikeNFS && beyondNFS(o):
		default:
			return o
		}
	}
}

// beyondNFS reports whether NFS has no word for an operation, or no place for its result.
func beyondNFS(o Op) bool {
	switch o.Op {
	case "mknod", "fallocate", "getflags", "statfs", "seek":
		return true
	}
	return strings.Contains(o.Flags, "TMPFILE") || strings.Contains(o.Flags, "EXCHANGE")
}

func (g *gen) anyOp() Op {
	switch k := g.IntN(100); {
	case k < 34:
		return g.fileOp()
	case k < 68:
		return g.nameOp()
	case k < 98:
		return g.metaOp()
	case k == 98 && g.chance(25):
		return Op{Op: "remount"}
	default:
		return pick(g, []Op{{Op: "umask", Mode: pick(g, []uint32{0, 0o022, 0o077, 0o027})}, {Op: "statfs"}, {Op: "snapshot", Path: pick(g, g.dirs)}})
	}
}

func (g *gen) fileOp() Op {
	fd := g.slot()
	off := g.Int64N(20000)
	n := pick(g, []int64{1, 10, 100, 4096, 9000})
	seed := g.Int64N(1e6)
	switch g.IntN(30) {
	case 0, 1, 2, 3, 4, 5, 6:
		fd := g.IntN(6)
		if g.chance(8) {
			return Op{Op: "open", FD: fd, Path: g.dir(), Flags: "RDWR|TMPFILE", Mode: g.perms()}
		}
		if g.chance(8) {
			return Op{Op: "open", FD: fd, Path: g.dir(), Flags: "RDONLY|DIRECTORY"}
		}
		if g.chance(4) {
			return Op{Op: "open", FD: fd, Path: g.path(), Flags: "PATH|NOFOLLOW"}
		}
		f := g.openFlags()
		p := g.file()
		if strings.Contains(f, "CREAT") {
			p = g.fresh()
		}
		return Op{Op: "open", FD: fd, Path: p, Flags: f, Mode: g.perms()}
	case 7:
		return Op{Op: "close", FD: fd}
	case 8, 9:
		return Op{Op: "read", FD: fd, Len: n}
	case 10, 11:
		return Op{Op: "pread", FD: fd, Off: off, Len: n}
	case 12, 13:
		return Op{Op: "write", FD: fd, Len: n, Seed: seed}
	case 14, 15:
		return Op{Op: "pwrite", FD: fd, Off: off, Len: n, Seed: seed}
	case 16:
		return Op{Op: "ftruncate", FD: fd, Len: pick(g, sizes)}
	case 17:
		return Op{Op: "fallocate", FD: fd, Off: off, Len: n, Flags: pick(g, []string{"", "KEEP", "PUNCH|KEEP", "PUNCH|KEEP"})}
	case 18:
		return Op{Op: "seek", FD: fd, Off: off, Flags: pick(g, []string{"SET", "DATA", "HOLE", "END"})}
	case 19:
		return Op{Op: "copyrange", FD: fd, FD2: g.slot(), Off: off, Off2: g.Int64N(20000), Len: n}
	case 20:
		return Op{Op: pick(g, []string{"fsync", "fdatasync"}), FD: fd}
	case 21, 22:
		return Op{Op: "fstat", FD: fd}
	case 23:
		return Op{Op: "fchmod", FD: fd, Mode: g.perms()}
	case 24:
		return pick(g, []Op{g.chown(Op{Op: "fchown", FD: fd}), {Op: "futimens", FD: fd, Atime: g.time(), Mtime: g.time()}})
	case 25:
		return pick(g, []Op{
			{Op: "flock", FD: fd, Flags: pick(g, []string{"SH", "EX", "UN"})},
			{Op: "ofdlock", FD: fd, Off: off, Len: n, Flags: pick(g, []string{"SH", "EX", "UN"})},
		})
	case 26:
		return Op{Op: "mmapread", FD: fd, Off: off, Len: n}
	case 27:
		return Op{Op: "mmapwrite", FD: fd, Off: off, Len: n, Seed: seed}
	case 28:
		return Op{Op: "linkfd", FD: fd, To: g.fresh()}
	default:
		name, value := g.xattr(false)
		return pick(g, []Op{{Op: "readdirfd", FD: fd}, {Op: "fsetxattr", FD: fd, Attr: name, Value: value}, {Op: "fgetxattr", FD: fd, Attr: name}})
	}
}

func (g *gen) nameOp() Op {
	switch g.IntN(24) {
	case 0, 1:
		p := g.fresh()
		g.dirs = append(g.dirs, p)
		return Op{Op: "mkdir", Path: p, Mode: pick(g, dirModes)}
	case 2, 3:
		return Op{Op: "rmdir", Path: g.dir()}
	case 4, 5, 6:
		return Op{Op: "unlink", Path: g.path()}
	case 8:
		types := []uint32{unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFREG}
		op := Op{Op: "mknod", Path: g.fresh()}
		if !g.o.Unprivileged {
			types = append(types, unix.S_IFCHR)
			op.Off, op.Off2 = pick(g, []int64{0, 1, 511}), pick(g, []int64{0, 3})
		}
		op.Mode = pick(g, types) | g.perms()
		return op
	case 9:
		return Op{Op: "symlink", Path: g.fresh(), To: g.target()}
	case 10, 11:
		return Op{Op: "link", Path: g.file(), To: g.fresh(), Flags: pick(g, []string{"", "", "FOLLOW"})}
	case 7, 12, 13, 14, 15, 16:
		to := g.fresh()
		if g.chance(30) {
			g.dirs = append(g.dirs, to)
		}
		flags := pick(g, []string{"", "", "", "NOREPLACE", "EXCHANGE"})
		return Op{Op: "rename", Path: g.path(), To: to, Flags: flags}
	case 17:
		return Op{Op: "readlink", Path: g.path()}
	case 18, 19:
		return Op{Op: "readdir", Path: g.dir()}
	case 20:
		return Op{Op: "dirseek", Path: g.dir()}
	case 21:
		return Op{Op: "put", Path: g.fresh(), Len: pick(g, sizes), Seed: g.Int64N(1e6), Mode: g.perms()}
	default:
		if g.chance(50) {
			return Op{Op: "chdir", Path: g.dir()}
		}
		return Op{Op: pick(g, []string{"lstat", "unlink", "rmdir", "readdir", "put"}), Path: pick(g, []Name{".", "a", "b", "../a", "c/d"}), Rel: true, Text: "relative"}
	}
}

func (g *gen) metaOp() Op {
	p := g.path()
	switch g.IntN(24) {
	case 0, 1:
		return Op{Op: "stat", Path: p}
	case 2, 3, 4:
		return Op{Op: "lstat", Path: p}
	case 5:
		return Op{Op: "access", Path: p, Mode: uint32(g.IntN(8))}
	case 6, 7:
		return Op{Op: "chmod", Path: p, Mode: g.perms()}
	case 8:
		return g.chown(Op{Op: "chown", Path: p})
	case 9:
		return g.chown(Op{Op: "lchown", Path: p})
	case 10, 11:
		return Op{Op: "utimens", Path: p, Atime: g.time(), Mtime: g.time(), Flags: g.follow()}
	case 12:
		return Op{Op: "truncate", Path: g.file(), Len: pick(g, sizes)}
	case 13, 14:
		return Op{Op: "cat", Path: g.file()}
	case 15, 16:
		name, value := g.xattr(g.chance(40))
		flags := pick(g, []string{"", "", "XCREATE", "XREPLACE"})
		if g.chance(30) {
			flags = strings.TrimPrefix(flags+"|NOFOLLOW", "|")
		}
		if g.chance(8) {
			name, value = pick(g, []string{"bogus.name", "user.", "trusted.overlay.opaque", "trusted.overlay.foo", "trusted.overlay.origin", "trusted.overlay.overlay.x", "user.overlay.whiteout", "user." + strings.Repeat("n", 250), "user.big"}), pick(g, []string{"y", "rep:5000", "rep:65536", "rep:65537"})
			if g.o.Unprivileged {
				name = "user.overlay.foo"
			}
		}
		return Op{Op: "setxattr", Path: p, Attr: name, Value: value, Flags: flags}
	case 17, 18:
		name, _ := g.xattr(g.chance(40))
		op := Op{Op: "getxattr", Path: p, Attr: name, Flags: g.follow()}
		if g.chance(15) {
			op.Len = pick(g, []int64{-1, 1, 3})
		}
		return op
	case 19:
		name, _ := g.xattr(g.chance(40))
		return Op{Op: "removexattr", Path: p, Attr: name, Flags: g.follow()}
	case 20, 21:
		return Op{Op: "listxattr", Path: p, Flags: g.follow()}
	case 22:
		if g.o.Unprivileged || g.chance(50) {
			return Op{Op: "cat", Path: g.file()}
		}
		return pick(g, []Op{
			{Op: "getflags", Path: p},
			{Op: "setflags", Path: p, Flags: pick(g, []string{"", "", "d", "dA", "i"})},
		})
	default:
		return Op{Op: "put", Path: p, Text: fmt.Sprint("text ", g.IntN(1000)), Flags: pick(g, []string{"CREAT|TRUNC", "TRUNC", "APPEND", "CREAT|EXCL"})}
	}
}
