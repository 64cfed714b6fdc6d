package unionfs

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/whiteout"
)

// following mounts with everything followed that is asked for.
func following(o *Options) { o.Redirect, o.Metacopy = RedirectOn, true }

func setAttr(t *testing.T, path, attr, value string) {
	t.Helper()
	if err := unix.Lsetxattr(path, "user.overlay."+attr, []byte(value), 0); err != nil {
		t.Skipf("no user attributes here: %v", err)
	}
}

// TestRedirectsInLowers follows redirects of lowers, as a kernel overlayfs that
// was mounted with redirect_dir=on leaves them behind.
func TestRedirectsInLowers(t *testing.T) {
	for _, tc := range []struct {
		name   string
		lowers [][]string
		attrs  map[string]string // "layer/path" -> redirect
		dir    string
		want   []string
	}{
		{
			"absolute",
			[][]string{{"new/", "new/top"}, {"old/sub/a", "new/hidden"}},
			map[string]string{"lower0/new": "/old/sub"},
			"new",
			[]string{"a", "top"},
		},
		{
			"a name beside it",
			[][]string{{"d/new/top"}, {"d/old/a", "old/wrong"}},
			map[string]string{"lower0/d/new": "old"},
			"d/new",
			[]string{"a", "top"},
		},
		{
			"two in a row",
			[][]string{{"c/x"}, {"b/y"}, {"a/z", "c/wrong", "b/wrong"}},
			map[string]string{"lower0/c": "/b", "lower1/b": "/a"},
			"c",
			[]string{"x", "y", "z"},
		},
		{
			"in the middle layer",
			[][]string{{"d/x"}, {"d/y"}, {"e/z", "d/wrong"}},
			map[string]string{"lower1/d": "/e"},
			"d",
			[]string{"x", "y", "z"},
		},
		{
			"a directory above has moved",
			[][]string{{"p/new/x"}, {"q/old/y"}},
			map[string]string{"lower0/p": "/q", "lower0/p/new": "old"},
			"p/new",
			[]string{"x", "y"},
		},
		{
			"whiteout on the way",
			[][]string{{"new/x"}, {"-old"}, {"old/y"}},
			map[string]string{"lower0/new": "/old"},
			"new",
			[]string{"x"},
		},
		{"nothing there", [][]string{{"new/x"}, {"y"}}, map[string]string{"lower0/new": "/old"}, "new", []string{"x"}},
		{"a file there", [][]string{{"new/x"}, {"old"}}, map[string]string{"lower0/new": "/old"}, "new", []string{"x"}},
		{"in the lowest", [][]string{{"y"}, {"new/x", "old/z"}}, map[string]string{"lower1/new": "/old"}, "new", []string{"x"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			u := newUnionWith(t, func(o *Options) {
				following(o)
				dir := filepath.Dir(o.Lowers[0].Path)
				for path, v := range tc.attrs {
					setAttr(t, filepath.Join(dir, path), "redirect", v)
				}
			}, false, tc.lowers...)
			if d := cmp.Diff(tc.want, u.names(tc.dir)); d != "" {
				t.Errorf("listing of %s (-want +got):\n%s", tc.dir, d)
			}
		})
	}
}

// TestForgedAttributesExposeNothing makes attributes up, as anybody who can
// write to a layer could, and looks for what lies outside of the layers.
func TestForgedAttributesExposeNothing(t *testing.T) {
	for _, tc := range []struct{ name, redirect string }{
		{"up", "/../secret"},
		{"up in the middle", "/plain/../../secret"},
		{"relative up", ".."},
		{"through a link", "/link/secret"},
		{"link itself", "/link"},
		{"empty name", "//secret"},
		{"slash alone", "/"},
		{"relative path", "a/b"},
		{"nothing", ""},
	} {
		for _, upper := range []bool{false, true} {
			t.Run(tc.name, func(t *testing.T) {
				u := newUnionWith(t, func(o *Options) {
					following(o)
					top := filepath.Dir(o.Lowers[0].Path)
					secret := filepath.Join(top, "secret")
					at := o.Lowers[0].Path
					if upper {
						at = o.Upper
					}
					for _, err := range []error{
						os.Mkdir(secret, 0o755), os.WriteFile(filepath.Join(secret, "file"), []byte("secret"), 0o644),
						os.Symlink(top, filepath.Join(o.Lowers[1].Path, "link")),
						os.Mkdir(filepath.Join(at, "dir"), 0o755), os.WriteFile(filepath.Join(at, "file"), []byte("none"), 0o644),
					} {
						if err != nil {
							t.Fatal(err)
						}
					}
					setAttr(t, filepath.Join(at, "dir"), "redirect", tc.redirect)
					setAttr(t, filepath.Join(at, "file"), "redirect", tc.redirect+"/file")
					setAttr(t, filepath.Join(at, "file"), "metacopy", "")
				}, true, []string{"x"}, []string{"plain/y"})
				for _, name := range []string{"dir", "file"} {
					h := header(fuse.FUSE_ROOT_ID)
					var out fuse.EntryOut
					s := u.Lookup(nil, &h, name, &out)
					if s != fuse.OK {
						continue // refused
					}
					u.known[out.NodeId]++
					if name == "file" {
						t.Error("a file without data is shown")
					} else if got := u.names("dir"); len(got) != 0 {
						t.Errorf("the directory shows %q", got)
					}
				}
			})
		}
	}
}

// TestUserAttributesAreDataForRoot checks that a mount whose attributes are
// root's ignores those that anybody can set.
func TestUserAttributesAreDataForRoot(t *testing.T) {
	for _, d := range []whiteout.Dialect{whiteout.Overlay, whiteout.Auto} {
		t.Run(d.String(), func(t *testing.T) {
			u := newUnionWith(t, func(o *Options) {
				following(o)
				for i := range o.Lowers {
					o.Lowers[i].Dialect = d
				}
				setAttr(t, filepath.Join(o.Lowers[0].Path, "dir"), "redirect", "/other")
				setAttr(t, filepath.Join(o.Lowers[0].Path, "file"), "metacopy", "")
			}, false, []string{"dir/x", "file"}, []string{"other/y", "dir/z"})
			if d := cmp.Diff([]string{"x", "z"}, u.names("dir")); d != "" {
				t.Errorf("listing (-want +got):\n%s", d)
			}
			if got := u.read("file"); got != "file" {
				t.Errorf("read %q, want the file's own data", got)
			}
		})
	}
}

// TestMetacopyInLowers reads files whose data is further down.
func TestMetacopyInLowers(t *testing.T) {
	u := newUnionWith(t, func(o *Options) {
		following(o)
		for _, l := range []string{"f", "g"} {
			p := filepath.Join(o.Lowers[0].Path, l)
			if err := os.WriteFile(p, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(p, 5); err != nil {
				t.Fatal(err)
			}
			setAttr(t, p, "metacopy", "")
		}
		setAttr(t, filepath.Join(o.Lowers[0].Path, "g"), "redirect", "/d/other")
	}, true, []string{"x"}, []string{"f", "d/other"})
	if got := u.read("f"); got != "f" {
		t.Errorf("f reads %q", got)
	}
	if got := u.read("g"); got != "d/oth" {
		t.Errorf("g reads %q", got)
	}
}
