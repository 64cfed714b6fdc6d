package mountd

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// containerd compares the mount namespaces of containerd and of `plyfs snapshotter`, if both run:
// containerd binds what the snapshotter has mounted, and so has to see it.
func containerd() Diagnosis {
	return containerdIn("/proc")
}

func containerdIn(proc string) Diagnosis {
	d := Diagnosis{What: "containerd", OK: true}
	daemons, snapshotters := map[string]int{}, map[string]int{} // a pid for each mount namespace
	hidden := false
	entries, err := os.ReadDir(proc)
	if err != nil {
		d.Found = err.Error()
		return d
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(proc + "/" + e.Name() + "/cmdline")
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
		name := args[0][strings.LastIndexByte(args[0], '/')+1:]
		in := daemons
		switch {
		case name == "containerd":
		case name == "plyfs" && len(args) > 1 && args[1] == "snapshotter":
			in = snapshotters
		default:
			continue
		}
		ns, err := os.Readlink(proc + "/" + e.Name() + "/ns/mnt")
		if err != nil {
			hidden = true
			continue
		}
		in[ns] = pid
	}
	switch {
	case len(snapshotters) == 0 && len(daemons) == 0 && !hidden:
		d.Found = "neither it nor plyfs snapshotter runs"
		return d
	case len(snapshotters) == 0 || len(daemons) == 0:
		d.Found = "not both it and plyfs snapshotter can be seen"
		if hidden {
			d.Follows = "ask as root, or as their user in their namespace"
		}
		return d
	}
	for ns, pid := range snapshotters {
		if with, same := daemons[ns]; same {
			d.Found = fmt.Sprintf("processes %d and plyfs snapshotter %d see the same mounts", with, pid)
			continue
		}
		d.OK = false
		d.Found = fmt.Sprintf("plyfs snapshotter %d is in a mount namespace without containerd", pid)
		d.Follows = "containerd does not see its mounts, and containers do not start: run both in one (no PrivateTmp=, ProtectSystem= and the like in their units)"
		return d
	}
	return d
}
