package layers

import (
	"archive/tar"
	"bytes"
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
)

// plant makes a directory tree. An item is a path and what it is:
//
//	a/              directory
//	a/f=data        file
//	a/g>a/f         hard link to a/f
//	a/l@target      symbolic link
//	a/x!            whiteout
//
// and, after blanks, attributes of the dialect: redirect=/a, metacopy, opaque,
// opaque=x, whiteout.
// A metacopied file has the size of its data, and none of it.
func plant(t testing.TB, root string, d whiteout.Dialect, items ...string) {
	t.Helper()
	must(t, os.MkdirAll(root, 0o755))
	for _, item := range items {
		f := strings.Fields(item)
		i := strings.IndexAny(f[0], "=>@!")
		path, what := f[0], byte('/')
		data := ""
		if i >= 0 {
			path, what, data = f[0][:i], f[0][i], f[0][i+1:]
		}
		p := filepath.Join(root, path)
		switch what {
		case '/':
			must(t, os.MkdirAll(p, 0o755))
		case '=':
			must(t, os.WriteFile(p, []byte(data), 0o644))
		case '>':
			must(t, os.Link(filepath.Join(root, data), p))
		case '@':
			must(t, os.Symlink(data, p))
		case '!':
			must(t, whiteout.CreateDevice(unix.AT_FDCWD, p))
		}
		for _, a := range f[1:] {
			name, value, _ := strings.Cut(a, "=")
			switch name {
			case "opaque", "whiteout":
				value = cmp.Or(value, "y")
			case "metacopy":
				must(t, os.Truncate(p, 0), os.Truncate(p, int64(len(data))), os.Chmod(p, 0o600))
			}
			must(t, unix.Setxattr(p, d.Attr(name), []byte(value), 0))
		}
	}
	// The times of directories would be those of the test.
	must(t, filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		ts := []unix.Timespec{timespec(epoch), timespec(epoch)}
		return errors.Join(err, unix.UtimesNanoAt(unix.AT_FDCWD, p, ts, unix.AT_SYMLINK_NOFOLLOW))
	}))
}

// dialects are those that uppers of ours can be in, as far as the test may
// write them.
func dialects(t testing.TB) map[string]whiteout.Dialect {
	t.Helper()
	out := map[string]whiteout.Dialect{"userxattr": whiteout.UserXattr}
	if openStore(t).powers.privileged {
		out["overlay"] = whiteout.Overlay
	}
	return out
}

// stackDirs makes a stack of trees, the topmost lower first. index lists, as
// UPPER=LOWER, names that the upper file and the lower file of a group of hard
// links have.
func stackDirs(t testing.TB, d whiteout.Dialect, lowers [][]string, upper []string, index ...string) Stack {
	t.Helper()
	dir := t.TempDir()
	st := Stack{Upper: dir + "/upper", Work: dir + "/work", Dialect: d}
	for i, l := range lowers {
		p := fmt.Sprintf("%s/lower%d", dir, i)
		plant(t, p, d, l...)
		st.Lowers = append(st.Lowers, LayerDir{Path: p, Dialect: d})
	}
	must(t, os.Mkdir(st.Work, 0o700), os.Mkdir(st.Work+"/index", 0o700))
	plant(t, st.Upper, d, upper...)
	for _, x := range index {
		up, low, _ := strings.Cut(x, "=")
		fd, err := fsat.OpenTrusted(st.Lowers[0].Path)
		must(t, err)
		o, err := fsat.Origin(fd, low, fsat.FSUUID(fd))
		fsat.Close(fd)
		if errors.Is(err, unix.EOPNOTSUPP) {
			t.Skipf("%s has no file handles", dir)
		}
		must(t, err)
		entry := st.Work + "/index/" + hex.EncodeToString(o)
		if p, ok := strings.CutPrefix(up, "-"); ok { // its name in the upper is gone
			must(t, os.Rename(filepath.Join(st.Upper, p), entry), os.Chtimes(st.Upper, epoch, epoch))
		} else {
			must(t, os.Link(filepath.Join(st.Upper, up), entry))
		}
	}
	return st
}

