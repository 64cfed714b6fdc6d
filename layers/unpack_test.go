package layers

import (
	"archive/tar"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestUnpack shows what the layers of an image come to on disk, topmost last.
// Every layer but those that say otherwise is unpacked on top of base.
func TestUnpack(t *testing.T) {
	needRoot(t)
	base := []ent{dir("."), dir("d"), file("d/f", "1"), dir("d/sub"), file("d/sub/g", "2"), file("top", "3")}
	const op = ` trusted.overlay.opaque="y"`
	for _, tc := range []struct {
		name string
		top  []ent
		want string
	}{
		{"whiteout", []ent{dir("."), dir("d"), wh("d/f")}, `
"." 755 dir
"d" 755 dir
"d/f" whiteout`},
		{"whiteout before the same name", []ent{dir("."), dir("d"), wh("d/f"), file("d/f", "new")}, `
"." 755 dir
"d" 755 dir
"d/f" 644 file "new" links 1`},
		{"whiteout after the same name", []ent{dir("."), dir("d"), file("d/f", "new"), wh("d/f")}, `
"." 755 dir
"d" 755 dir
"d/f" 644 file "new" links 1`},
		{"whiteout and directory of the same name", []ent{dir("."), wh("d"), dir("d"), file("d/n", "1")}, `
"." 755 dir
"d" 755 dir` + op + `
"d/n" 644 file "1" links 1`},
		{"entries below a whiteout", []ent{dir("."), file("d/n", "1"), wh("d")}, `
"." 755 dir
"d" 755 dir` + op + `
"d/n" 644 file "1" links 1`},
		{"whiteouts inside a deleted directory", []ent{dir("."), wh("d/sub"), wh("d")}, `
"." 755 dir
"d" whiteout`},
		{"opaque after its siblings", []ent{dir("."), dir("d"), file("d/n", "1"), wh("d/f"), opq("d")}, `
"." 755 dir
"d" 755 dir` + op + `
"d/n" 644 file "1" links 1`},
		{"whiteouts below an opaque directory", []ent{dir("."), dir("d"), opq("d"), dir("d/sub"), wh("d/sub/g")}, `
"." 755 dir
"d" 755 dir` + op + `
"d/sub" 755 dir`},
		{"opaque root", []ent{dir("."), opq("."), dir("d"), file("n", "1")}, `
"." 755 dir
"d" 755 dir` + op + `
"n" 644 file "1" links 1
"top" whiteout`},
		{"whiteout in a directory that is nowhere", []ent{dir("."), wh("no/where/x")}, `
"." 755 dir`},
		{"the last whiteout is in a directory that is nowhere", []ent{dir("."), dir("d"), wh("d/no/x")}, `
"." 755 dir
"d" 755 dir`},
		{"implicit directories", []ent{dir("."), file("new/x/f", "1"), file("d/sub/h", "1")}, `
"." 755 dir
"d" 755 dir
"d/sub" 755 dir
"d/sub/h" 644 file "1" links 1
"new" 755 dir
"new/x" 755 dir
"new/x/f" 644 file "1" links 1`},
		{"bookkeeping of aufs", []ent{dir("."), {name: ".wh..wh.plnk/", typ: tar.TypeDir}, file(".wh..wh.plnk/1.2", "x"), file(".wh..wh.aufs", "")}, `
"." 755 dir`},
		{"duplicates: the last wins", []ent{dir("."), file("x", "1"), file("x", "22"), dir("y"), file("y/z", "333"), sym("y", "x"), file("w", "1"), dir("w")}, `
"." 755 dir
"w" 755 dir
"x" 644 file "22" links 1
"y" 777 symlink "x"`},
		{"a directory twice", []ent{dir("."), dir("y"), file("y/z", "1"), {name: "y", typ: tar.TypeDir, mode: 0o700}}, `
"." 755 dir
"y" 700 dir
"y/z" 644 file "1" links 1`},
		{"paths through links of the layer", []ent{dir("."), dir("real"), sym("abs", "/real"), sym("up", "../../../real"), file("abs/a", "1"), file("up/b", "2"), sym("dangling", "/made/here"), file("dangling/c", "3")}, `
"." 755 dir
"abs" 777 symlink "/real"
"dangling" 777 symlink "/made/here"
"made" 755 dir
"made/here" 755 dir
"made/here/c" 644 file "3" links 1
"real" 755 dir
"real/a" 644 file "1" links 1
"real/b" 644 file "2" links 1
"up" 777 symlink "../../../real"`},
		{"hard links", []ent{dir("."), file("a", "1"), hard("b", "a"), hard("c", "b"), hard("a", "a")}, `
"." 755 dir
"a" 644 file "1" links 3
"b" 644 file "1" links 3
"c" 644 file "1" links 3`},
		{"hard links to a file below", []ent{dir("."), hard("a", "d/f"), hard("b", "a"), hard("c", "/top")}, `
"." 755 dir
"a" 644 file "1" links 2
"b" 644 file "1" links 2
"c" 644 file "3" links 1`},
		{"hard link to a symbolic link", []ent{dir("."), sym("s", "nowhere"), hard("h", "s")}, `
"." 755 dir
"h" 777 symlink "nowhere"
"s" 777 symlink "nowhere"`},
		{"pending hard link replaced", []ent{dir("."), hard("a", "d/f"), file("a", "mine")}, `
"." 755 dir
"a" 644 file "mine" links 1`},
		{"special files", []ent{dir("."), {name: "null", typ: tar.TypeChar, maj: 1, min: 3, mode: 0o666}, {name: "loop", typ: tar.TypeBlock, maj: 7, mode: 0o660, gid: 6}, {name: "pipe", typ: tar.TypeFifo, mode: 0o600}}, `
"." 755 dir
"loop" 660 block 7:0 owner 0:6
"null" 666 char 1:3
"pipe" 600 fifo`},
		{"modes and owners", []ent{dir("."), {name: "s", data: "1", mode: 0o6755, uid: 1000, gid: 70000}, {name: "t/", typ: tar.TypeDir, mode: 0o3777}, {name: "n", data: "1"}}, `
"." 755 dir
"n" 0 file "1" links 1
"s" 6755 file "1" links 1 owner 1000:70000
"t" 3777 dir`},
		{"extended attributes", []ent{
			dir("."),
			{name: "x", mode: 0o644, x: map[string]string{"user.a": "\x00\xff", "trusted.b": "t", "security.selinux": "dropped"}},
			{name: "l", typ: tar.TypeSymlink, link: "x", mode: 0o777, x: map[string]string{"trusted.l": "1"}},
			{name: "forged/", typ: tar.TypeDir, mode: 0o755, x: map[string]string{"trusted.overlay.opaque": "y", "user.overlay.opaque": "y", "trusted.overlay.redirect": "/d"}},
			{name: "meta", mode: 0o644, data: "1", x: map[string]string{"trusted.overlay.metacopy": "", "trusted.overlay.redirect": "/d/f", "trusted.overlay.origin": "o", "user.overlay.metacopy": ""}},
		}, `
"." 755 dir
"forged" 755 dir trusted.overlay.overlay.opaque="y" trusted.overlay.overlay.redirect="/d" user.overlay.opaque="y"
"l" 777 symlink "x" trusted.l="1"
"meta" 644 file "1" links 1 trusted.overlay.overlay.metacopy="" trusted.overlay.overlay.origin="o" trusted.overlay.overlay.redirect="/d/f" user.overlay.metacopy=""
"x" 644 file "" links 1 trusted.b="t" user.a="\x00\xff"`},
		{"names", []ent{dir("."), file("latin\xe9", "1"), file("new\nline", "2"), file(strings.Repeat("n", 255), "3"), file("ü", "4")}, `
"." 755 dir
"latin\xe9" 644 file "1" links 1
"new\nline" 644 file "2" links 1
"` + strings.Repeat("n", 255) + `" 644 file "3" links 1
"ü" 644 file "4" links 1`},
		{"nothing", nil, `
"." 755 dir`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := openStore(t)
			st := loadLayers(t, s, layerTar(t, base...), layerTar(t, tc.top...))
			if d := cmp.Diff(strings.TrimPrefix(tc.want, "\n")+"\n", dump(t, st.Lowers[0].Path)); d != "" {
				t.Error(d)
			}
			clean(t, s)
		})
	}
}

