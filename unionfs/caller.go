package unionfs

import (
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/whiteout/xattrat"
)

// The kernel checks permissions before it asks. What is left to the server
// needs more of the caller than a request tells; it is read from procfs, in the
// rare cases that need it.

// callerIsAdmin reports whether the calling process has CAP_SYS_ADMIN, in the first user
// namespace: that of another is not enough, and nobody outside of it can call a server in it.
func callerIsAdmin(h *fuse.InHeader) bool {
	if h.Uid != 0 || !inFirstUserNS() {
		return false
	}
	hex, found := callerStatus(h, "CapEff")
	if !found {
		return true // in another pid namespace, or gone: go by the user id
	}
	caps, err := strconv.ParseUint(hex, 16, 64)
	return err != nil || caps&(1<<unix.CAP_SYS_ADMIN) != 0
}

// inFirstUserNS reports whether this process is in the first user namespace, whose inode
// number is fixed (kernel: PROC_USER_INIT_INO).
var inFirstUserNS = sync.OnceValue(func() bool {
	const first = 0xEFFFFFFD
	var st unix.Stat_t
	return unix.Stat(xattrat.Proc()+"/self/ns/user", &st) != nil || st.Ino == first
})

// callerInGroup reports whether the calling process is in a group, or root and
// so above that (kernel: in_group_or_capable).
func callerInGroup(h *fuse.InHeader, gid uint32) bool {
	if h.Uid == 0 || h.Gid == gid {
		return true
	}
	groups, _ := callerStatus(h, "Groups")
	for g := range strings.FieldsSeq(groups) {
		if g == strconv.FormatUint(uint64(gid), 10) {
			return true
		}
	}
	return false
}

func callerStatus(h *fuse.InHeader, field string) (value string, found bool) {
	b, err := os.ReadFile(xattrat.Proc() + "/" + strconv.FormatUint(uint64(h.Pid), 10) + "/status")
	if err != nil {
		return "", false
	}
	_, rest, found := strings.Cut(string(b), "\n"+field+":")
	if !found {
		return "", false
	}
	line, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(line), true
}