// tarLines describes the entries of a tar.
func tarLines(t testing.TB, b []byte) (out []string) {
	t.Helper()
	tr := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		must(t, err)
		line := h.Name
		switch h.Typeflag {
		case tar.TypeLink:
			line += ">" + h.Linkname
		case tar.TypeSymlink:
			line += "@" + h.Linkname
		case tar.TypeReg:
			data, err := io.ReadAll(tr)
			must(t, err)
			if !strings.Contains(h.Name, ".wh.") {
				line += "=" + string(data)
			}
		}
		if h.Mode == 0o600 {
			line += " 600"
		}
		for k := range h.PAXRecords {
			if strings.HasPrefix(k, paxXattr) {
				line += " " + k
			}
		}
		out = append(out, line)
	}
}

// viewLines describes all objects of a union, with their hard links.
func viewLines(t testing.TB, v *view) (out []string) {
	t.Helper()
	groups := map[linkKey]string{}
	root, err := v.root()
	must(t, err)
	must(t, v.walk(root, func(n *vnode) error {
		fd, err := v.open(n)
		if err != nil {
			return err
		}
		defer fsat.Close(fd)
		a, st, err := v.attrsOf(n, fd)
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%q %o %s", n.path, st.Mode&unix.S_IFMT, a)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data := fd
			if n.meta {
				if data, err = v.openData(n); err != nil {
					return err
				}
				defer fsat.Close(data)
			}
			b, err := os.ReadFile(fsat.ProcPath(data))
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %q", b)
		case unix.S_IFLNK:
			to, err := fsat.Readlink(fd, "")
			if err != nil {
				return err
			}
			line += " @" + to
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" %x", st.Rdev)
		}
		if !n.isDir() && (st.Nlink > 1 || n.entry != "") {
			k := linkKey{n.layer, st.Dev, st.Ino}
			if first := groups[k]; first != "" {
				line += " >" + first
			} else {
				groups[k] = n.path
			}
		}
		out = append(out, line)
		return nil
	}))
	return out
}

