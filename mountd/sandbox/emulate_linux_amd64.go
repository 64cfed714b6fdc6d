package sandbox

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_X86_64

// oldIDCalls are calls that newer architectures do not have.
var oldIDCalls = []idCall{
	{unix.SYS_CHOWN, []int{1, 2}},
	{unix.SYS_LCHOWN, []int{1, 2}},
}
