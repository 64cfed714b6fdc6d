package counters

import "syscall"

// Opcodes that are told apart; all others are counted as number 0.
const opCount = 64

// opNames are the names of include/uapi/linux/fuse.h in lower case.
var opNames = [opCount]string{
	0: "other", 1: "lookup", 2: "forget", 3: "getattr", 4: "setattr", 5: "readlink", 6: "symlink", 8: "mknod", 9: "mkdir",
	10: "unlink", 11: "rmdir", 12: "rename", 13: "link", 14: "open", 15: "read", 16: "write", 17: "statfs", 18: "release",
	20: "fsync", 21: "setxattr", 22: "getxattr", 23: "listxattr", 24: "removexattr", 25: "flush", 26: "init", 27: "opendir",
	28: "readdir", 29: "releasedir", 30: "fsyncdir", 31: "getlk", 32: "setlk", 33: "setlkw", 34: "access", 35: "create",
	36: "interrupt", 37: "bmap", 38: "destroy", 39: "ioctl", 40: "poll", 41: "notify_reply", 42: "batch_forget",
	43: "fallocate", 44: "readdirplus", 45: "rename2", 46: "lseek", 47: "copy_file_range", 48: "setupmapping",
	49: "removemapping", 50: "syncfs", 51: "tmpfile", 52: "statx",
}

// slot returns where an opcode is counted.
func slot(opcode uint32) uint32 {
	if opcode >= opCount || opNames[opcode] == "" {
		return 0
	}
	return opcode
}

// OpName returns the name of an operation.
func OpName(opcode uint32) string { return opNames[slot(opcode)] }

// OpNames returns the names of all operations, so that who shows them knows how many
// there may be.
func OpNames() []string {
	var names []string
	for _, n := range opNames {
		if n != "" {
			names = append(names, n)
		}
	}
	return names
}

// Class is a kind of error. The first ones are ordinary answers.
type Class uint8

const (
	NotFound   Class = iota // a name that is not there: ENOENT
	NoData                  // an extended attribute that is not there: ENODATA
	NotOffered              // what the kernel asks for once, and then does by itself: ENOSYS
	Denied                  // EPERM, EACCES, EROFS
	Conflict                // EEXIST, ENOTEMPTY, EISDIR, ENOTDIR, EBUSY, EXDEV
	NoSpace                 // ENOSPC, EDQUOT, EFBIG
	IOError                 // EIO, ESTALE
	Other                   // all the rest
	classes
)

var classNames = [classes]string{"not_found", "no_data", "not_offered", "denied", "conflict", "no_space", "io", "other"}

// String returns the name that documents have.
func (c Class) String() string {
	if c < classes {
		return classNames[c]
	}
	return "other"
}

// Classes returns all classes.
func Classes() []Class {
	all := make([]Class, classes)
	for i := range all {
		all[i] = Class(i)
	}
	return all
}

// Ordinary reports whether nobody would call it an error.
func (c Class) Ordinary() bool { return c <= NotOffered }

// classOf returns the class of an error number.
func classOf(errno syscall.Errno) Class {
	switch errno {
	case syscall.ENOENT:
		return NotFound
	case syscall.ENODATA:
		return NoData
	case syscall.ENOSYS:
		return NotOffered
	case syscall.EPERM, syscall.EACCES, syscall.EROFS:
		return Denied
	case syscall.EEXIST, syscall.ENOTEMPTY, syscall.EISDIR, syscall.ENOTDIR, syscall.EBUSY, syscall.EXDEV:
		return Conflict
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return NoSpace
	case syscall.EIO, syscall.ESTALE:
		return IOError
	}
	return Other
}
