package override

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParse(t *testing.T) {
	for value, want := range map[string]Stat{
		"0:0:755":             {Mode: 0o755},
		"0:8:0644":            {GID: 8, Mode: 0o644}, // containers/storage writes a leading zero
		"1000:100:4755:file":  {UID: 1000, GID: 100, Mode: 0o4755 | unix.S_IFREG},
		"1000:100:2775:dir":   {UID: 1000, GID: 100, Mode: 0o2775 | unix.S_IFDIR},
		"0:5:620:char-5-1":    {GID: 5, Mode: 0o620 | unix.S_IFCHR, Rdev: unix.Mkdev(5, 1)},
		"0:6:660:block-8-17":  {GID: 6, Mode: 0o660 | unix.S_IFBLK, Rdev: unix.Mkdev(8, 17)},
		"7:7:600:pipe":        {UID: 7, GID: 7, Mode: 0o600 | unix.S_IFIFO},
		"7:7:600:socket":      {UID: 7, GID: 7, Mode: 0o600 | unix.S_IFSOCK},
		"7:7:777:symlink":     {UID: 7, GID: 7, Mode: 0o777 | unix.S_IFLNK},
		"4294967294:0:0":      {UID: 1<<32 - 2},
		"0:0:644\x00":         {Mode: 0o644}, // sprintf with the NUL
		"0:0:100644":          {Mode: 0o644}, // fuse-overlayfs: st_mode
		"":                    {},
		"0:0":                 {},
		"0:0:":                {},
		"-1:0:644":            {},
		"0:4294967295:644":    {},
		"0:0:1000644":         {},
		"0:0:648":             {},
		"0:0:644:door":        {},
		"0:0:644:char":        {},
		"0:0:644:char-5":      {},
		"0:0:644:char-5-1-1":  {},
		"0:0:644:char-5000-1": {},
		"0:0:644:pipe-1-1":    {},
		"0:0:644:":            {},
		" 0:0:644":            {},
	} {
		s, err := Parse([]byte(value))
		if s != want || (err == nil) != (want != Stat{}) || err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %+v, %v; want %+v", value, s, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("0:5:620:char-5-1"))
	f.Add([]byte("1000:100:2775:dir"))
	f.Fuzz(func(t *testing.T, value []byte) {
		s, err := Parse(value)
		if err != nil {
			return
		}
		again, err := Parse(s.Format())
		if typ := s.Mode & unix.S_IFMT; typ == unix.S_IFREG || typ == unix.S_IFDIR {
			s.Mode &^= unix.S_IFMT // what a file can be is not written
		}
		if err != nil || again != s {
			t.Errorf("%q: %+v, written as %q and read as %+v, %v", value, s, s.Format(), again, err)
		}
	})
}

func TestApply(t *testing.T) {
	for _, c := range []struct{ file, says, want uint32 }{
		{unix.S_IFREG | 0o600, 0o4755, unix.S_IFREG | 0o4755},
		{unix.S_IFREG | 0o600, unix.S_IFCHR | 0o620, unix.S_IFCHR | 0o620},
		{unix.S_IFREG | 0o600, unix.S_IFDIR | 0o755, unix.S_IFREG | 0o755},
		{unix.S_IFDIR | 0o700, unix.S_IFREG | 0o755, unix.S_IFDIR | 0o755},
		{unix.S_IFDIR | 0o700, unix.S_IFIFO | 0o755, unix.S_IFDIR | 0o755},
	} {
		st := unix.Stat_t{Mode: c.file, Uid: 1}
		if (Stat{UID: 3, GID: 4, Mode: c.says}).Apply(&st); st.Mode != c.want || st.Uid != 3 || st.Gid != 4 {
			t.Errorf("file %o, attribute %o: %o %d:%d", c.file, c.says, st.Mode, st.Uid, st.Gid)
		}
	}
}

func TestNames(t *testing.T) {
	for _, f := range []Form{None, Containers, Fuse, Privileged} {
		for _, name := range []string{
			"user.x", "security.capability", "trusted.y", "system.posix_acl_access", "user.containers.other",
			"user.containers.override_stat", "user.containers.override_security.capability", "user.containers.override_",
		} {
			disk := f.ToDisk(name)
			if got, visible := f.FromDisk(disk); got != name || !visible {
				t.Errorf("%v: %q is stored as %q and read as %q, %v", f, name, disk, got, visible)
			}
			if f == Containers && disk == f.Attr() {
				t.Errorf("%q reaches the attribute itself", name)
			}
		}
		if f != None {
			if got, visible := f.FromDisk(f.Attr()); visible {
				t.Errorf("%v shows its own attribute as %q", f, got)
			}
		}
	}
}

func TestStat(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	look := func(self int) (st unix.Stat_t, err error) {
		t.Helper()
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.Lstat(file, &st); err != nil {
			t.Fatal(err)
		}
		_, err = Containers.Stat(fd, "f", &st, self)
		return st, err
	}
	if err := unix.Setxattr(file, Containers.Attr(), []byte("7:8:2751"), 0); err != nil {
		t.Skipf("no user attributes here: %v", err)
	}
	if st, err := look(-1); err != nil || st.Uid != 7 || st.Gid != 8 || st.Mode != unix.S_IFREG|0o2751 {
		t.Errorf("%d:%d %o, %v", st.Uid, st.Gid, st.Mode, err)
	}
	if err := unix.Setxattr(file, Containers.Attr(), []byte("nonsense"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := look(-1); !errors.Is(err, ErrInvalid) {
		t.Errorf("nonsense: %v", err)
	}
	if err := unix.Removexattr(file, Containers.Attr()); err != nil {
		t.Fatal(err)
	}
	if st, err := look(os.Geteuid()); err != nil || st.Uid != 0 || st.Gid != 0 || st.Mode != unix.S_IFREG|0o600 {
		t.Errorf("without the attribute: %d:%d %o, %v", st.Uid, st.Gid, st.Mode, err)
	}
	if st, err := look(-1); err != nil || int(st.Uid) != os.Geteuid() {
		t.Errorf("without the attribute, as it is: %d:%d, %v", st.Uid, st.Gid, err)
	}
}

func TestNeeded(t *testing.T) {
	for _, c := range []struct {
		s    Stat
		want bool
	}{
		{Stat{Mode: unix.S_IFREG | 0o644}, false},
		{Stat{Mode: unix.S_IFDIR | 0o755}, false},
		{Stat{Mode: unix.S_IFDIR | 0o1777}, false},
		{Stat{Mode: unix.S_IFLNK | 0o777}, false},
		{Stat{Mode: unix.S_IFLNK | 0o777, UID: 5}, true},
		{Stat{Mode: unix.S_IFREG | 0o444}, true},
		{Stat{Mode: unix.S_IFDIR | 0o600}, true},
		{Stat{Mode: unix.S_IFREG | 0o4755}, true},
		{Stat{Mode: unix.S_IFREG | 0o644, GID: 8}, true},
		{Stat{Mode: unix.S_IFIFO | 0o644}, true},
	} {
		if got := c.s.Needed(); got != c.want {
			t.Errorf("%+v: %v", c.s, got)
		}
		if real := RealMode(c.s.Mode); real&0o6000 != 0 || real&0o600 != 0o600 {
			t.Errorf("%o: real mode %o", c.s.Mode, real)
		}
	}
}
