package holder

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/transport"
)

// MountTable returns the mounts that process pid sees (0: the caller).
func MountTable(pid int) ([]*mountinfo.Info, error) {
	p := "/proc/self/mountinfo"
	if pid > 0 {
		p = "/proc/" + strconv.Itoa(pid) + "/mountinfo"
	}
	f, err := os.Open(p)
	if err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	defer f.Close()
	ms, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	return ms, nil
}

// TopMount returns the uppermost mount on exactly target, or nil.
func TopMount(table []*mountinfo.Info, target string) *mountinfo.Info {
	for i := len(table) - 1; i >= 0; i-- { // later entries are on top
		if table[i].Mountpoint == target {
			return table[i]
		}
	}
	return nil
}

// DeviceMounts returns every mount of the file system with this device number,
// bind mounts of it included, oldest first.
func DeviceMounts(table []*mountinfo.Info, major, minor int) []*mountinfo.Info {
	var ms []*mountinfo.Info
	for _, m := range table {
		if minor != 0 && m.Major == major && m.Minor == minor && IsOurs(m) {
			ms = append(ms, m)
		}
	}
	return ms
}

// FindMount returns the mount on target among those of one file system, or the oldest one
// elsewhere: a directory above the target may have been renamed.
func FindMount(ms []*mountinfo.Info, target string) *mountinfo.Info {
	for _, m := range ms {
		if m.Mountpoint == target {
			return m
		}
	}
	if len(ms) > 0 {
		return ms[0]
	}
	return nil
}

// Detach takes all mounts of a dead file system out of the tree. Those below
// another mount stay; their mount points are returned.
func Detach(table []*mountinfo.Info, major, minor int) (covered []string, err error) {
	ms := DeviceMounts(table, major, minor)
	for i := len(ms) - 1; i >= 0; i-- {
		m := ms[i]
		if TopMount(table, m.Mountpoint) != m {
			covered = append(covered, m.Mountpoint)
			continue
		}
		uerr := transport.Unmount(m.Mountpoint, true)
		if uerr != nil && !errors.Is(uerr, unix.EINVAL) { // gone together with one above it
			err = errors.Join(err, uerr)
		}
	}
	return covered, err
}

// IsOurs reports whether a mount is a FUSE mount that this program could have made.
func IsOurs(m *mountinfo.Info) bool {
	return m.FSType == "fuse" || strings.HasPrefix(m.FSType, "fuse.")
}

// ownMount finds the mount that was just made on target.
func ownMount(target string) (*mountinfo.Info, error) {
	table, err := MountTable(0)
	if err != nil {
		return nil, err
	}
	m := TopMount(table, target)
	if m == nil || !IsOurs(m) {
		return nil, errors.New("not in the mount table")
	}
	return m, nil
}

// MountUser is the user who has made a FUSE mount, as its options say; -1 if they do not.
func MountUser(m *mountinfo.Info) int {
	for o := range strings.SplitSeq(m.VFSOptions, ",") {
		if v, ok := strings.CutPrefix(o, "user_id="); ok {
			if id, err := strconv.Atoi(v); err == nil {
				return id
			}
		}
	}
	return -1
}
