package mountd

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/plyfs/plyfs/unionfs"
)

func TestParseRawOptions(t *testing.T) {
	type want struct {
		Lowers                  []string
		Upper, Work, Dialect    string
		Volatile, ReadOnly      bool
		NoSuid, NoDev, NoAtime  bool
		FSName, Subtype, Warned string
	}
	for _, c := range []struct {
		name  string
		style RawStyle
		args  []string
		want  want
		err   string
	}{
		{
			name: "plain", style: OverlayStyle,
			args: []string{"lowerdir=/a:/b,upperdir=/u,workdir=/w"},
			want: want{Lowers: []string{"/a", "/b"}, Upper: "/u", Work: "/w", FSName: "plyfs", Subtype: "plyfs"},
		},
		{
			name: "empty options and trailing comma", style: FuseOverlayfsStyle,
			args: []string{"lowerdir=/a,upperdir=/u,workdir=/w,,volatile,"},
			want: want{
				Lowers: []string{"/a"}, Upper: "/u", Work: "/w", Volatile: true, Dialect: "auto",
				NoDev: true, NoAtime: true, FSName: "fuse-overlayfs", Subtype: "fuse-overlayfs",
			},
		},
		{
			name: "escapes as in the kernel", style: OverlayStyle,
			args: []string{`lowerdir=/a\:b:/c\,d:/e\\f,upperdir=/u\:v,workdir=/w\,x`},
			want: want{Lowers: []string{"/a:b", "/c,d", `/e\f`}, Upper: "/u:v", Work: "/w,x", FSName: "plyfs", Subtype: "plyfs"},
		},
		{
			name: "a colon escaped for libfuse, too", style: FuseOverlayfsStyle,
			args: []string{`lowerdir=/a\\:b:/c\:d:/e\\\\f:/g\\\:h,upperdir=/u\\:v,workdir=/w\\:x`},
			want: want{
				Lowers: []string{"/a:b", "/c:d", `/e\\f`, `/g\:h`}, Upper: "/u:v", Work: "/w:x", Dialect: "auto",
				NoDev: true, NoAtime: true, FSName: "fuse-overlayfs", Subtype: "fuse-overlayfs",
			},
		},
		{
			name: "a path with a backslash at its end", style: OverlayStyle,
			args: []string{`lowerdir=/a\\:/b`},
			want: want{Lowers: []string{`/a\`, "/b"}, FSName: "plyfs", Subtype: "plyfs"},
		},
		{
			name: "quotation marks", style: OverlayStyle,
			args: []string{`lowerdir="/a,b:/c\,d",upperdir=\"/u\",workdir="/w`},
			want: want{Lowers: []string{"/a,b", "/c,d"}, Upper: `"/u"`, Work: `"/w`, FSName: "plyfs", Subtype: "plyfs"},
		},
		{
			name: "appended lowers", style: OverlayStyle,
			args: []string{"lowerdir=/a:/b", "lowerdir+=/c:d", `ro,lowerdir+=/e\,f`},
			want: want{Lowers: []string{"/a", "/b", "/c:d", "/e,f"}, ReadOnly: true, FSName: "plyfs", Subtype: "plyfs"},
		},
		{
			name: "a later lowerdir starts over", style: OverlayStyle,
			args: []string{"lowerdir=/a,lowerdir=/b"},
			want: want{Lowers: []string{"/b"}, FSName: "plyfs", Subtype: "plyfs"},
		},
		{
			name: "unknown words warn once", style: OverlayStyle,
			args: []string{"lowerdir=/a,lazytime,lazytime,x-gvfs-hide,nfs_export=on"},
			want: want{
				Lowers: []string{"/a"}, FSName: "plyfs", Subtype: "plyfs",
				Warned: `unknown mount option "lazytime" ignored|unknown mount option "nfs_export=on" ignored`,
			},
		},
		{
			name: "mount flags", style: FuseOverlayfsStyle,
			args: []string{"lowerdir=/a,dev,atime,nosuid,userxattr,fsname=x,subtype=y,fsync=0"},
			want: want{
				Lowers: []string{"/a"}, NoSuid: true, Dialect: "auto", FSName: "x", Subtype: "y", Volatile: true,
				Warned: `unknown mount option "userxattr" ignored`,
			},
		},
		{name: "index", style: OverlayStyle, args: []string{"lowerdir=/a,index=yes"}, err: "expected on or off"},
		{name: "redirect", style: OverlayStyle, args: []string{"lowerdir=/a,redirect_dir=yes"}, err: "expected on, off, follow or nofollow"},
		{name: "metacopy alone", style: OverlayStyle, args: []string{"lowerdir=/a,metacopy=on,redirect_dir=follow"}, err: "contradict each other"},
		{name: "no lower", style: OverlayStyle, args: []string{"upperdir=/u,workdir=/w"}, err: "no layer given"},
		{name: "no workdir", style: OverlayStyle, args: []string{"lowerdir=/a,upperdir=/u"}, err: "upperdir= needs workdir="},
		{name: "empty lower", style: OverlayStyle, args: []string{"lowerdir=/a::/b"}, err: "empty path in lowerdir"},
		{name: "no value", style: OverlayStyle, args: []string{"lowerdir="}, err: "needs a value"},
		{name: "bad dialect", style: OverlayStyle, args: []string{"lowerdir=/a,dialect=foo"}, err: `unknown whiteout dialect "foo"`},
		{name: "id mapping", style: FuseOverlayfsStyle, args: []string{"lowerdir=/a,uidmapping=:0:1"}, err: "expected triples"},
		{name: "id mapping, too far", style: FuseOverlayfsStyle, args: []string{"lowerdir=/a,gidmapping=0:4294967290:100"}, err: "beyond the last id"},
		{
			name: "id mapping, all ids", style: FuseOverlayfsStyle, args: []string{"lowerdir=/a,uidmapping=0:0:4294967295"},
			want: want{Lowers: []string{"/a"}, Dialect: "auto", NoDev: true, NoAtime: true, FSName: "fuse-overlayfs", Subtype: "fuse-overlayfs"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			o, err := ParseRawOptions(c.style, c.args)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("error %v, want %q", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := want{
				o.Lowers, o.Upper, o.Work, o.Dialect, o.Volatile, o.ReadOnly, o.NoSuid, o.NoDev, o.NoAtime,
				o.FSName, o.Subtype, strings.Join(o.Warnings, "|"),
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestRedirectByDefault checks whose redirects are believed: those that root
// alone can write, and others only on request.
func TestRedirectByDefault(t *testing.T) {
	for _, c := range []struct {
		args, own string
		want      unionfs.Redirect
	}{
		{"", "overlay", unionfs.RedirectFollow},
		{"", "userxattr", unionfs.RedirectRefuse},
		{",redirect_dir=off", "overlay", unionfs.RedirectFollow},
		{",redirect_dir=off", "userxattr", unionfs.RedirectRefuse},
		{",redirect_dir=nofollow", "overlay", unionfs.RedirectRefuse},
		{",redirect_dir=follow", "userxattr", unionfs.RedirectFollow},
		{",redirect_dir=on", "overlay", unionfs.RedirectOn},
		{",metacopy=on", "overlay", unionfs.RedirectOn},
	} {
		o, err := ParseRawOptions(OverlayStyle, []string{"lowerdir=/a" + c.args})
		if err != nil {
			t.Fatal(err)
		}
		if got := o.redirect(c.own); got != c.want {
			t.Errorf("%q in the %s dialect: %v, want %v", c.args, c.own, got, c.want)
		}
	}
}

// mkdirs makes directories below a fresh one and returns it.
func mkdirs(t *testing.T, names ...string) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if err := os.MkdirAll(filepath.Join(dir, n), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestRawSpecResolvesPaths(t *testing.T) {
	dir := mkdirs(t, "real/low", "sub", "u", "w", "m")
	if err := os.Symlink("../real/low", filepath.Join(dir, "sub/link")); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	o, err := ParseRawOptions(OverlayStyle, []string{"lowerdir=sub/link:sub/link/../../sub,upperdir=u,workdir=w"})
	if err != nil {
		t.Fatal(err)
	}
	s, err := o.Spec("m")
	if err != nil {
		t.Fatal(err)
	}
	got := []string{s.Lowers[0].Path, s.Lowers[1].Path, s.Upper.Path, s.Work, s.Target}
	want := []string{dir + "/real/low", dir + "/sub", dir + "/u", dir + "/w", dir + "/m"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if s.ReadOnly {
		t.Error("read-only in spite of an upper")
	}

	o.ReadOnly = true
	if s, err = o.Spec("m"); err != nil {
		t.Fatal(err)
	}
	if !s.ReadOnly || s.Upper.Path != "" || s.Work != "" || s.Lowers[0].Path != dir+"/u" {
		t.Errorf("ro: upper must become the topmost lower: %+v", s)
	}
}

func TestRawSpecRefusesOverlap(t *testing.T) {
	dir := mkdirs(t, "a", "b", "u/in", "w", "m")
	for _, c := range []struct{ target, err string }{
		{"a", "is itself a directory of the union"},
		{"u/in", "is inside"},
		{"u", "is itself"},
		{"w", "is itself"},
		{".", "would cover"},
		{"missing", "create the directory first"},
		{"/", "would cover|cover the whole system"},
	} {
		t.Run(c.target, func(t *testing.T) {
			target := c.target
			if target != "/" {
				target = filepath.Join(dir, target)
			}
			o := &RawOptions{Lowers: []string{dir + "/a", dir + "/b"}, Upper: dir + "/u", Work: dir + "/w"}
			_, err := o.Spec(target)
			if err == nil {
				t.Fatal("accepted")
			}
			for alt := range strings.SplitSeq(c.err, "|") {
				if strings.Contains(err.Error(), alt) {
					return
				}
			}
			t.Errorf("error %q, want %q", err, c.err)
		})
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	o := &RawOptions{Lowers: []string{dir + "/a"}}
	if _, err := o.Spec(file); err == nil || !strings.Contains(err.Error(), "must be a directory") {
		t.Errorf("file as mount point: %v", err)
	}
	o.Lowers = []string{file}
	if _, err := o.Spec(dir + "/m"); err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("file as layer: %v", err)
	}
}

func FuzzSplitEscaped(f *testing.F) {
	f.Add(`a\:b:c\\:d`, byte(':'))
	f.Add(`\`, byte(','))
	f.Fuzz(func(t *testing.T, s string, sep byte) {
		if sep == '\\' {
			t.Skip("the escape itself is no separator")
		}
		parts := splitEscaped(s, sep)
		if got := strings.Join(parts, string([]byte{sep})); got != s {
			t.Errorf("parts of %q join to %q", s, got)
		}
		escaped := strings.NewReplacer(`\`, `\\`, ",", `\,`, ":", `\:`).Replace(s)
		if got := unescape(escaped); got != s {
			t.Errorf("unescape(escape(%q)) = %q", s, got)
		}
		if n := len(splitEscaped(escaped, ':')); n != 1 {
			t.Errorf("escaped %q splits into %d parts", escaped, n)
		}
	})
}