// TestInherit: directories the tar does not mention look as below.
func TestInherit(t *testing.T) {
	needRoot(t)
	s := openStore(t)
	st := loadLayers(t, s,
		layerTar(t, ent{name: "./", typ: tar.TypeDir, mode: 0o700, uid: 5}, ent{name: "d/", typ: tar.TypeDir, mode: 0o1770, gid: 7, x: map[string]string{"user.k": "v"}}),
		layerTar(t, dir("other")),
		layerTar(t, file("d/f", "1")))
	want := `"." 700 dir owner 5:0
"d" 1770 dir owner 0:7 user.k="v"
"d/f" 644 file "1" links 1
`
	if d := cmp.Diff(want, dump(t, st.Lowers[0].Path)); d != "" {
		t.Error(d)
	}
	fi, err := os.Stat(filepath.Join(st.Lowers[0].Path, "d"))
	if err != nil || !fi.ModTime().Equal(epoch) {
		t.Errorf("time of the directory: %v %v", fi.ModTime(), err)
	}
}

func TestTimes(t *testing.T) {
	s := openStore(t)
	at := time.Unix(1600000000, 123456789)
	st := loadLayers(t, s, layerTar(t,
		ent{name: "d/", typ: tar.TypeDir, mode: 0o755, time: at}, ent{name: "d/f", data: "1", mode: 0o644, time: at},
		ent{name: "d/l", typ: tar.TypeSymlink, link: "x", time: at}, ent{name: "old", mode: 0o644, time: time.Unix(-1000, 0)}))
	for name, want := range map[string]time.Time{"d": at, "d/f": at, "d/l": at, "old": time.Unix(-1000, 0)} {
		fi, err := os.Lstat(filepath.Join(st.Lowers[0].Path, name))
		if err != nil || !fi.ModTime().Equal(want) {
			t.Errorf("%s: %v %v, expected %v", name, fi.ModTime(), err, want)
		}
	}
}

