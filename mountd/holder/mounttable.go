package holder

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
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

// FindDevice returns the mount of the file system with this device number.
func FindDevice(table []*mountinfo.Info, major, minor int) *mountinfo.Info {
	if major == 0 && minor == 0 {
		return nil
	}
	for i := len(table) - 1; i >= 0; i-- {
		if m := table[i]; m.Major == major && m.Minor == minor && IsOurs(m) {
			return m
		}
	}
	return nil
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
