package oracle

import (
	"fmt"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

func opMkdir(a *agent, op Op) (string, error)  { return "", unix.Mkdir(op.path(), op.Mode) }
func opRmdir(a *agent, op Op) (string, error)  { return "", unix.Rmdir(op.path()) }
func opUnlink(a *agent, op Op) (string, error) { return "", unix.Unlink(op.path()) }

func opMknod(a *agent, op Op) (string, error) {
	return "", unix.Mknod(op.path(), op.Mode, int(unix.Mkdev(uint32(op.Off), uint32(op.Off2))))
}

func opSymlink(a *agent, op Op) (string, error) {
	return "", unix.Symlink(string(op.To), op.path())
}

func opLink(a *agent, op Op) (string, error) {
	flags, err := parseFlags(op.Flags)
	if err != nil {
		return "", err
	}
	return "", unix.Linkat(unix.AT_FDCWD, op.path(), unix.AT_FDCWD, op.to(), flags)
}

func opRename(a *agent, op Op) (string, error) {
	flags, err := parseFlags(op.Flags)
	if err != nil {
		return "", err
	}
	return "", unix.Renameat2(unix.AT_FDCWD, op.path(), unix.AT_FDCWD, op.to(), uint(flags))
}

func opReadlink(a *agent, op Op) (string, error) {
	buf := make([]byte, 8192)
	n, err := unix.Readlink(op.path(), buf)
	return showBytes(buf[:max(n, 0)]), err
}

func opChdir(a *agent, op Op) (string, error) { return "", unix.Chdir(op.path()) }

func opUmask(a *agent, op Op) (string, error) {
	return fmt.Sprintf("0%o", unix.Umask(int(op.Mode))), nil
}

var direntTypes = map[byte]string{
	unix.DT_REG: "file", unix.DT_DIR: "dir", unix.DT_LNK: "symlink", unix.DT_FIFO: "fifo", unix.DT_SOCK: "socket",
	unix.DT_CHR: "char", unix.DT_BLK: "block", unix.DT_UNKNOWN: "unknown",
}

// listing reads a whole directory and checks what must hold of any listing.
func listing(fd int) ([]dirent, error) {
	var all []dirent
	for {
		ents, err := getdents(fd, 32<<10)
		if err != nil {
			return nil, err
		}
		if len(ents) == 0 {
			return all, nil
		}
		all = append(all, ents...)
		if len(all) > 1<<20 {
			return nil, fmt.Errorf("listing has no end")
		}
	}
}

// showListing renders entries sorted, with duplicates visible.
func showListing(ents []dirent) string {
	lines := make([]string, 0, len(ents))
	for _, e := range ents {
		lines = append(lines, Name(e.name).String()+":"+direntTypes[e.typ])
	}
	sort.Strings(lines)
	if len(lines) > 300 {
		return fmt.Sprintf("%d names %s", len(lines), showBytes([]byte(strings.Join(lines, "\n"))))
	}
	return strings.Join(lines, " ")
}

func openDir(op Op) (int, error) {
	return unix.Open(op.path(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

func opReaddir(a *agent, op Op) (string, error) {
	fd, err := openDir(op)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	ents, err := listing(fd)
	return showListing(a.exists(op, fd, ents)), err
}

func opCount(a *agent, op Op) (string, error) {
	fd, err := openDir(op)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	ents, err := listing(fd)
	if err != nil {
		return "", err
	}
	names := make(map[string]bool)
	for _, e := range ents {
		names[e.name] = true
	}
	return fmt.Sprintf("%d entries, %d names", len(ents), len(names)), nil
}

func opReaddirFD(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	if isDir(fd) {
		if _, err := unix.Seek(fd, 0, unix.SEEK_SET); err != nil {
			return "", err
		}
	}
	ents, err := listing(fd)
	return showListing(a.exists(op, fd, ents)), err
}

// opDirSeek reads a directory through small buffers, then goes back to each
// cookie and expects the rest of the same listing.
func opDirSeek(a *agent, op Op) (string, error) {
	fd, err := openDir(op)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var all []dirent
	for {
		ents, err := getdents(fd, 1024)
		if err != nil {
			return "", err
		}
		if len(ents) == 0 {
			break
		}
		all = append(all, ents...)
	}
	step := 1 + len(all)/50
	for i := 0; i < len(all); i += step {
		if _, err := unix.Seek(fd, all[i].off, unix.SEEK_SET); err != nil {
			return fmt.Sprintf("seek to cookie %d", i), err
		}
		rest, err := getdents(fd, 1024)
		if err != nil {
			return fmt.Sprintf("read at cookie %d", i), err
		}
		if i+1 == len(all) {
			if len(rest) != 0 {
				return fmt.Sprintf("after the last cookie come %d entries, first %q", len(rest), rest[0].name), nil
			}
			continue
		}
		if len(rest) == 0 || rest[0].name != all[i+1].name {
			return fmt.Sprintf("after cookie %d of %d comes %v, not %q", i, len(all), names(rest), all[i+1].name), nil
		}
	}
	return showListing(a.exists(op, fd, all)), nil
}

// opDirChurn reads a directory bit by bit while names, which begin with Text,
// come and go in it, then
// goes back to each cookie and reads on from there. What was there all the time
// is listed once from the start, and nothing of it twice from anywhere.
func opDirChurn(a *agent, op Op) (string, error) {
	fd, err := openDir(op)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	stable, err := listing(fd)
	if err != nil {
		return "", err
	}
	if _, err := unix.Seek(fd, 0, unix.SEEK_SET); err != nil {
		return "", err
	}
	touch := func(name string) error {
		f, err := unix.Openat(fd, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return err
		}
		return unix.Close(f)
	}
	var all []dirent
	for i := int64(0); ; i++ {
		ents, err := getdents(fd, 512)
		if err != nil {
			return "", err
		}
		if len(ents) == 0 {
			break
		}
		all = append(all, ents...)
		if i >= op.Len {
			continue
		}
		if err := touch(fmt.Sprintf("%s%d", op.Text, i)); err != nil {
			return fmt.Sprintf("create at %d", i), err
		}
		switch i % 3 {
		case 1:
			err = unix.Renameat(fd, fmt.Sprintf("%s%d", op.Text, i-1), fd, fmt.Sprintf("%smoved%d", op.Text, i))
		case 2:
			err = unix.Unlinkat(fd, fmt.Sprintf("%s%d", op.Text, i-1), 0)
		}
		if err != nil {
			return fmt.Sprintf("change at %d", i), err
		}
	}
	if out := churned(stable, all); out != "" {
		return out, nil
	}
	step := 1 + len(all)/50
	for i := 0; i < len(all); i += step {
		if _, err := unix.Seek(fd, all[i].off, unix.SEEK_SET); err != nil {
			return fmt.Sprintf("seek to cookie %d", i), err
		}
		rest, err := listing(fd)
		if err != nil {
			return fmt.Sprintf("read at cookie %d", i), err
		}
		if out := churned(stable, append(all[:i+1:i+1], rest...)); out != "" {
			return fmt.Sprintf("from cookie %d: %s", i, out), nil
		}
	}
	return fmt.Sprintf("%d names, each once", len(stable)), nil
}

// churned says what is wrong with a listing that must have each of the stable
// names once.
func churned(stable, all []dirent) string {
	count := make(map[string]int)
	for _, e := range all {
		count[e.name]++
	}
	for _, e := range stable {
		if count[e.name] != 1 {
			return fmt.Sprintf("%s is listed %d times", Name(e.name), count[e.name])
		}
	}
	return ""
}

func names(ents []dirent) []string {
	var out []string
	for _, e := range ents[:min(len(ents), 3)] {
		out = append(out, e.name)
	}
	return out
}

// opInos says whether the numbers of a listing are those of lstat, whether
// fstat agrees, and whether names that are one file have one number.
func opInos(a *agent, op Op) (string, error) {
	fd, err := openDir(op)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	ents, err := listing(fd)
	if err != nil {
		return "", err
	}
	for _, e := range ents {
		if e.name == "." || e.name == ".." {
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstatat(fd, e.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return e.name, err
		}
		if st.Ino != e.ino {
			return fmt.Sprintf("%s: d_ino %d, st_ino %d", e.name, e.ino, st.Ino), nil
		}
		ofd, err := unix.Openat(fd, e.name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return e.name, err
		}
		var st2 unix.Stat_t
		err = unix.Fstat(ofd, &st2)
		if e := unix.Close(ofd); err == nil {
			err = e
		}
		if err != nil {
			return e.name, err
		}
		if st2.Ino != st.Ino || st2.Dev != st.Dev {
			return fmt.Sprintf("%s: fstat says %d:%d, lstat %d:%d", e.name, st2.Dev, st2.Ino, st.Dev, st.Ino), nil
		}
	}
	return "agree", nil
}

func opFill(a *agent, op Op) (string, error) {
	fd, err := openDir(op)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	for i := range op.Len {
		f, err := unix.Openat(fd, fmt.Sprintf("%s%06d", op.Text, i), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return fmt.Sprint(i), err
		}
		if err := unix.Close(f); err != nil {
			return fmt.Sprint(i), err
		}
	}
	return "", nil
}

// opLongPath goes down Len directories with names of 250 bytes and makes a file
// at the bottom, each by the longest absolute path that is allowed; below
// that, relative to the working directory.
func opLongPath(a *agent, op Op) (string, error) {
	part := strings.Repeat("p", 250)
	p := op.path()
	made := 0
	for range op.Len {
		if len(p)+251 >= unix.PathMax {
			if err := unix.Chdir(p); err != nil {
				return fmt.Sprintf("chdir after %d", made), err
			}
			p = "."
		}
		p += "/" + part
		if err := unix.Mkdir(p, 0o755); err != nil {
			return fmt.Sprintf("mkdir after %d", made), err
		}
		made++
	}
	exact := p + "/" + strings.Repeat("f", max(1, min(255, unix.PathMax-1-len(p)-1)))
	fd, err := unix.Open(exact, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Sprintf("open a path of %d", len(exact)), err
	}
	_, err = unix.Write(fd, []byte("deep"))
	if e := unix.Close(fd); err == nil {
		err = e
	}
	if e := unix.Chdir("/"); err == nil {
		err = e
	}
	return fmt.Sprintf("%d directories", made), err
}
