package unionfs

import (
	"testing"

	"golang.org/x/sys/unix"
)

// What an opaque directory hides can show in a renamed one that lies in it, as after
// mv d tmp; mkdir d; mv tmp d/old. They are two directories: rm -rf takes directories
// with one number for a loop.
func TestHiddenDirectoryThatWasRenamed(t *testing.T) {
	u := newUnionWith(t, func(o *Options) {
		o.Redirect = RedirectFollow
		top := o.Lowers[0].Path
		for path, attr := range map[string][2]string{"/d": {"user.overlay.opaque", "y"}, "/d/old": {"user.overlay.redirect", "/d"}} {
			if err := unix.Setxattr(top+path, attr[0], []byte(attr[1]), 0); err != nil {
				t.Skipf("no attributes of users here: %v", err)
			}
		}
	}, false, []string{"d/old/"}, []string{"d/x"})
	d, err := u.child(u.root, "d", nil)
	u.must(err)
	old, err := u.child(d, "old", nil)
	u.must(err)
	x, err := u.child(old, "x", nil)
	u.must(err)
	if d.ino == old.ino {
		t.Errorf("d and d/old have the number %d", d.ino)
	}
	if u.lowers.merged(d.low) {
		t.Error("d is merged with what it hides")
	}
	for _, n := range []*inode{x, old, d} {
		u.unref(n, 1)
	}
}
