package layers

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/plyfs/plyfs/metadata"
)

// BootID identifies this boot of the machine.
var BootID = sync.OnceValues(func() (string, error) {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("boot id: %w", err)
	}
	return strings.TrimSpace(string(raw)), nil
})

// StartTime is when a process began, in clock ticks since boot. With the boot
// id and the pid it names the process for good. A zombie has no start time: it
// will do nothing any more.
func StartTime(pid int) (uint64, error) {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, fmt.Errorf("start time of process %d: %w", pid, err)
	}
	// The second field is the command in parentheses and may hold anything.
	i := bytes.LastIndexByte(raw, ')')
	f := strings.Fields(string(raw[i+1:]))
	if i < 0 || len(f) < 20 {
		return 0, fmt.Errorf("start time of process %d: unexpected /proc/%d/stat", pid, pid)
	}
	if f[0] == "Z" || f[0] == "X" {
		return 0, fmt.Errorf("start time of process %d: %w", pid, os.ErrNotExist)
	}
	return strconv.ParseUint(f[19], 10, 64)
}

func pidNS() string {
	ns, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return ""
	}
	return ns
}

// self names this process.
var self = sync.OnceValues(func() (metadata.Owner, error) {
	boot, err := BootID()
	if err != nil {
		return metadata.Owner{}, err
	}
	start, err := StartTime(os.Getpid())
	return metadata.Owner{BootID: boot, Pid: os.Getpid(), StartTime: start, PidNS: pidNS()}, err
})

// foreignGrace is how long work of a process in another pid namespace, which
// we cannot see, is taken to be alive.
const foreignGrace = 24 * time.Hour

// alive reports whether the owner of work begun at since may still be at it.
func alive(o metadata.Owner, since time.Time) bool {
	boot, err := BootID()
	if err != nil {
		return true
	}
	if o.BootID != boot {
		return false
	}
	if ns := pidNS(); o.PidNS != "" && ns != "" && o.PidNS != ns {
		return time.Since(since) < foreignGrace
	}
	start, err := StartTime(o.Pid)
	if errors.Is(err, os.ErrNotExist) {
		return false
	}
	return err != nil || start == o.StartTime
}

// Alive reports whether the server of a mount is still running.
func (l Live) Alive() bool {
	return alive(metadata.Owner{BootID: l.BootID, Pid: l.Pid, StartTime: l.StartTime}, l.Created)
}
