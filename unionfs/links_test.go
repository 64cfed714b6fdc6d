package unionfs

import (
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// links is st_nlink of a path, as GETATTR says it.
func (u *union) links(path string) uint32 {
	u.t.Helper()
	var out fuse.AttrOut
	u.ok(u.GetAttr(nil, &fuse.GetAttrIn{InHeader: header(u.walk(path))}, &out))
	return out.Nlink
}

// TestCountSubdirs: a directory of two layers has as many links as it has subdirectories,
// and two, whatever is done to it.
func TestCountSubdirs(t *testing.T) {
	low := [][]string{{"d/a/", "d/b", "-d/hidden"}, {"d/a/", "d/c/", "d/hidden/", "d/file", "single/x/"}}
	u := newUnionWith(t, func(o *Options) { o.CountSubdirs = true }, true, low...)
	check := func(path string, want uint32) {
		t.Helper()
		if got := u.links(path); got != want {
			t.Errorf("%s has %d links, not %d", path, got, want)
		}
	}
	mkdir := func(dir, name string) {
		t.Helper()
		var out fuse.EntryOut
		u.ok(u.Mkdir(nil, &fuse.MkdirIn{InHeader: header(u.walk(dir)), Mode: 0o755}, name, &out))
		u.known[out.NodeId]++
	}
	rmdir := func(dir, name string) {
		t.Helper()
		h := header(u.walk(dir))
		u.ok(u.Rmdir(nil, &h, name))
	}
	check("", 4)
	check("d", 4) // a and c; the kernel would say 1
	check("single", 3)
	mkdir("d", "new")
	check("d", 5)
	mkdir("d", "hidden") // over a whiteout
	check("d", 6)
	rmdir("d", "a")
	check("d", 5)
	rmdir("d", "new")
	check("d", 4)
	u.write("d/file", "copied up")
	check("d", 4)
	u.ok(u.Rename(nil, &fuse.RenameIn{InHeader: header(u.walk("d")), Newdir: u.walk("single")}, "hidden", "moved"))
	check("d", 3)
	check("single", 4) // copied up, and so of two layers now
}

// TestUncountedSubdirs: a directory of two layers has one link if nobody counts.
func TestUncountedSubdirs(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"default": func(*Options) {},
		"static":  func(o *Options) { o.CountSubdirs, o.StaticNlink = true, true },
	} {
		t.Run(name, func(t *testing.T) {
			u := newUnionWith(t, change, true, []string{"d/a/"}, []string{"d/b/"})
			if got := u.links("d"); got != 1 {
				t.Errorf("%d links", got)
			}
		})
	}
}
