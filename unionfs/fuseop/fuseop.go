package fuseop

// The operations that are told apart by number.
const (
	Lookup        = 1
	Forget        = 2
	Getattr       = 3
	Setattr       = 4
	Readlink      = 5
	Symlink       = 6
	Mknod         = 8
	Mkdir         = 9
	Unlink        = 10
	Rmdir         = 11
	Rename        = 12
	Link          = 13
	Open          = 14
	Read          = 15
	Write         = 16
	Release       = 18
	Fsync         = 20
	Setxattr      = 21
	Getxattr      = 22
	Removexattr   = 24
	Init          = 26
	Opendir       = 27
	Readdir       = 28
	Releasedir    = 29
	Fsyncdir      = 30
	Access        = 34
	Create        = 35
	Interrupt     = 36
	Destroy       = 38
	Ioctl         = 39
	NotifyReply   = 41
	BatchForget   = 42
	Fallocate     = 43
	Readdirplus   = 44
	Rename2       = 45
	Lseek         = 46
	CopyFileRange = 47
	Tmpfile       = 51
)