// TestACL: an access control list changes the group bits of the mode, and
// comes through.
func TestACL(t *testing.T) {
	needRoot(t)
	acl := "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\xe8\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff"
	s := openStore(t)
	st := loadLayers(t, s, layerTar(t, ent{name: "f", data: "1", mode: 0o664, uid: 3, x: map[string]string{"system.posix_acl_access": acl, "security.capability": capability}}))
	for attr, want := range map[string]string{"system.posix_acl_access": acl, "security.capability": capability} {
		buf := make([]byte, 100)
		n, err := unix.Getxattr(filepath.Join(st.Lowers[0].Path, "f"), attr, buf)
		if err != nil || string(buf[:max(n, 0)]) != want {
			t.Errorf("%s: %q %v", attr, buf[:max(n, 0)], err)
		}
	}
}

// TestUnprivileged: without privileges a layer with foreign owners and devices
// loads with the same diffIDs and comes out byte for byte.
func TestUnprivileged(t *testing.T) {
	s := openStore(t)
	if s.powers.privileged {
		t.Skip("needs an ordinary user")
	}
	l := layerTar(t, ent{name: "closed/", typ: tar.TypeDir, mode: 0}, ent{name: "closed/f", data: "1"}, ent{name: "suid", data: "2", mode: 0o4755, uid: 33},
		ent{name: "null", typ: tar.TypeChar, maj: 1, min: 3}, ent{name: "x", mode: 0o644, x: map[string]string{"trusted.t": "1", "user.u": "2"}}, wh("gone"))
	top := layerTar(t, wh("suid"), dir("closed"), opq("closed"))
	loadLayers(t, s, l, top)
	roundTrip(t, s, img{refs: []string{"r"}, layers: [][]byte{l, top}})
	clean(t, s)
}

func TestLimits(t *testing.T) {
	for _, tc := range []struct {
		name string
		l    Limits
	}{
		{"entries", Limits{Entries: 1}},
		{"bytes", Limits{LayerBytes: 100}},
		{"depth", Limits{Depth: 1}},
		{"xattrs", Limits{XattrBytes: 3}},
		{"layers", Limits{Layers: 1}},
		{"config", Limits{Config: 10}},
		{"manifest", Limits{Manifest: 10}},
		{"members", Limits{Members: 2}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, err := Open(t.Context(), filepath.Join(t.TempDir(), "s"), Options{Limits: tc.l})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			l := layerTar(t, dir("a"), file("a/b", strings.Repeat("x", 200)), ent{name: "c", x: map[string]string{"user.k": "v"}})
			data := outerTar(t, oldDocker(t, img{layers: [][]byte{l, layerTar(t)}}))
			if _, err := s.Load(t.Context(), Source{Reader: strings.NewReader(string(data))}, LoadOptions{}); err == nil {
				t.Error("accepted")
			}
			clean(t, s)
		})
	}
}
