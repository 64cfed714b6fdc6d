package whiteout

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func TestParseMarker(t *testing.T) {
	for _, tc := range []struct {
		name   string
		want   Marker
		target string
	}{
		{"plain", NotMarker, ""},
		{".whx", NotMarker, ""},
		{"a.wh.b", NotMarker, ""},
		{".wh.a", MarkerWhiteout, "a"},
		{".wh..hidden", MarkerWhiteout, ".hidden"},
		{".wh. ", MarkerWhiteout, " "},
		{".wh..wh..opq", MarkerOpaque, ""},
		{".wh..wh.plnk", MarkerMeta, ""},
		{".wh..wh.aufs", MarkerMeta, ""},
		{".wh.", MarkerInvalid, ""},
		{".wh..", MarkerInvalid, ""},
		{".wh...", MarkerInvalid, ""},
	} {
		if m, target := ParseMarker(tc.name); m != tc.want || target != tc.target {
			t.Errorf("ParseMarker(%q) = %d, %q; want %d, %q", tc.name, m, target, tc.want, tc.target)
		}
	}
}

func TestDialectNames(t *testing.T) {
	for _, d := range []Dialect{Overlay, UserXattr, AUFS, Auto} {
		var got Dialect
		if err := got.UnmarshalText([]byte(d.String())); err != nil || got != d {
			t.Errorf("%v: read back as %v, %v", d, got, err)
		}
	}
	if _, err := ParseDialect("ext4"); err == nil {
		t.Error("ParseDialect accepted an unknown name")
	}
}

// TestXattrLaws checks that what a user stores comes back and that no name a
// user can give reaches a private one.
func TestXattrLaws(t *testing.T) {
	names := rapid.OneOf(
		rapid.StringMatching(`(user|trusted|security)\.[a-z.]{1,20}`),
		rapid.StringMatching(`(trusted|user)\.overlay\.(overlay\.){0,3}[a-z]{1,8}`),
		rapid.StringMatching(`user\.fuseoverlayfs\.[a-z]{1,8}`),
	)
	rapid.Check(t, func(t *rapid.T) {
		d := rapid.SampledFrom([]Dialect{Overlay, UserXattr, AUFS, Auto}).Draw(t, "dialect")
		name := names.Draw(t, "name")
		disk := d.ToDisk(name)
		if back, visible := d.FromDisk(disk); !visible || back != name {
			t.Fatalf("%v: %q is stored as %q and read back as %q, %v", d, name, disk, back, visible)
		}
		for _, private := range []string{"opaque", "whiteout", "redirect", "metacopy"} {
			if disk == d.Attr(private) {
				t.Fatalf("%v: user name %q reaches %q", d, name, disk)
			}
		}
	})
}

func TestPrivateAttributesAreHidden(t *testing.T) {
	for _, tc := range []struct {
		d       Dialect
		disk    string
		visible bool
	}{
		{Overlay, "trusted.overlay.opaque", false},
		{Overlay, "user.overlay.opaque", true},
		{UserXattr, "user.overlay.opaque", false},
		{UserXattr, "trusted.overlay.opaque", true},
		{AUFS, "trusted.overlay.opaque", false},
		{Auto, "trusted.overlay.origin", false},
		{Auto, "user.overlay.origin", false},
		{Auto, "user.fuseoverlayfs.origin", false},
		{Overlay, "user.x", true},
	} {
		if _, v := tc.d.FromDisk(tc.disk); v != tc.visible {
			t.Errorf("%v: %s visible = %v, want %v", tc.d, tc.disk, v, tc.visible)
		}
	}
}

func openPath(t *testing.T, path string) int {
	t.Helper()
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func TestMarkOnDisk(t *testing.T) {
	dir := t.TempDir()
	set := func(name, attr, value string) string {
		p := filepath.Join(dir, name)
		if err := os.Mkdir(p, 0o755); err != nil {
			t.Fatal(err)
		}
		if attr != "" {
			err := unix.Setxattr(p, attr, []byte(value), 0)
			if err == unix.EPERM && os.Getuid() != 0 {
				return "" // trusted.* is for root
			}
			if err == unix.EOPNOTSUPP {
				t.Skipf("%s has no user attributes", dir)
			}
			if err != nil {
				t.Fatalf("set %s: %v", attr, err)
			}
		}
		return p
	}
	for _, tc := range []struct {
		name, attr, value string
		want              map[Dialect]DirMark
	}{
		{"plain", "", "", map[Dialect]DirMark{}},
		{"trusted", "trusted.overlay.opaque", "y", map[Dialect]DirMark{Overlay: Opaque, Auto: Opaque}},
		{"user", "user.overlay.opaque", "y", map[Dialect]DirMark{UserXattr: Opaque, Auto: Opaque}},
		{"fuse", "user.fuseoverlayfs.opaque", "y", map[Dialect]DirMark{Auto: Opaque}},
		{"x", "user.overlay.opaque", "x", map[Dialect]DirMark{UserXattr: XWhiteouts, Auto: XWhiteouts}},
		{"n", "user.overlay.opaque", "n", map[Dialect]DirMark{}},
		{"long", "user.overlay.opaque", "yyyyyyyy", map[Dialect]DirMark{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := set(tc.name, tc.attr, tc.value)
			if p == "" {
				t.Skipf("needs root to set %s", tc.attr)
			}
			fd := openPath(t, p)
			for _, d := range []Dialect{Overlay, UserXattr, AUFS, Auto} {
				got, err := d.Mark(fd)
				if err != nil || got != tc.want[d] {
					t.Errorf("%v: Mark = %d, %v; want %d", d, got, err, tc.want[d])
				}
			}
		})
	}
}

func TestCreateDevice(t *testing.T) {
	dir := t.TempDir()
	fd := openPath(t, dir)
	if err := CreateDevice(fd, "gone"); err != nil {
		t.Skipf("%s refuses whiteout devices: %v", dir, err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(dir, "gone"), &st); err != nil {
		t.Fatal(err)
	}
	if !IsDevice(st.Mode, st.Rdev) {
		t.Errorf("mode %o rdev %d is not a whiteout", st.Mode, st.Rdev)
	}
	if IsDevice(unix.S_IFREG|0o644, 0) || IsDevice(unix.S_IFCHR, unix.Mkdev(1, 3)) {
		t.Error("IsDevice takes others for whiteouts")
	}
}
