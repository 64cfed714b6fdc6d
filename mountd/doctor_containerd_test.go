package mountd

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestDoctorContainerd: whether containerd sees the mounts of the snapshotter.
func TestDoctorContainerd(t *testing.T) {
	type process struct{ command, ns string }
	for name, c := range map[string]struct {
		processes []process
		ok        bool
		says      string
	}{
		"none":        {[]process{{"sh", "1"}, {"plyfs\x00daemon", "1"}}, true, "neither"},
		"one":         {[]process{{"/usr/bin/containerd", "1"}}, true, "not both"},
		"together":    {[]process{{"/usr/bin/containerd\x00-c\x00x", "1"}, {"/usr/bin/plyfs\x00snapshotter", "1"}}, true, "processes 100 and plyfs snapshotter 101"},
		"apart":       {[]process{{"containerd", "1"}, {"plyfs\x00snapshotter", "2"}}, false, "without containerd"},
		"two pairs":   {[]process{{"containerd", "1"}, {"plyfs\x00snapshotter", "1"}, {"containerd", "2"}, {"plyfs\x00snapshotter", "2"}}, true, "see the same"},
		"not a shim":  {[]process{{"containerd-shim-runc-v2", "2"}, {"containerd", "1"}, {"plyfs\x00snapshotter", "1"}}, true, "see the same"},
		"not allowed": {[]process{{"containerd", ""}, {"plyfs\x00snapshotter", "1"}}, true, "not both"},
	} {
		dir := t.TempDir()
		for i, p := range c.processes {
			at := filepath.Join(dir, strconv.Itoa(100+i))
			if err := os.MkdirAll(filepath.Join(at, "ns"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(at, "cmdline"), []byte(p.command+"\x00"), 0o644); err != nil {
				t.Fatal(err)
			}
			if p.ns == "" {
				continue
			}
			if err := os.Symlink("mnt:["+p.ns+"]", filepath.Join(at, "ns", "mnt")); err != nil {
				t.Fatal(err)
			}
		}
		if d := containerdIn(dir); d.OK != c.ok || !strings.Contains(d.Found, c.says) {
			t.Errorf("%s: %+v", name, d)
		}
	}
}