// indirectCases are uppers that refer to the layers below, and what they mean.
var indirectCases = []struct {
	name   string
	lowers [][]string
	upper  []string
	index  []string
	tar    []string
	diff   []string
}{
	{
		"renamed directory",
		[][]string{{"a/", "a/f=1", "a/sub/", "a/sub/g=2", "a/sub/l@g"}},
		[]string{"a!", "b/ redirect=/a", "b/new=3"},
		nil,
		[]string{"./", ".wh.a", "b/", "b/f=1", "b/new=3", "b/sub/", "b/sub/g=2", "b/sub/l@g"},
		[]string{"D /a", "A /b", "A /b/f", "A /b/new", "A /b/sub", "A /b/sub/g", "A /b/sub/l"},
	},
	{
		"redirect to a name beside it",
		[][]string{{"p/", "p/a/", "p/a/f=1"}, {"a/", "a/wrong=0"}},
		[]string{"p/", "p/a!", "p/b/ redirect=a"},
		nil,
		[]string{"./", "p/", "p/.wh.a", "p/b/", "p/b/f=1"},
		[]string{"C /p", "D /p/a", "A /p/b", "A /p/b/f"},
	},
	{
		"a name beside it, in a renamed directory",
		[][]string{{"p/", "p/a/", "p/a/f=1", "q/", "q/a/", "q/a/wrong=0"}},
		[]string{"p!", "q/ redirect=/p", "q/a!", "q/b/ redirect=a"},
		nil,
		[]string{"./", ".wh.p", "q/", "q/.wh..wh..opq", "q/b/", "q/b/f=1"},
		[]string{"D /p", "C /q", "D /q/a", "A /q/b", "A /q/b/f"},
	},
	{
		"the lowers have the new name",
		[][]string{{"a/", "a/f=1", "a/both=2", "b/", "b/both=3", "b/x=4"}},
		[]string{"a!", "b/ redirect=/a"},
		nil,
		[]string{"./", ".wh.a", "b/", "b/.wh..wh..opq", "b/both=2", "b/f=1"},
		[]string{"D /a", "C /b", "C /b/both", "A /b/f", "D /b/x"},
	},
	{
		"the lowers have a file of the new name",
		[][]string{{"a/", "a/f=1", "b=2"}},
		[]string{"a!", "b/ redirect=/a"},
		nil,
		[]string{"./", ".wh.a", "b/", "b/.wh..wh..opq", "b/f=1"},
		[]string{"D /a", "C /b", "A /b/f"},
	},
	{
		"two directories have changed places",
		[][]string{{"a/", "a/f=1", "b/", "b/g=2"}},
		[]string{"a/ redirect=/b", "b/ redirect=/a"},
		nil,
		[]string{"./", "a/", "a/.wh..wh..opq", "a/g=2", "b/", "b/.wh..wh..opq", "b/f=1"},
		[]string{"C /a", "D /a/f", "A /a/g", "C /b", "A /b/f", "D /b/g"},
	},
	{
		"renamed and back again",
		[][]string{{"a/", "a/f=1", "a/g=2"}},
		[]string{"a/ redirect=/a", "a/g=3"},
		nil,
		[]string{"./", "a/", "a/g=3"},
		[]string{"C /a", "C /a/g"},
	},
	{
		"opaque comes before redirect",
		[][]string{{"a/", "a/f=1"}},
		[]string{"b/ redirect=/a opaque", "b/g=2"},
		nil,
		[]string{"./", "b/", "b/.wh..wh..opq", "b/g=2"},
		[]string{"A /b", "A /b/g"},
	},
	{
		"nothing at the target",
		[][]string{{"b/", "b/x=1"}},
		[]string{"b/ redirect=/a/b", "b/g=2"},
		nil,
		[]string{"./", "b/", "b/.wh..wh..opq", "b/g=2"},
		[]string{"C /b", "A /b/g", "D /b/x"},
	},
	{
		"a file, or a link, at the target",
		[][]string{{"a=1", "d/", "d/s/", "d/s/f=1", "l@d"}},
		[]string{"b/ redirect=/a", "c/ redirect=/l/s", "e/ redirect=/l"},
		nil,
		[]string{"./", "b/", "c/", "e/"},
		[]string{"A /b", "A /c", "A /e"},
	},
	{
		"the target is of several layers",
		[][]string{{"a/", "a/x!", "a/s/ opaque", "a/s/n=1"}, {"a/", "a/x=2", "a/y=3", "a/s/", "a/s/o=4", "a/z/"}, {"a/", "a/x=5", "a/w=6", "a/z/", "a/z/f=7"}},
		[]string{"a!", "b/ redirect=/a", "b/y!"},
		nil,
		[]string{"./", ".wh.a", "b/", "b/s/", "b/s/n=1", "b/w=6", "b/z/", "b/z/f=7"},
		[]string{"D /a", "A /b", "A /b/s", "A /b/s/n", "A /b/w", "A /b/z", "A /b/z/f"},
	},
	{
		"the target was deleted, or hidden, in the lowers",
		[][]string{{"a!", "d/ opaque"}, {"a/", "a/f=1", "d/", "d/a/", "d/a/f=1"}},
		[]string{"b/ redirect=/a", "c/ redirect=/d/a"},
		nil,
		[]string{"./", "b/", "c/"},
		[]string{"A /b", "A /c"},
	},
	{
		"renamed out of a renamed directory",
		[][]string{{"a/", "a/s/", "a/s/f=1", "a/s/t/", "a/s/t/g=2"}},
		[]string{"a!", "b/ redirect=/a", "b/s!", "c/", "c/s/ redirect=/a/s", "c/s/t!", "t/ redirect=/a/s/t"},
		nil,
		[]string{"./", ".wh.a", "b/", "c/", "c/s/", "c/s/f=1", "t/", "t/g=2"},
		[]string{"D /a", "A /b", "A /c", "A /c/s", "A /c/s/f", "A /t", "A /t/g"},
	},
	{
		"metacopied files",
		[][]string{{"f=data", "g=more", "d/", "d/h=third", "d/i=fourth"}, {"d/", "d/below=fifth"}},
		[]string{"f=data metacopy", "g!", "n=more metacopy redirect=/g", "d/", "d/h!", "d/j=third metacopy redirect=h", "d/below=fifth metacopy"},
		nil,
		[]string{"./", ".wh.g", "d/", "d/.wh.h", "d/below=fifth 600", "d/j=third 600", "f=data 600", "n=more 600"},
		[]string{"C /d", "C /d/below", "D /d/h", "A /d/j", "C /f", "D /g", "A /n"},
	},
	{
		"metacopied files in a renamed directory",
		[][]string{{"a/", "a/f=data", "a/g=more"}},
		[]string{"a!", "b/ redirect=/a", "b/f=data metacopy", "b/g!", "b/h=more metacopy redirect=g"},
		nil,
		[]string{"./", ".wh.a", "b/", "b/f=data 600", "b/h=more 600"},
		[]string{"D /a", "A /b", "A /b/f", "A /b/h"},
	},
	{
		"hard links of a metacopied file",
		[][]string{{"f=data"}},
		[]string{"f=data metacopy redirect=/f", "d/", "d/g>f"},
		nil,
		[]string{"./", "d/", "d/g=data 600", "f>d/g 600"},
		[]string{"A /d", "A /d/g", "C /f"},
	},
	{
		"a copied-up file shows under its other hard links",
		[][]string{{"x=1", "y>x", "d/", "d/e/", "d/e/z>x", "d/other=2"}},
		[]string{"y=3"},
		[]string{"y=x"},
		[]string{"./", "d/", "d/e/", "d/e/z=3", "x>d/e/z", "y>d/e/z"},
		[]string{"C /d", "C /d/e", "C /d/e/z", "C /x", "C /y"},
	},
	{
		"some of the hard links are deleted",
		[][]string{{"x=1", "y>x", "z>x", "w>x"}},
		[]string{"x=3", "y!", "w!"},
		[]string{"-x=x"},
		[]string{"./", ".wh.w", ".wh.y", "x=3", "z>x"},
		[]string{"D /w", "C /x", "D /y", "C /z"},
	},
	{
		"a metacopied file shows under its other hard links",
		[][]string{{"x=data", "y>x", "d/", "d/z>x"}},
		[]string{"y=data metacopy redirect=/y", "d/", "d/z!", "w>y"},
		[]string{"y=x"},
		[]string{"./", "d/", "d/.wh.z", "w=data 600", "x>w 600", "y>w 600"},
		[]string{"C /d", "D /d/z", "A /w", "C /x", "C /y"},
	},
	{
		"whiteouts in the form of files",
		[][]string{{"a/", "a/f=1", "a/g=2", "b/", "b/f=3", "c/", "c/f="}},
		[]string{"a/ opaque=x", "a/f= whiteout", "b/ opaque", "b/f= whiteout", "c/", "c/f= whiteout"},
		nil,
		[]string{"./", "a/", "a/.wh.f", "b/", "b/.wh..wh..opq", "c/", "c/f="},
		[]string{"C /a", "D /a/f", "C /b", "D /b/f", "C /c", "C /c/f"},
	},
	{
		"hard links in and out of a renamed directory",
		[][]string{{"a/", "a/x=1", "a/y>a/x", "o/", "o/z>a/x", "o/other=2", "u=3", "v>u"}},
		[]string{"a!", "b/ redirect=/a"},
		nil,
		[]string{"./", ".wh.a", "b/", "b/x=1", "b/y>b/x", "o/", "o/z>b/x"},
		[]string{"D /a", "A /b", "A /b/x", "A /b/y"},
	},
}

