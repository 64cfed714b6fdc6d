package sandbox

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Kind says where the ids of a namespace come from.
type Kind string

const (
	// HostIDs: no user namespace; root inside is root of the machine.
	HostIDs Kind = "host"
	// SubIDs: the user is root inside, other ids are subordinate ids of the user.
	SubIDs Kind = "ranges"
	// OneID: the user is root inside, and nobody else exists.
	OneID Kind = "one"
)

// IDs are the users and groups that exist in a namespace.
type IDs struct {
	Kind Kind                   `json:"kind"`
	UIDs []specs.LinuxIDMapping `json:"uids,omitempty"`
	GIDs []specs.LinuxIDMapping `json:"gids,omitempty"`
	// Why says in a sentence why it is this kind.
	Why string `json:"why"`
}

// Files and helpers of subordinate ids (package shadow, or uidmap on Debian).
const (
	subuidFile = "/etc/subuid"
	subgidFile = "/etc/subgid"
	newuidmap  = "newuidmap"
	newgidmap  = "newgidmap"
)

// OwnIDs tells which ids the caller gets. It only looks.
func OwnIDs() IDs {
	uid, gid := os.Geteuid(), os.Getegid()
	if uid == 0 {
		return IDs{Kind: HostIDs, Why: "root keeps the ids it has"}
	}
	ids, err := subordinate(uid, gid)
	if err != nil {
		return oneID(uid, gid, err.Error())
	}
	return ids
}

// SingleID gives the caller one id, whatever /etc/subuid says.
func SingleID() IDs {
	if os.Geteuid() == 0 {
		return OwnIDs()
	}
	return oneID(os.Geteuid(), os.Getegid(), "asked for")
}

func oneID(uid, gid int, why string) IDs {
	return IDs{
		Kind: OneID,
		UIDs: []specs.LinuxIDMapping{{ContainerID: 0, HostID: uint32(uid), Size: 1}},
		GIDs: []specs.LinuxIDMapping{{ContainerID: 0, HostID: uint32(gid), Size: 1}},
		Why:  why,
	}
}

// subordinate maps the ranges of the user behind the user, as `podman unshare` does.
func subordinate(uid, gid int) (IDs, error) {
	for _, helper := range []string{newuidmap, newgidmap} {
		if _, err := exec.LookPath(helper); err != nil {
			return IDs{}, fmt.Errorf("%s is not installed (package uidmap)", helper)
		}
	}
	name := ""
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		name = u.Username
	}
	ids := IDs{Kind: SubIDs}
	for _, m := range []struct {
		file string
		own  int
		to   *[]specs.LinuxIDMapping
	}{{subuidFile, uid, &ids.UIDs}, {subgidFile, gid, &ids.GIDs}} {
		text, err := os.ReadFile(m.file)
		if errors.Is(err, fs.ErrNotExist) {
			return IDs{}, fmt.Errorf("there is no %s", m.file)
		}
		if err != nil {
			return IDs{}, err
		}
		ranges, err := parseSubIDs(text, name, uid, uint32(m.own))
		if err != nil {
			return IDs{}, fmt.Errorf("%s: %w", m.file, err)
		}
		*m.to = mappings(uint32(m.own), ranges)
	}
	ids.Why = fmt.Sprintf("%d users of %s and %d groups of %s", count(ids.UIDs)-1, subuidFile, count(ids.GIDs)-1, subgidFile)
	return ids, nil
}

func count(maps []specs.LinuxIDMapping) (n uint64) {
	for _, m := range maps {
		n += uint64(m.Size)
	}
	return n
}

// idRange is a range of subordinate ids.
type idRange struct{ start, count uint32 }

// maxRanges leaves room for the user's own id: the kernel takes 340 extents.
const maxRanges = 339

