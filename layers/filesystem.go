package layers

import (
	"fmt"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// fileSystems says what is wrong with file systems under a store. The database needs
// two things: flock(2) that all who use the store see, and a shared mapping that shows
// what others have written as soon as they have given up the lock.
var fileSystems = map[int64]struct {
	name   string
	refuse bool
	why    string
}{
	// flock is sent to the server (as a lock of the whole file, since 2.6.12), but
	// pages that one client has mapped say what the file was when it read them.
	unix.NFS_SUPER_MAGIC:  {"nfs", true, "the database is read through a mapping, which does not show what another machine writes"},
	unix.CIFS_SUPER_MAGIC: {"cifs", true, "locks and mappings are not shared between machines"},
	unix.SMB2_SUPER_MAGIC: {"smb3", true, "locks and mappings are not shared between machines"},
	unix.SMB_SUPER_MAGIC:  {"smb", true, "locks and mappings are not shared between machines"},
	unix.V9FS_MAGIC:       {"9p", true, "flock is not seen by the other side, and shared mappings depend on its cache mode"},
	unix.AFS_SUPER_MAGIC:  {"afs", true, "locks and mappings are not shared between machines"},
	unix.AFS_FS_MAGIC:     {"afs", true, "locks and mappings are not shared between machines"},
	unix.CODA_SUPER_MAGIC: {"coda", true, "files are written back when they are closed"},
	unix.MSDOS_SUPER_MAGIC: {
		"fat", true, "it has neither owners nor links",
	},
	unix.EXFAT_SUPER_MAGIC:     {"exfat", true, "it has neither owners nor links"},
	unix.FUSE_SUPER_MAGIC:      {"fuse", false, "whether locks and mappings are safe depends on its server; use one machine at a time"},
	unix.OVERLAYFS_SUPER_MAGIC: {"overlay", false, "a file that is open while it is copied up has two locks, and layers cannot be marked as overlay file systems mark them; use a volume"},
	unix.ECRYPTFS_SUPER_MAGIC:  {"ecryptfs", false, "names are limited to 143 bytes"},
}

// checkFileSystem refuses a file system on which the database is not safe.
func (s *Store) checkFileSystem() error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(s.rootFd, &st); err != nil {
		return fmt.Errorf("file system of the store: %w", err)
	}
	return s.judge(int64(st.Type))
}

func (s *Store) judge(magic int64) error {
	f, ok := fileSystems[magic&0xffffffff]
	switch {
	case !ok:
		return nil
	case f.refuse && !s.opts.AnyFileSystem:
		return fmt.Errorf("%w: it lies on %s: %s; put it on a local file system, or set PLYFS_ANY_FS=1 if one machine alone uses it", ErrUnsupported, f.name, f.why)
	}
	var db unix.Stat_t
	if fsat.Stat(s.rootFd, dbName, &db) == nil {
		return nil // said when it was made, and by check
	}
	s.log.Warn("the file system of the store is not what a store should lie on", zap.String("name", f.name), zap.String("reason", f.why))
	return nil
}

// place identifies the file system that the store lies on, as far as that goes: one
// that says nothing of itself gives "".
func (s *Store) place() string {
	var st unix.Statfs_t
	if unix.Fstatfs(s.rootFd, &st) != nil || st.Fsid.Val == [2]int32{} {
		return ""
	}
	return fmt.Sprintf("%x:%x.%x", uint32(st.Type), uint32(st.Fsid.Val[0]), uint32(st.Fsid.Val[1]))
}
