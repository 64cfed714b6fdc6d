package foreign

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// lockFiles are databases that daemons keep locked while they run.
var lockFiles = []string{
	"volumes/metadata.db", "network/files/local-kv.db", "buildkit/cache.db", "buildkit/metadata_v2.db", // Docker
	"io.containerd.metadata.v1.bolt/meta.db",
}

// maxProcesses bounds the search for users.
const maxProcesses = 100_000

// look finds out who uses the store: who holds a lock on one of its databases, and
// what is mounted below it. Other users' processes may hide both.
func (s *Store) look() {
	s.mounts = mountsBelow(s.Path)
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return
	}
	seen := map[int]bool{}
	for _, name := range lockFiles {
		fd, err := fsat.OpenNoLinks(s.fd, name, unix.O_PATH|unix.O_NOFOLLOW)
		if err != nil {
			continue
		}
		var st unix.Stat_t
		err = fsat.Fstat(fd, &st)
		fsat.Close(fd)
		if err != nil {
			continue
		}
		for _, pid := range lockers(locks, &st) {
			if !seen[pid] {
				seen[pid] = true
				s.Users = append(s.Users, processName(pid))
			}
		}
	}
}

// lockers reads /proc/locks: "1: FLOCK  ADVISORY  WRITE 708 00:13:1234 0 EOF".
func lockers(locks []byte, st *unix.Stat_t) (pids []int) {
	want := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for line := range strings.Lines(string(locks)) {
		f := strings.Fields(line)
		if len(f) < 8 || f[5] != want {
			continue
		}
		if pid, err := strconv.Atoi(f[4]); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func processName(pid int) string {
	name := fmt.Sprintf("process %d", pid)
	if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil {
		name += fmt.Sprintf(" (%s)", strings.TrimSpace(string(comm)))
	}
	return name
}

// mountsBelow collects the mount points below a directory from all mount
// namespaces of processes that we may look at.
func mountsBelow(dir string) map[string]bool {
	out := map[string]bool{}
	proc, err := os.Open("/proc")
	if err != nil {
		return out
	}
	defer proc.Close()
	names, _ := proc.Readdirnames(maxProcesses) // what cannot be read is not seen
	namespaces := map[string]bool{}
	for _, pid := range append([]string{"self"}, names...) {
		if pid != "self" && (pid[0] < '0' || pid[0] > '9') {
			continue
		}
		ns, err := os.Readlink("/proc/" + pid + "/ns/mnt")
		if err != nil || namespaces[ns] {
			continue
		}
		namespaces[ns] = true
		table, err := os.ReadFile("/proc/" + pid + "/mountinfo")
		if err == nil {
			mountPoints(table, dir, out)
		}
	}
	return out
}

// mountPoints adds to out the mount points of a mountinfo, and the uppers of overlays,
// that lie below dir.
func mountPoints(table []byte, dir string, out map[string]bool) {
	sc := bufio.NewScanner(bytes.NewReader(table))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 5 {
			continue
		}
		if p := unescape(f[4]); strings.HasPrefix(p, dir+"/") {
			out[p] = true
		}
		// An overlay says what its upper is, wherever it is mounted.
		for option := range strings.SplitSeq(f[len(f)-1], ",") {
			if p, ok := strings.CutPrefix(option, "upperdir="); ok {
				if p = unescape(p); strings.HasPrefix(p, dir+"/") {
					out[p] = true
				}
			}
		}
	}
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// ofRoot reports whether the store is that of the machine's root, and not of a user
// who is root in a namespace.
func (s *Store) ofRoot() bool {
	uid, err := s.owner()
	return err == nil && uid == 0 && firstUserNamespace()
}

func (s *Store) owner() (uid uint32, err error) {
	var st unix.Stat_t
	err = fsat.Fstat(s.fd, &st)
	return st.Uid, err
}

// firstUserNamespace reports whether ids are what they are on the machine.
func firstUserNamespace() bool {
	raw, err := os.ReadFile("/proc/self/uid_map")
	f := strings.Fields(string(raw))
	return err == nil && len(f) == 3 && f[0] == "0" && f[1] == "0" && f[2] == "4294967295"
}
