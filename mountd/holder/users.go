package holder

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// User is a process that keeps a mount busy.
type User struct {
	Pid     int
	Command string // its name, from /proc/PID/comm
	How     string // "working directory", "root directory", "program", "open file NAME", "mapped file"
}

// Users lists who keeps the mount m busy, as far as the caller may see.
// Nothing in the mount itself is touched: the server may be hanging.
func Users(m *mountinfo.Info) []User {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var users []User
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if how := usedBy(pid, m); how != "" {
			comm, _ := os.ReadFile("/proc/" + e.Name() + "/comm") // it may have ended meanwhile
			users = append(users, User{Pid: pid, Command: strings.TrimSuffix(string(comm), "\n"), How: how})
		}
	}
	return users
}

// usedBy says how a process uses the mount, or "".
func usedBy(pid int, m *mountinfo.Info) string {
	dir := "/proc/" + strconv.Itoa(pid)
	for _, l := range []struct{ name, how string }{
		{"cwd", "working directory"},
		{"root", "root directory"},
		{"exe", "program"},
	} {
		if to, err := os.Readlink(dir + "/" + l.name); err == nil && within(to, m.Mountpoint) {
			return l.how
		}
	}
	fds, err := os.ReadDir(dir + "/fdinfo")
	if err == nil {
		for _, fd := range fds {
			if mountIDOf(dir+"/fdinfo/"+fd.Name()) == m.ID {
				name, _ := os.Readlink(dir + "/fd/" + fd.Name()) // for the message only
				return "open file " + name
			}
		}
	}
	maps, err := os.ReadFile(dir + "/maps")
	if err == nil && mapsDevice(maps, m.Major, m.Minor) {
		return "mapped file"
	}
	return ""
}

// within reports whether a link of /proc points into dir. " (deleted)" at the
// end of a link does no harm.
func within(path, dir string) bool {
	rest, ok := strings.CutPrefix(path, dir)
	return ok && (rest == "" || rest[0] == '/' || strings.HasPrefix(rest, " (deleted)"))
}

func mountIDOf(fdinfo string) int {
	b, err := os.ReadFile(fdinfo)
	if err != nil {
		return -1
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			if id, err := strconv.Atoi(strings.TrimSpace(v)); err == nil {
				return id
			}
		}
	}
	return -1
}

// mapsDevice looks for the device number in the fourth column of /proc/PID/maps.
func mapsDevice(maps []byte, major, minor int) bool {
	want := []byte(fmt.Sprintf("%02x:%02x", major, minor))
	sc := bufio.NewScanner(bytes.NewReader(maps))
	for sc.Scan() {
		f := bytes.Fields(sc.Bytes())
		if len(f) >= 5 && bytes.Equal(f[3], want) {
			return true
		}
	}
	return false
}

// MountsBelow lists mount points inside m: they keep it busy too.
func MountsBelow(table []*mountinfo.Info, m *mountinfo.Info) []string {
	var below []string
	for _, t := range table {
		if t.ID != m.ID && t.Mountpoint != m.Mountpoint && within(t.Mountpoint, m.Mountpoint) {
			below = append(below, t.Mountpoint)
		}
	}
	slices.Sort(below)
	return below
}

// UsersElsewhere lists one process for each other mount namespace that has the
// file system with this device number mounted: it stays alive there.
func UsersElsewhere(major, minor int) []User {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	own, _ := os.Readlink("/proc/self/ns/mnt") // readable for ourselves
	seen := map[string]bool{own: true}
	var users []User
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		ns, err := os.Readlink("/proc/" + e.Name() + "/ns/mnt")
		if err != nil || seen[ns] {
			continue
		}
		seen[ns] = true
		table, err := MountTable(pid)
		if err != nil {
			continue
		}
		for _, m := range DeviceMounts(table, major, minor) {
			comm, _ := os.ReadFile("/proc/" + e.Name() + "/comm") // it may have ended meanwhile
			users = append(users, User{Pid: pid, Command: strings.TrimSuffix(string(comm), "\n"), How: "mount namespace with " + m.Mountpoint})
			break
		}
	}
	return users
}

// ProcessesOf finds holder, spare holder and server of a mount without a run directory by
// the title they were started with.
func ProcessesOf(target string) []Process {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var ps []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if err != nil {
			continue
		}
		args := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
		if len(args) == 3 && (args[1] == VerbHolder || args[1] == VerbServer) && args[2] == target {
			if p, err := Lookup(pid); err == nil {
				ps = append(ps, p)
			}
		}
	}
	return ps
}

// inUse reports whether somebody but processes of mounts is in the mount namespace of a process.
// One that may not be looked at is in another user namespace, and so in another one than ours:
// of that nothing is known.
func inUse(p Process) (used, known bool) {
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", p.Pid))
	if err != nil {
		return false, false
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return false, false
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		if ns, err := os.Readlink("/proc/" + e.Name() + "/ns/mnt"); err != nil || ns != theirs {
			continue
		}
		b, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(string(b), "\x00")
		if len(args) < 2 || args[1] != VerbHolder && args[1] != VerbServer {
			return true, true
		}
	}
	return false, true
}

// EndLeft asks the holder of a mount that we do not see to unmount it, if its mount namespace has no
// use any more: that of a rootlesskit that has ended is kept alive by such holders alone. Where it
// cannot be known, the holder is asked as well: what is busy it does not unmount.
func EndLeft(st State) {
	if !st.Holder.Alive() {
		return
	}
	if used, known := inUse(st.Holder); known && used {
		return
	}
	_ = unix.Kill(st.Holder.Pid, unix.SIGTERM) // it may have ended meanwhile
}
