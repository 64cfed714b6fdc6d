package unionfs

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/whiteout"
)

// inUpper lists what a directory of the upper really holds: "name" or "name/".
func (u *union) inUpper(path string) (names []string) {
	u.t.Helper()
	entries, err := os.ReadDir(filepath.Join(u.dir, "upper", path))
	u.must(err)
	for _, e := range entries {
		switch {
		case e.IsDir():
			names = append(names, e.Name()+"/")
		case e.Type().IsRegular():
			names = append(names, e.Name())
		default:
			names = append(names, e.Name()+" "+e.Type().String())
		}
	}
	return names
}

// TestMarkers: with NoDevices every whiteout is a marker, and goes when there is something
// of the name again.
func TestMarkers(t *testing.T) {
	u := newUnionWith(t, func(o *Options) {
		o.NoDevices, o.UpperDialect = true, whiteout.AutoUser
		// Of an earlier mount, which could make devices.
		if err := unix.Mknod(filepath.Join(o.Upper, "device"), unix.S_IFCHR, 0); err != nil {
			t.Skipf("whiteout devices refused: %v", err)
		}
	}, true, []string{"file", "changed", "moved", "device", "dir/in", "empty/"})
	check := func(what string, upper, shown []string) {
		t.Helper()
		if d := cmp.Diff(upper, u.inUpper("")); d != "" {
			t.Errorf("%s, in the upper (- expected, + found):\n%s", what, d)
		}
		got := u.names("")
		slices.Sort(got)
		if d := cmp.Diff(shown, got); d != "" {
			t.Errorf("%s, shown (- expected, + found):\n%s", what, d)
		}
	}
	device := "device " + (os.ModeDevice | os.ModeCharDevice).String()
	u.remove("file")
	check("unlink", []string{".wh.file", device}, []string{"changed", "dir", "empty", "moved"})
	u.write("changed", "new")
	u.remove("changed")
	check("unlink of a copy", []string{".wh.changed", ".wh.file", device}, []string{"dir", "empty", "moved"})
	h := header(fuse.FUSE_ROOT_ID)
	u.ok(u.Rmdir(nil, &h, "empty"))
	check("rmdir", []string{".wh.changed", ".wh.empty", ".wh.file", device}, []string{"dir", "moved"})
	u.ok(u.Rename(nil, &fuse.RenameIn{InHeader: h, Newdir: fuse.FUSE_ROOT_ID}, "moved", "file"))
	check("rename over a marker", []string{".wh.changed", ".wh.empty", ".wh.moved", device, "file"}, []string{"dir", "file"})
	u.ok(u.Rename(nil, &fuse.RenameIn{InHeader: h, Newdir: fuse.FUSE_ROOT_ID}, "file", "device"))
	check("rename over a device", []string{".wh.changed", ".wh.empty", ".wh.file", ".wh.moved", "device"}, []string{"device", "dir"})
	u.write("file", "again")
	check("create", []string{".wh.changed", ".wh.empty", ".wh.moved", "device", "file"}, []string{"device", "dir", "file"})
	var out fuse.EntryOut
	u.ok(u.Mkdir(nil, &fuse.MkdirIn{InHeader: h, Mode: 0o755}, "empty", &out))
	u.known[out.NodeId]++
	u.remove("dir/in")
	u.ok(u.Rmdir(nil, &h, "dir"))
	check("mkdir, and rmdir of what holds a marker", []string{".wh.changed", ".wh.dir", ".wh.moved", "device", "empty/", "file"}, []string{"device", "empty", "file"})
}
