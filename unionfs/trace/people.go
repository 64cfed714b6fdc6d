package trace

import (
	"bytes"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// person is what procfs says about a thread.
type person struct {
	pid       uint32
	command   string
	container string
	seen      time.Time
}

// people remembers threads for a moment: long enough for a burst of requests, too short for
// a number to be used again unnoticed by many. Only the name is asked for each time: a program
// is most often executed right after its process was made.
type people struct {
	mu   sync.Mutex
	seen map[uint32]person
}

const (
	peopleFor  = 50 * time.Millisecond
	mostPeople = 4096
	// maxProc bounds what is read of a file in procfs.
	maxProc = 16 << 10
	maxComm = 64
)

// of looks a thread up. It is called while the thread waits for the answer to its request.
func (p *people) of(thread uint32, now time.Time) person {
	if thread == 0 {
		return person{}
	}
	p.mu.Lock()
	who, ok := p.seen[thread]
	p.mu.Unlock()
	if ok && now.Sub(who.seen) < peopleFor {
		if name := commandOf(thread); name != "" {
			who.command = name
		}
		return who
	}
	who = lookUp(thread)
	who.seen = now
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.seen == nil || len(p.seen) >= mostPeople {
		p.seen = make(map[uint32]person)
	}
	p.seen[thread] = who
	return who
}

// lookUp reads what procfs says of a thread; what it does not say stays empty.
func lookUp(thread uint32) (who person) {
	status := readProc(thread, "status", maxProc)
	for line := range bytes.Lines(status) {
		key, value, _ := bytes.Cut(line, []byte(":"))
		if string(key) != "Tgid" {
			continue
		}
		if n, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 10, 32); err == nil {
			who.pid = uint32(n)
		}
		break // what follows is long
	}
	if who.pid != 0 {
		who.command = commandOf(thread)
		who.container = containerOf(readProc(thread, "cgroup", maxProc))
	}
	return who
}

// commandOf is the name of a thread as it is now; "" if there is no such thread.
func commandOf(thread uint32) string {
	return strings.TrimSuffix(string(readProc(thread, "comm", maxComm)), "\n")
}

// readProc reads the beginning of a file of procfs, without the descriptor being anything to
// the runtime: it is done for each request.
func readProc(thread uint32, name string, most int) []byte {
	id := strconv.FormatUint(uint64(thread), 10)
	// A confined server has procfs as its root directory.
	for _, root := range []string{"/proc/", "/"} {
		fd, err := unix.Open(root+id+"/"+name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if err != nil {
			continue
		}
		b := make([]byte, most)
		n, _ := unix.Read(fd, b) // what procfs gives in one read is one state; nothing is as good as less
		_ = unix.Close(fd)       // only read
		return b[:max(n, 0)]
	}
	return nil
}

// containerOf finds the ID of a container in the lines of /proc/PID/cgroup.
func containerOf(cgroup []byte) string {
	for line := range strings.Lines(string(cgroup)) {
		_, path, ok := strings.Cut(strings.TrimSpace(line), "::")
		if !ok { // version 1: ID:controllers:path
			f := strings.SplitN(strings.TrimSpace(line), ":", 3)
			if len(f) < 3 {
				continue
			}
			path = f[2]
		}
		names := strings.Split(path, "/")
		for i := len(names) - 1; i >= 0; i-- {
			name := strings.TrimSuffix(names[i], ".scope")
			if at := strings.LastIndexByte(name, '-'); at >= 0 && len(name)-at-1 == idLength {
				name = name[at+1:] // docker-ID.scope, libpod-ID.scope
			}
			if isID(name) {
				return name
			}
		}
	}
	return ""
}

// idLength is that of the IDs all engines give containers.
const idLength = 64

func isID(s string) bool {
	return len(s) == idLength && strings.Trim(s, "0123456789abcdef") == ""
}