// parseSubIDs returns the ranges that a file of lines "OWNER:START:COUNT" gives to a
// user, who is named by name or number. A line in another form is passed over, as by
// newuidmap; a range that must not be mapped is an error, since newuidmap would take it.
func parseSubIDs(text []byte, name string, uid int, own uint32) ([]idRange, error) {
	var found []idRange
	sc := bufio.NewScanner(bytes.NewReader(text))
	for sc.Scan() {
		f := strings.Split(strings.TrimSpace(sc.Text()), ":")
		if len(f) != 3 || f[0] == "" || f[0] != name && f[0] != strconv.Itoa(uid) {
			continue
		}
		start, err1 := strconv.ParseUint(f[1], 10, 32)
		size, err2 := strconv.ParseUint(f[2], 10, 32)
		if err1 != nil || err2 != nil || size == 0 {
			continue
		}
		r := idRange{uint32(start), uint32(size)}
		end := start + size // first id behind it
		switch {
		case end > math.MaxUint32: // the last id means "none"
			return nil, fmt.Errorf("range %d:%d of %q goes beyond the last id", start, size, f[0])
		case start == 0:
			return nil, fmt.Errorf("range %d:%d of %q contains root of the machine", start, size, f[0])
		case r.contains(own):
			return nil, fmt.Errorf("range %d:%d of %q contains the user's own id", start, size, f[0])
		}
		for _, o := range found {
			if o.contains(r.start) || r.contains(o.start) {
				return nil, fmt.Errorf("ranges %d:%d and %d:%d of %q overlap", o.start, o.count, start, size, f[0])
			}
		}
		if found = append(found, r); len(found) > maxRanges {
			return nil, fmt.Errorf("%q has more than %d ranges", f[0], maxRanges)
		}
	}
	if err := sc.Err(); err != nil {
		return nil, err
	}
	if len(found) == 0 {
		who := strconv.Itoa(uid)
		if name != "" {
			who = fmt.Sprintf("%s or %s", name, who)
		}
		return nil, fmt.Errorf("no ids for %s", who)
	}
	return found, nil
}

func (r idRange) contains(id uint32) bool { return id >= r.start && id-r.start < r.count }

// mappings puts own at 0 and the ranges behind it, one after the other.
func mappings(own uint32, ranges []idRange) []specs.LinuxIDMapping {
	maps := []specs.LinuxIDMapping{{ContainerID: 0, HostID: own, Size: 1}}
	next := uint32(1)
	for _, r := range ranges {
		size := min(r.count, math.MaxUint32-next)
		if size == 0 {
			break
		}
		maps = append(maps, specs.LinuxIDMapping{ContainerID: next, HostID: r.start, Size: size})
		next += size
	}
	return maps
}

// write gives the user namespace of a process, which waits for it, its ids.
func (ids IDs) write(pid int) error {
	switch ids.Kind {
	case SubIDs:
		if err := runMapHelper(newuidmap, pid, ids.UIDs); err != nil {
			return err
		}
		return runMapHelper(newgidmap, pid, ids.GIDs)
	case OneID:
		dir := "/proc/" + strconv.Itoa(pid) + "/"
		for _, f := range []struct{ name, text string }{
			{"setgroups", "deny"}, // or the kernel refuses the next line
			{"gid_map", mapText(ids.GIDs)},
			{"uid_map", mapText(ids.UIDs)},
		} {
			if err := os.WriteFile(dir+f.name, []byte(f.text), 0); err != nil {
				return fmt.Errorf("ids of the user namespace: %w", err)
			}
		}
	}
	return nil
}

func mapText(maps []specs.LinuxIDMapping) string {
	var b strings.Builder
	for _, m := range maps {
		fmt.Fprintf(&b, "%d %d %d\n", m.ContainerID, m.HostID, m.Size)
	}
	return b.String()
}

func runMapHelper(helper string, pid int, maps []specs.LinuxIDMapping) error {
	args := append([]string{strconv.Itoa(pid)}, strings.Fields(mapText(maps))...)
	if out, err := exec.Command(helper, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s; without subordinate ids: --one-id", helper, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// mapped tells which ids exist in the user namespace of the caller.
func mapped(file string, id uint32) (bool, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return false, fmt.Errorf("ids of the user namespace: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		var inside, outside, size uint32
		if _, err := fmt.Sscan(line, &inside, &outside, &size); err != nil {
			return false, fmt.Errorf("%s: %q: %w", file, line, err)
		}
		if id >= inside && id-inside < size {
			return true, nil
		}
	}
	return false, nil
}
