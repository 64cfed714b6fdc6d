package unionfs

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout/override"
)

// ofUser makes all layers such as a user without privileges writes.
func ofUser(o *Options) {
	o.Override, o.Owners.FilesOfRoot = override.Containers, true
	for i := range o.Lowers {
		o.Lowers[i].Override = override.Containers
	}
}

func needUserAttrs(t *testing.T) {
	t.Helper()
	if err := unix.Setxattr(t.TempDir(), override.Containers.Attr(), []byte("0:0:755"), 0); err != nil {
		t.Skipf("no user attributes here: %v", err)
	}
}

func (u *union) symlink(target, name string) uint64 {
	u.t.Helper()
	h := header(fuse.FUSE_ROOT_ID)
	h.Uid, h.Gid = 0, 0
	var out fuse.EntryOut
	u.ok(u.Symlink(nil, &h, target, name, &out))
	u.known[out.NodeId]++
	return out.NodeId
}

func (u *union) chown(id uint64, uid, gid uint32) {
	u.t.Helper()
	in := fuse.SetAttrIn{SetAttrInCommon: fuse.SetAttrInCommon{
		InHeader: header(id), Valid: fuse.FATTR_UID | fuse.FATTR_GID, Owner: fuse.Owner{Uid: uid, Gid: gid},
	}}
	in.InHeader.Uid, in.InHeader.Gid = 0, 0
	var out fuse.AttrOut
	u.ok(u.SetAttr(nil, &in, &out))
	if out.Uid != uid || out.Gid != gid {
		u.t.Errorf("owner %d:%d after a change to %d:%d", out.Uid, out.Gid, uid, gid)
	}
}

// TestLinkGivenAway: a symbolic link that somebody else gets is another file from then on,
// and shows nothing of what it is made of.
func TestLinkGivenAway(t *testing.T) {
	needUserAttrs(t)
	u := newUnionWith(t, ofUser, true, []string{})
	link := u.symlink("target", "a")
	var st unix.Stat_t
	u.must(unix.Lstat(filepath.Join(u.dir, "upper/a"), &st))

	// Once it has several names it is found by its file's number.
	var out fuse.EntryOut
	u.ok(u.Link(nil, &fuse.LinkIn{InHeader: header(fuse.FUSE_ROOT_ID), Oldnodeid: link}, "b", &out))
	u.known[out.NodeId]++
	u.remove("b")
	u.chown(link, 5, 6)
	if n := u.nodes.byReal(realID{st.Dev, st.Ino}, upperObjects); n != nil {
		t.Error("the link is still found by the number of the file that it was, which anything can get now")
	}

	h := header(link)
	target, status := u.Readlink(nil, &h)
	u.ok(status)
	if string(target) != "target" {
		t.Errorf("target %q", target)
	}
	list := make([]byte, 1024)
	n, status := u.ListXAttr(nil, &h, list)
	u.ok(status)
	if strings.Contains(string(list[:n]), "override") {
		t.Errorf("shows the attributes %q", list[:n])
	}
}

// TestNonsenseInOneObject: the other names of its directory are none the worse for it.
func TestNonsenseInOneObject(t *testing.T) {
	needUserAttrs(t)
	set := func(name, attr, value string) {
		t.Helper()
		if err := unix.Setxattr(name, attr, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	stat := override.Containers.Attr()
	u := newUnionWith(t, func(o *Options) {
		ofUser(o)
		dir := filepath.Join(o.Lowers[0].Path, "d")
		for _, name := range []string{"garbage", "link"} {
			fd, err := fsat.OpenTrusted(dir)
			if err == nil {
				err = touch(fd, name)
				fsat.Close(fd)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		set(filepath.Join(dir, "garbage"), stat, "garbage")
		set(filepath.Join(dir, "link"), stat, "5:5:777:symlink")
		set(filepath.Join(dir, "data"), stat, "5:6:640:char-1-3")
	}, true, []string{"d/good", "d/data"})
	if got := strings.Join(u.names("d"), " "); got != "data garbage good link" {
		t.Errorf("names: %s", got)
	}
	if got := u.read("d/good"); got != "d/good" {
		t.Errorf("the good one has %q", got)
	}
	if got := u.read("d/data"); got != "d/data" {
		t.Errorf("what has data is no device: it has %q", got)
	}
	h := header(u.walk("d"))
	for _, name := range []string{"garbage", "link"} {
		var out fuse.EntryOut
		if s := u.Lookup(nil, &h, name, &out); s != fuse.EIO {
			t.Errorf("%s: %v, want EIO", name, s)
		}
	}
}

// TestLinkOfUserBelow: a link that is an empty file in a lower is copied up as a link.
func TestLinkOfUserBelow(t *testing.T) {
	needUserAttrs(t)
	u := newUnionWith(t, func(o *Options) {
		o.Override, o.Lowers[0].Override = override.Containers, override.Containers
		link := filepath.Join(o.Lowers[0].Path, "link")
		for attr, value := range map[string]string{override.Containers.Attr(): "5:6:777:symlink", override.TargetAttr: "target"} {
			if err := unix.Setxattr(link, attr, []byte(value), 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Truncate(link, 0); err != nil {
			t.Fatal(err)
		}
	}, true, []string{"link"})
	u.walk("link")
	h := header(fuse.FUSE_ROOT_ID)
	u.ok(u.Rename(nil, &fuse.RenameIn{InHeader: h, Newdir: fuse.FUSE_ROOT_ID}, "link", "moved"))
	h = header(u.walk("moved"))
	target, status := u.Readlink(nil, &h)
	u.ok(status)
	if string(target) != "target" {
		t.Errorf("target %q", target)
	}
}
