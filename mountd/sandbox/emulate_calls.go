//go:build linux && (amd64 || arm64)

package sandbox

import (
	"slices"

	"golang.org/x/sys/unix"
)

// idCalls are all system calls that are emulated.
var idCalls = slices.Concat(oldIDCalls, []idCall{
	{unix.SYS_FCHOWN, []int{1, 2}},
	{unix.SYS_FCHOWNAT, []int{2, 3}},
	{unix.SYS_SETUID, []int{0}},
	{unix.SYS_SETGID, []int{0}},
	{unix.SYS_SETREUID, []int{0, 1}},
	{unix.SYS_SETREGID, []int{0, 1}},
	{unix.SYS_SETRESUID, []int{0, 1, 2}},
	{unix.SYS_SETRESGID, []int{0, 1, 2}},
	{unix.SYS_SETFSUID, []int{0}},
	{unix.SYS_SETFSGID, []int{0}},
	{unix.SYS_SETGROUPS, nil},
})