func TestIndirectUppersBecomePlainLayers(t *testing.T) {
	s := openStore(t)
	for name, d := range dialects(t) {
		for _, c := range indirectCases {
			t.Run(name+"/"+c.name, func(t *testing.T) {
				st := stackDirs(t, d, c.lowers, c.upper, c.index...)
				var buf bytes.Buffer
				_, err := writeUpper(t.Context(), &buf, st)
				must(t, err)
				lines := tarLines(t, buf.Bytes())
				if d := gocmp.Diff(c.tar, lines); d != "" {
					t.Errorf("layer: %s", d)
				}
				changes, err := diffStack(t.Context(), st)
				must(t, err)
				var diff []string
				for _, x := range changes {
					diff = append(diff, x.Kind+" "+x.Path)
				}
				if d := gocmp.Diff(c.diff, diff); d != "" {
					t.Errorf("diff: %s", d)
				}
				sameTree(t, s, st, buf.Bytes())
			})
		}
	}
}

// sameTree checks that a layer on the lowers shows what the upper shows.
func sameTree(t testing.TB, s *Store, st Stack, layer []byte) {
	t.Helper()
	tars := [][]byte{layer}
	for i, l := range st.Lowers {
		var buf bytes.Buffer
		_, err := writeUpper(t.Context(), &buf, Stack{Upper: l.Path, Dialect: l.Dialect, Override: l.Override, Lowers: st.Lowers[i+1:]})
		must(t, err)
		tars = append(tars, buf.Bytes())
	}
	slices.Reverse(tars)
	made := loadLayers(t, s, tars...)
	union, err := openUnion(t.Context(), st)
	must(t, err)
	defer union.Close()
	plain, err := openView(t.Context(), made.Lowers)
	must(t, err)
	defer plain.Close()
	if d := gocmp.Diff(viewLines(t, union), viewLines(t, plain)); d != "" {
		t.Errorf("the layer on the lowers shows something else than the upper: %s", d)
	}
}

