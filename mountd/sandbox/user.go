package sandbox

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// User is who a command runs as.
type User struct {
	UID, GID uint32
	Groups   []uint32 // supplementary
	Home     string
}

// Bounds of what is believed of an image's passwd and group. Directories of
// large sites that were written to a file stay below.
const (
	maxAccounts    = 8 << 20 // bytes of a file
	maxAccountLine = 1 << 20 // a group lists its members in one line
	maxGroups      = 1024    // supplementary groups of a user
)

// LookupUser finds the user that text names ("", "uid", "uid:gid", "name",
// "name:group" and mixtures) in the accounts of the root behind rootFd. As with
// docker run, a number needs no account, and a group that is given replaces all others.
func LookupUser(rootFd int, text string) (User, error) {
	passwd, err := openAccounts(rootFd, "etc/passwd")
	if err != nil {
		return User{}, err
	}
	defer passwd.Close()
	group, err := openAccounts(rootFd, "etc/group")
	if err != nil {
		return User{}, err
	}
	defer group.Close()
	return findUser(text, passwd, group)
}

// openAccounts opens a regular file below the root; one that is missing is empty.
func openAccounts(rootFd int, path string) (io.ReadCloser, error) {
	fd, err := fsat.OpenInRoot(rootFd, path, unix.O_PATH)
	if fsat.IsAbsent(err) {
		return io.NopCloser(strings.NewReader("")), nil
	}
	if err != nil {
		return nil, fmt.Errorf("open %q of the image: %w", "/"+path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat %q of the image: %w", "/"+path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%q of the image is not a regular file", "/"+path)
	}
	if st.Size > maxAccounts {
		return nil, fmt.Errorf("%q of the image has %d bytes, more than the %d that are read", "/"+path, st.Size, maxAccounts)
	}
	n, err := fsat.Reopen(fd, unix.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("open %q of the image: %w", "/"+path, err)
	}
	return os.NewFile(uintptr(n), path), nil
}

// account is what counts of a line of passwd.
type account struct {
	name     string
	uid, gid uint32
	home     string
}

// findUser does what LookupUser says, on open files.
func findUser(text string, passwd, group io.Reader) (User, error) {
	who, groupText, hasGroup := strings.Cut(text, ":")
	if who == "" {
		who = "0"
	}
	if hasGroup && groupText == "" {
		return User{}, fmt.Errorf("user %q: no group behind the colon", text)
	}
	a, found, err := findAccount(who, passwd)
	if err != nil {
		return User{}, err
	}
	u := User{UID: a.uid, GID: a.gid, Home: a.home}
	if !found {
		uid, ok := parseID(who)
		if !ok {
			return User{}, fmt.Errorf("user %q: the image has no such user in /etc/passwd", text)
		}
		u.UID = uid
	}
	if u.Home == "" || u.Home[0] != '/' {
		u.Home = "/"
	}
	if !hasGroup && !found {
		return u, nil
	}
	gid, gidFound, groups, err := findGroups(groupText, a.name, group)
	switch {
	case err != nil:
		return User{}, err
	case !hasGroup:
		u.Groups = groups
	case gidFound:
		u.GID = gid
	default:
		gid, ok := parseID(groupText)
		if !ok {
			return User{}, fmt.Errorf("user %q: the image has no such group in /etc/group", text)
		}
		u.GID = gid
	}
	return u, nil
}

// findAccount looks for a name first and for a number then: "1000" may be a name.
func findAccount(who string, passwd io.Reader) (found account, ok bool, err error) {
	number, isNumber := parseID(who)
	byName := false
	err = eachLine("/etc/passwd", passwd, func(f []string) {
		if len(f) < 7 || byName {
			return
		}
		uid, ok1 := parseID(f[2])
		gid, ok2 := parseID(f[3])
		if !ok1 || !ok2 {
			return
		}
		byName = f[0] == who
		if byName || isNumber && uid == number && !ok {
			found, ok = account{f[0], uid, gid, f[5]}, true
		}
	})
	return found, ok, err
}

// findGroups returns the id of the group that is named, and all groups that a
// member is in.
func findGroups(name, member string, group io.Reader) (gid uint32, found bool, groups []uint32, err error) {
	tooMany := false
	err = eachLine("/etc/group", group, func(f []string) {
		if len(f) < 4 {
			return
		}
		id, ok := parseID(f[2])
		if !ok {
			return
		}
		if !found && name != "" && f[0] == name {
			gid, found = id, true
		}
		if member != "" && slices.Contains(strings.Split(f[3], ","), member) && !slices.Contains(groups, id) {
			if len(groups) == maxGroups {
				tooMany = true
				return
			}
			groups = append(groups, id)
		}
	})
	if err == nil && tooMany {
		err = fmt.Errorf("user %q of the image is in more than %d groups", member, maxGroups)
	}
	return gid, found, groups, err
}

// parseID reads a user or group id. The largest number means "none" to the kernel.
func parseID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n < 1<<32-1
}

// eachLine calls fn with the fields of each line of an account file.
func eachLine(name string, r io.Reader, fn func(fields []string)) error {
	limited := &io.LimitedReader{R: r, N: maxAccounts + 1}
	sc := bufio.NewScanner(limited)
	sc.Buffer(nil, maxAccountLine)
	for sc.Scan() {
		if line := strings.TrimSpace(sc.Text()); line != "" && line[0] != '#' {
			fn(strings.Split(line, ":"))
		}
	}
	switch err := sc.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		return fmt.Errorf("%q of the image has a line of more than %d bytes", name, maxAccountLine)
	case err != nil:
		return fmt.Errorf("read %q of the image: %w", name, err)
	case limited.N == 0: // it has grown since it was opened
		return fmt.Errorf("%q of the image has more than the %d bytes that are read", name, maxAccounts)
	}
	return nil
}
