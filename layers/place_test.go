package layers

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/metadata"
)

// findings returns the findings of one invariant.
func findings(rep *Report, inv string) (out []Finding) {
	for _, f := range rep.Findings {
		if f.Invariant == inv {
			out = append(out, f)
		}
	}
	return out
}

func tmpfs(t *testing.T, dir, options string) {
	t.Helper()
	needRoot(t)
	if err := unix.Mount("none", dir, "tmpfs", 0, options); err != nil {
		t.Skip("needs a tmpfs of its own:", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // some have gone already
}

// TestCheckPlace: a store is one file system, and the one it was made on (K2).
func TestCheckPlace(t *testing.T) {
	p := newPatient(t)
	stage := filepath.Join(p.s.root, stageName)
	tmpfs(t, stage, "size=1m")
	for _, repair := range []bool{false, true} {
		f := findings(p.check(t, CheckOptions{Repair: repair}), "K2")
		if len(f) != 1 || !f[0].Open() || f[0].Object != stageName {
			t.Errorf("another file system in the store: %+v", f)
		}
	}
	must(t, unix.Unmount(stage, unix.MNT_DETACH))
	if p.s.place() == "" {
		t.Skip("this file system has no identity")
	}
	must(t, p.s.update(t.Context(), func(tx *metadata.Tx) error { return tx.SetPlace("1:2.3") }))
	f := findings(p.check(t, CheckOptions{}), "K2")
	if len(f) != 1 || f[0].Severity != SeverityWarning || f[0].Fixed {
		t.Errorf("a store that was copied: %+v", f)
	}
	if f = findings(p.check(t, CheckOptions{Repair: true}), "K2"); len(f) != 1 || !f[0].Fixed {
		t.Errorf("repaired: %+v", f)
	}
	p.healthy(t)
}

// TestCheckSpace: what will run out is told (K25).
func TestCheckSpace(t *testing.T) {
	mnt := t.TempDir()
	tmpfs(t, mnt, "size=8m,nr_inodes=40")
	s := openAt(t, filepath.Join(mnt, "store"))
	defer s.Close()
	rep, err := s.Check(t.Context(), CheckOptions{})
	must(t, err)
	f := findings(rep, "K25")
	if len(f) == 0 || f[0].Severity != SeverityWarning || !strings.Contains(f[0].Problem, "MB are free") {
		t.Errorf("8 MB in all: %+v", rep.Findings)
	}
	for _, o := range rep.Findings {
		if o.Open() {
			t.Errorf("%+v", o)
		}
	}
}

// TestFileSystems: a store is not made where its database is not safe.
func TestFileSystems(t *testing.T) {
	s := openStore(t)
	for magic, refused := range map[int64]bool{
		unix.NFS_SUPER_MAGIC: true, unix.CIFS_SUPER_MAGIC: true, unix.SMB2_SUPER_MAGIC: true, unix.V9FS_MAGIC: true, unix.MSDOS_SUPER_MAGIC: true,
		unix.FUSE_SUPER_MAGIC: false, unix.OVERLAYFS_SUPER_MAGIC: false, unix.EXT4_SUPER_MAGIC: false, unix.XFS_SUPER_MAGIC: false,
		unix.CIFS_SUPER_MAGIC | -1<<32: true, // as 64 bits with a sign
	} {
		s.opts.AnyFileSystem = false
		if err := s.judge(magic); errors.Is(err, ErrUnsupported) != refused {
			t.Errorf("%x: %v", magic, err)
		}
		s.opts.AnyFileSystem = true
		if err := s.judge(magic); err != nil {
			t.Errorf("%x, asked for: %v", magic, err)
		}
	}
}
