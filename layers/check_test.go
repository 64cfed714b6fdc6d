package layers

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/metadata"
)

// TestCheckFinds damages a store in each way the check knows.
func TestCheckFinds(t *testing.T) {
	for _, tc := range []struct {
		name, inv string
		fixed     bool
		do        func(t *testing.T, s *Store, l LayerInfo, c *Container)
	}{
		{"layer directory missing", "K5", false, func(t *testing.T, s *Store, l LayerInfo, _ *Container) {
			must(t, removeTree(s.layersFd, l.CacheID))
		}},
		{"sidecar missing", "K6", true, func(t *testing.T, s *Store, l LayerInfo, _ *Container) {
			must(t, os.Remove(filepath.Join(s.root, layersName, l.CacheID, sidecarName)))
		}},
		{"sidecar of another layer", "K6", true, func(t *testing.T, s *Store, l LayerInfo, _ *Container) {
			p := filepath.Join(s.root, layersName, l.CacheID, sidecarName)
			raw, err := os.ReadFile(p)
			must(t, err, os.WriteFile(p, []byte(strings.ReplaceAll(string(raw), l.CacheID, newID())), 0o600))
		}},
		{"stray layer directory", "K7", true, func(t *testing.T, s *Store, _ LayerInfo, _ *Container) {
			must(t, os.Mkdir(filepath.Join(s.root, layersName, newID()), 0o700))
		}},
		{"stray stage", "K8", true, func(t *testing.T, s *Store, _ LayerInfo, _ *Container) {
			must(t, os.Mkdir(filepath.Join(s.root, stageName, newID()), 0o700))
		}},
		{"upper missing", "K13", true, func(t *testing.T, s *Store, _ LayerInfo, c *Container) {
			must(t, os.RemoveAll(c.Upper))
		}},
		{"stray writable layer", "K14", true, func(t *testing.T, s *Store, _ LayerInfo, _ *Container) {
			must(t, os.MkdirAll(filepath.Join(s.root, rwName, newID(), upperName), 0o700))
		}},
		{"dead lease", "K16", true, func(t *testing.T, s *Store, _ LayerInfo, _ *Container) {
			must(t, s.update(t.Context(), func(tx *metadata.Tx) error {
				return tx.AddLease(metadata.Lease{ID: "x", Owner: metadata.Owner{Pid: 1}})
			}))
		}},
		{"trash outside", "K18", true, func(t *testing.T, s *Store, _ LayerInfo, _ *Container) {
			must(t, s.update(t.Context(), func(tx *metadata.Tx) error {
				_, err := addTrash(tx, "", "../outside/x")
				return err
			}))
		}},
		{"content changed", "K19", false, func(t *testing.T, s *Store, l LayerInfo, _ *Container) {
			p := filepath.Join(l.Path, "d/f")
			must(t, os.Remove(p), os.WriteFile(p, []byte("X"), 0o600))
		}},
		{"file added", "K20", true, func(t *testing.T, s *Store, l LayerInfo, _ *Container) {
			must(t, os.WriteFile(filepath.Join(l.Path, "added"), []byte("X"), 0o600))
		}},
		{"record truncated", "K22", false, func(t *testing.T, s *Store, l LayerInfo, _ *Container) {
			must(t, os.Truncate(filepath.Join(s.root, layersName, l.CacheID, splitName), 0))
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := openStore(t)
			baseImage(t, s)
			c := create(t, s, "base", "c")
			ls, err := s.Layers(t.Context(), "base")
			must(t, err)
			tc.do(t, s, ls[0], c)
			rep, err := s.Check(t.Context(), CheckOptions{Deep: true})
			must(t, err)
			if rep.Findings = errorsOf(rep); len(rep.Findings) != 1 || rep.Findings[0].Invariant != tc.inv || rep.Findings[0].Fixed {
				t.Fatalf("%+v", rep.Findings)
			}
			rep, err = s.Check(t.Context(), CheckOptions{Deep: true, Repair: true})
			must(t, err)
			if rep.Findings = errorsOf(rep); len(rep.Findings) != 1 || rep.Findings[0].Fixed != tc.fixed {
				t.Fatalf("repair: %+v", rep.Findings)
			}
			if tc.fixed && tc.inv != "K13" {
				clean(t, s)
			}
		})
	}
}

func errorsOf(rep *Report) (out []Finding) {
	for _, f := range rep.Findings {
		if f.Severity != SeverityWarning {
			out = append(out, f)
		}
	}
	return out
}

// TestLockedStore: a database that another process keeps is an error that says
// who has it.
func TestLockedStore(t *testing.T) {
	s := openStore(t)
	var told []string
	hold, err := os.Open(filepath.Join(s.root, dbName))
	must(t, err)
	must(t, unix.Flock(int(hold.Fd()), unix.LOCK_EX))
	_, err = Open(t.Context(), s.root, Options{LockTimeout: 50 * time.Millisecond, OnLockWait: func(m string) { told = append(told, m) }})
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "process") || len(told) != 1 {
		t.Error(err, told)
	}
	must(t, hold.Close())
}

// TestDiskUsageAddsUp: what df says is what du(1) would count.
func TestDiskUsageAddsUp(t *testing.T) {
	s := openStore(t)
	u, err := s.DiskUsage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var blocks int64
	err = filepath.WalkDir(s.Root(), func(p string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(p, &st)
		}
		blocks += st.Blocks
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if u.Total != blocks*512 {
		t.Errorf("df says %d bytes, du %d", u.Total, blocks*512)
	}
}