func TestMissingDataIsAnError(t *testing.T) {
	for name, d := range dialects(t) {
		for _, c := range []struct {
			name   string
			lowers [][]string
			upper  []string
			says   string
			is     error
		}{
			{"no such file", [][]string{{"g=data"}}, []string{"d/", "d/f=data metacopy"}, `"/d/f"`, ErrCorrupt},
			{"deleted", [][]string{{"f!"}, {"f=data"}}, []string{"f=data metacopy"}, `"/f"`, ErrCorrupt},
			{"a directory", [][]string{{"g/"}}, []string{"f=data metacopy redirect=/g"}, "no regular file", ErrCorrupt},
			{"shorter", [][]string{{"f=dat"}}, []string{"f=data metacopy"}, "3 bytes instead of 4", ErrCorrupt},
			{"empty", [][]string{{}}, []string{"f= metacopy"}, `"/f"`, ErrCorrupt},
			{"has none itself", [][]string{{"f=data metacopy"}, {"f=data"}}, []string{"f=data metacopy"}, "metacopy", ErrUnsupported},
			{"malformed redirect", [][]string{{}}, []string{"d/ redirect=a/../b"}, `"/d"`, whiteout.ErrMalformed},
		} {
			t.Run(name+"/"+c.name, func(t *testing.T) {
				st := stackDirs(t, d, c.lowers, c.upper)
				_, err := writeUpper(t.Context(), io.Discard, st)
				if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("commit: %v", err)
				}
				if c.is == whiteout.ErrMalformed {
					return
				}
				// It has changed all the same.
				if _, err := diffStack(t.Context(), st); err != nil {
					t.Errorf("diff: %v", err)
				}
			})
		}
	}
}

// TestImagesCannotRefer: a layer that says it has its content elsewhere shows
// nothing of what is there, neither by itself nor below a container.
func TestImagesCannotRefer(t *testing.T) {
	forged := map[string]string{}
	for _, d := range []whiteout.Dialect{whiteout.Overlay, whiteout.UserXattr} {
		forged[d.Attr("redirect")], forged[d.Attr("metacopy")] = "/secret", ""
	}
	ofFile := map[string]string{}
	for k, v := range forged {
		ofFile[k] = strings.Replace(v, "/secret", "/secret/key", 1)
	}
	s := openStore(t)
	secret := layerTar(t, dir("."), dir("secret"), file("secret/key", "s3cret"), dir("d"), file("d/below", "1"))
	evil := layerTar(t, ent{name: "d/", typ: tar.TypeDir, mode: 0o755, x: forged},
		ent{name: "e/", typ: tar.TypeDir, mode: 0o755, x: forged}, ent{name: "f", data: "......", mode: 0o644, x: ofFile})
	load(t, s, outerTar(t, oldDocker(t, img{refs: []string{"evil"}, layers: [][]byte{secret, evil}})))
	create(t, s, "evil", "c")
	st := upperOf(t, s, "c")
	for _, l := range st.Lowers {
		must(t, filepath.WalkDir(l.Path, func(p string, _ os.DirEntry, err error) error {
			for _, a := range []string{"redirect", "metacopy"} {
				if _, gerr := unix.Lgetxattr(p, l.Dialect.Attr(a), nil); !errors.Is(gerr, unix.ENODATA) && !errors.Is(gerr, unix.EPERM) {
					t.Errorf("%s has %s: %v", p, l.Dialect.Attr(a), gerr)
				}
			}
			return err
		}))
	}
	for _, name := range []string{"evil", "c"} {
		var buf bytes.Buffer
		must(t, s.Export(t.Context(), name, &buf))
		var got []string
		tr := tar.NewReader(&buf)
		for {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			must(t, err)
			b, err := io.ReadAll(tr)
			must(t, err)
			if strings.Contains("def", h.Name[:1]) && !strings.HasPrefix(h.Name, "dev") && !strings.HasPrefix(h.Name, "etc") {
				got = append(got, h.Name+"="+string(b))
			}
			// As they came in.
			if v := h.PAXRecords[paxXattr+"trusted.overlay.redirect"]; h.Name == "f" && v != ofFile["trusted.overlay.redirect"] && os.Geteuid() == 0 {
				t.Errorf("the redirect of f became %q", v)
			}
		}
		if d := gocmp.Diff([]string{"d/=", "d/below=1", "e/=", "f=......"}, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
	clean(t, s)
}
