package layers

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/metadata"
)

// put writes a file of a store that a test makes by hand.
func put(t testing.TB, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// hexID is an ID of 64 digits.
func hexID(c string) string { return strings.Repeat(c, 64/len(c)) }

// spliced makes the record that Docker keeps of a tar.
func spliced(t testing.TB, tarball []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	zw := gzip.NewWriter(&buf)
	r, done, err := asm.NewInputTarStreamWithDone(bytes.NewReader(tarball), storage.NewJSONPacker(zw), nil)
	if err == nil {
		_, err = io.Copy(io.Discard, r)
		err = errors.Join(err, <-done)
	}
	if err := errors.Join(err, zw.Close()); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// aufsTree lays out entries as aufs has them on disk.
func aufsTree(t testing.TB, dir string, ents ...ent) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, e := range ents {
		p := filepath.Join(dir, e.name)
		var err error
		switch {
		case strings.HasSuffix(e.name, "/"):
			err = os.MkdirAll(p, 0o755)
		case e.typ == '2':
			err = os.Symlink(e.link, p)
		case e.typ == '1':
			err = os.Link(filepath.Join(dir, e.link), p)
		default:
			put(t, p, e.data)
		}
		if err != nil {
			t.Fatal(err)
		}
		ts := []unix.Timespec{timespec(epoch), timespec(epoch)}
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, p, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			t.Fatal(err)
		}
	}
}

// trace is everything stat(2) says about a tree, change times included.
func trace(t testing.TB, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(p, &st)
		}
		fmt.Fprintln(&b, p, st.Mode, st.Uid, st.Size, st.Ino, st.Nlink, st.Ctim, st.Mtim)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// contents lists what a stack shows: names and the content of files.
func contents(t testing.TB, st Stack) string {
	t.Helper()
	v, err := openView(t.Context(), st.Lowers)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	root, err := v.root()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	err = v.walk(root, func(n *vnode) error {
		line := "/" + n.path
		switch n.st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			line = strings.TrimSuffix(line, "/") + "/"
		case unix.S_IFREG:
			fd, err := v.open(n)
			if err != nil {
				return err
			}
			b, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", fd))
			unix.Close(fd)
			if err != nil {
				return err
			}
			line += "=" + string(b)
		}
		out = append(out, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, " ")
}

func adopt(t testing.TB, s *Store, path string, o AdoptOptions) *AdoptReport {
	t.Helper()
	rep, err := s.Adopt(context.Background(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

func shows(t testing.TB, s *Store, ref, want string) {
	t.Helper()
	st, err := s.ImageStack(context.Background(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if got := contents(t, st); got != want {
		t.Errorf("%s shows\n%s\nexpected\n%s", ref, got, want)
	}
}

func skipped(rep *AdoptReport) string {
	var out []string
	for _, s := range rep.Skipped {
		out = append(out, s.Kind+" "+s.Object+": "+s.Reason)
	}
	return strings.Join(out, "\n")
}

// graphBase is a layer of graphRoot of which there is a record.
var graphBase = []ent{dir("etc"), file("etc/hosts", "hosts"), file("gone", "x"), dir("d"), file("d/old", "old"), sym("link", "etc/hosts"), hard("h2", "gone")}

// graphRoot writes a root of Docker before 1.10, as its documentation describes it.
func graphRoot(t testing.TB) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "docker")
	base, child, empty := hexID("a"), hexID("b"), hexID("c")
	document := func(id, parent, cmd string) string {
		return fmt.Sprintf(`{"id":%q,"parent":%q,"created":"2013-05-01T10:00:00Z","container_config":{"Cmd":["/bin/sh","-c",%q]},"docker_version":"1.9.1","author":"me","config":{"Cmd":["/bin/sh"],"Unknown":1},"architecture":"amd64","os":"linux","Size":7}`, id, parent, cmd)
	}
	put(t, root+"/graph/"+base+"/json", document(base, "", "#(nop) ADD file"))
	put(t, root+"/graph/"+base+"/layersize", "7")
	aufsTree(t, root+"/aufs/diff/"+base, graphBase...)
	put(t, root+"/graph/"+base+"/tar-data.json.gz", string(spliced(t, layerTar(t, graphBase...))))
	put(t, root+"/graph/"+child+"/json", document(child, base, "rm gone"))
	aufsTree(t, root+"/aufs/diff/"+child, file(".wh.gone", ""), dir("d"), file("d/.wh..wh..opq", ""), file("d/new", "new"), dir(".wh..wh.plnk"), file(".wh..wh.aufs", ""))
	put(t, root+"/graph/"+empty+"/json", document(empty, child, "#(nop) CMD x"))
	aufsTree(t, root+"/aufs/diff/"+empty)
	put(t, root+"/aufs/layers/"+child, base+"\n")
	// An orphan, a document that is none, a directory without content, a temporary one.
	put(t, root+"/graph/"+hexID("d")+"/json", document(hexID("d"), hexID("e"), "x"))
	aufsTree(t, root+"/aufs/diff/"+hexID("d"))
	put(t, root+"/graph/"+hexID("f")+"/json", `{"id":`)
	put(t, root+"/graph/"+hexID("1")+"/json", document(hexID("1"), "", "x"))
	put(t, root+"/graph/_tmp/x", "")
	// A container, which has the ID of its layer.
	put(t, root+"/containers/"+hexID("7")+"/config.json", fmt.Sprintf(`{"ID":%q,"Name":"/old_box","Image":%q,"Created":"2013-06-01T00:00:00Z","Config":{"Image":"me/app:1"}}`, hexID("7"), empty))
	aufsTree(t, root+"/aufs/diff/"+hexID("7"), file("made", "here"), file(".wh.link", ""))
	put(t, root+"/repositories-aufs", fmt.Sprintf(`{"Repositories":{"ubuntu":{"14.04":%q,"latest":%q},"me/app":{"1":%q},"host:5000/x":{"1":%q},"lost":{"1":%q}}}`,
		child, child, empty, base, hexID("9")))
	return root
}

const graphTree = "/ /d/ /d/new=new /etc/ /etc/hosts=hosts /h2=x /link"

func TestAdoptGraph(t *testing.T) {
	needRoot(t)
	for _, mode := range []string{AdoptReference, AdoptCopy} {
		t.Run(mode, func(t *testing.T) {
			root := graphRoot(t)
			before := trace(t, root)
			s := openStore(t)
			rep := adopt(t, s, root, AdoptOptions{Mode: mode})
			if len(rep.Images) != 3 {
				t.Errorf("%d images: %+v", len(rep.Images), rep)
			}
			for _, want := range []string{
				"image dddddddddddd: its ancestor eeeeeeeeeeee: damaged: graph ID " + hexID("e") + " does not exist",
				"image ffffffffffff: json: damaged", "image 111111111111: damaged: its directory aufs/diff/" + hexID("1") + " is missing",
				"reference lost:1: damaged: graph ID " + hexID("9") + " does not exist",
			} {
				if !strings.Contains(skipped(rep), want) {
					t.Errorf("not reported: %s\n%s", want, skipped(rep))
				}
			}
			for _, ref := range []string{"ubuntu", "ubuntu:14.04", "me/app:1"} {
				shows(t, s, ref, graphTree)
			}
			shows(t, s, "host:5000/x:1", "/ /d/ /d/old=old /etc/ /etc/hosts=hosts /gone=x /h2=x /link")

			// The rules of Docker's migration.
			img, err := s.Inspect(t.Context(), "ubuntu")
			if err != nil {
				t.Fatal(err)
			}
			ids, _ := json.Marshal(img.DiffIDs)
			config := fmt.Sprintf(`{"architecture":"amd64","author":"me","config":{"Cmd":["/bin/sh"],"Unknown":1},"container_config":{"Cmd":["/bin/sh","-c","rm gone"]},"created":"2013-05-01T10:00:00Z","docker_version":"1.9.1","history":[{"created":"2013-05-01T10:00:00Z","author":"me","created_by":"/bin/sh -c #(nop) ADD file"},{"created":"2013-05-01T10:00:00Z","author":"me","created_by":"/bin/sh -c rm gone"}],"os":"linux","rootfs":{"type":"layers","diff_ids":%s}}`, ids)
			if string(img.RawConfig) != config || img.ID != digest.FromString(config) {
				t.Errorf("config %s\nexpected %s", img.RawConfig, config)
			}
			if p, err := s.ResolveImage(t.Context(), "host:5000/x:1"); err != nil || img.Parent != p.ID {
				t.Errorf("parent %s, expected %s %v", img.Parent, p.ID, err)
			}
			if want := digest.FromBytes(layerTar(t, graphBase...)); img.DiffIDs[0] != want {
				t.Errorf("diffID %s, its record says %s", img.DiffIDs[0], want)
			}
			// The empty layer is the one that everybody knows.
			if app, err := s.Inspect(t.Context(), "me/app:1"); err != nil || app.DiffIDs[2] != "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef" {
				t.Errorf("empty layer: %v %v", app.DiffIDs, err)
			}
			var saved bytes.Buffer
			if err := s.Save(t.Context(), &saved, []string{"me/app:1"}, SaveOptions{}); err != nil {
				t.Fatal(err)
			}
			other := openStore(t)
			if l := load(t, other, saved.Bytes()); l[0].ID == "" {
				t.Error("not loaded")
			}
			shows(t, other, "me/app:1", graphTree)
			if c, err := s.Container(t.Context(), "old_box"); err != nil || c.ID != hexID("7") {
				t.Errorf("container %+v %v", c, err)
			} else if st, err := s.ContainerStack(t.Context(), c.ID); err != nil {
				t.Error(err)
			} else if got := contents(t, Stack{Lowers: st.Lowers[1:]}); got != "/ /d/ /d/new=new /etc/ /etc/hosts=hosts /h2=x /made=here" {
				t.Errorf("container shows %s", got)
			}
			clean(t, s)
			again := adopt(t, s, root, AdoptOptions{Mode: mode})
			if again.Copied+again.Referenced != 0 || again.Present != 3 || !again.Images[0].Present {
				t.Errorf("adopted again: %+v", again)
			}
			if after := trace(t, root); after != before {
				t.Errorf("the source has changed:\n%s", after)
			}
		})
	}
}

// registryRoot writes the directory of a registry of version 1.
func registryRoot(t testing.TB) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "registry")
	add := func(id, parent string, ancestry []string, layer []byte, checksum func(doc string, layer []byte) string) {
		doc := fmt.Sprintf(`{"id":%q,"parent":%q,"created":"2014-01-01T00:00:00Z","os":"linux","architecture":"amd64"}`, id, parent)
		list, _ := json.Marshal(ancestry)
		put(t, root+"/images/"+id+"/json", doc)
		put(t, root+"/images/"+id+"/ancestry", string(list))
		put(t, root+"/images/"+id+"/layer", string(layer))
		put(t, root+"/images/"+id+"/_checksum", checksum(doc, layer))
	}
	tarsum := func(string, []byte) string { return `["tarsum+sha256:0123"]` }
	simple := func(doc string, layer []byte) string {
		return fmt.Sprintf("[%q]", digest.FromBytes(append([]byte(doc+"\n"), layer...)))
	}
	wrong := func(string, []byte) string { return fmt.Sprintf("[%q]", digest.FromString("x")) }
	base, top, bad := hexID("a"), hexID("b"), hexID("c")
	add(base, "", []string{base}, gz(t, make([]byte, 1024)), tarsum) // the root of all: an empty tar
	add(top, base, []string{top, base}, gz(t, layerTar(t, file("f", "1"))), simple)
	add(bad, base, []string{bad, base}, gz(t, layerTar(t, file("g", "1"))), wrong)
	add(hexID("d"), base, []string{hexID("d"), top, base}, gz(t, layerTar(t, file("g", "1"))), tarsum)
	for name, id := range map[string]string{"library/app/tag_1": top, "library/app/tag_latest": top, "me/bad/tag_x": bad, "me/lost/tag_x": hexID("9"), "me/odd/tag_x": "../../etc"} {
		put(t, root+"/repositories/"+name, id)
	}
	put(t, root+"/repositories/library/app/_index_images", `[]`)
	put(t, root+"/repositories/library/app/tag1_json", `{"last_update":1}`)
	return root
}

func TestAdoptRegistry(t *testing.T) {
	t.Run("store", func(t *testing.T) { adoptRegistry(t, openStore(t)) })
	t.Run("user", func(t *testing.T) { adoptRegistry(t, userStore(t)) })
}

func adoptRegistry(t *testing.T, s *Store) {
	root := registryRoot(t)
	if _, err := s.Adopt(t.Context(), root, AdoptOptions{}); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "--copy") {
		t.Errorf("by reference: %v", err)
	}
	rep := adopt(t, s, root, AdoptOptions{Mode: AdoptCopy})
	for _, want := range []string{"wrong checksum", "its ancestry and its document do not agree", "me/odd:x", "me/lost:x"} {
		if !strings.Contains(skipped(rep), want) {
			t.Errorf("not reported: %s\n%s", want, skipped(rep))
		}
	}
	shows(t, s, "app:1", "/ /f=1")
	shows(t, s, "app", "/ /f=1")
	img, err := s.ResolveImage(t.Context(), "app")
	if want := digest.FromBytes(layerTar(t, file("f", "1"))); err != nil || len(img.DiffIDs) != 2 || img.DiffIDs[1] != want {
		t.Errorf("diffIDs %v, expected %s last: %v", img.DiffIDs, want, err)
	}
	clean(t, s)
}

// dockerRoot writes a root of Docker since 1.10 with the driver aufs, and returns it
// with the ID of the image.
func dockerRoot(t testing.TB) (root string, id digest.Digest) {
	t.Helper()
	root = filepath.Join(t.TempDir(), "docker")
	if err := os.MkdirAll(root, 0o700); err != nil {
		t.Fatal(err)
	}
	tars := [][]ent{
		{dir("etc"), file("etc/a", "a"), file("gone", "x"), dir("d"), file("d/old", "old"), sym("l", "d"), file("l/through", "a link"), file("./d/dot", "dot")},
		{wh("gone"), dir("d"), opq("d"), file("d/new", "new")},
	}
	var raw [][]byte
	var chain, top digest.Digest
	for i, ents := range tars {
		b := layerTar(t, ents...)
		raw = append(raw, b)
		diff := digest.FromBytes(b)
		top, chain = chain, metadata.ChainID(chain, diff)
		ldb := root + "/image/aufs/layerdb/sha256/" + chain.Encoded()
		put(t, ldb+"/diff", diff.String())
		put(t, ldb+"/size", "5")
		put(t, ldb+"/cache-id", hexID(fmt.Sprint(i+1)))
		put(t, ldb+"/tar-split.json.gz", string(spliced(t, b)))
		if top != "" {
			put(t, ldb+"/parent", top.String())
		}
		aufsTree(t, root+"/aufs/diff/"+hexID(fmt.Sprint(i+1)), ents...)
	}
	config := img{layers: raw}.configJSON(t)
	id = digest.FromBytes(config)
	put(t, root+"/image/aufs/imagedb/content/sha256/"+id.Encoded(), string(config))
	put(t, root+"/image/aufs/repositories.json", fmt.Sprintf(`{"Repositories":{"app":{"app:1":%q,"app:2":%q,"app@sha256:%s":%q}}}`, id, id, hexID("5"), id))
	cid := hexID("7")
	put(t, root+"/image/aufs/layerdb/mounts/"+cid+"/mount-id", hexID("8"))
	put(t, root+"/image/aufs/layerdb/mounts/"+cid+"/init-id", hexID("8")+"-init")
	put(t, root+"/image/aufs/layerdb/mounts/"+cid+"/parent", chain.String())
	put(t, root+"/containers/"+cid+"/config.v2.json", fmt.Sprintf(`{"ID":%q,"Name":"/box","Image":%q,"Created":"2016-01-01T00:00:00Z","State":{"Running":true},"Config":{"Image":"app:1"}}`, cid, id))
	aufsTree(t, root+"/aufs/diff/"+hexID("8"), file("made", "here"), file(".wh.l", ""))
	return root, id
}

// TestAdoptGraphTrees: a graph of Docker 1.8 and 1.9, whose driver keeps whole trees, and
// which has records of tars.
func TestAdoptGraphTrees(t *testing.T) {
	needRoot(t)
	root := filepath.Join(t.TempDir(), "docker")
	base := layerTar(t, dir("d"), file("d/a", "a"), file("gone", "x"))
	top := layerTar(t, wh("gone"), file("new", "n"))
	for id, l := range map[string]struct {
		tar    []byte
		parent string
		tree   []ent
	}{
		hexID("a"): {base, "", []ent{dir("d"), file("d/a", "a"), file("gone", "x")}},
		hexID("b"): {top, hexID("a"), []ent{dir("d"), file("d/a", "a"), file("new", "n")}},
	} {
		// Docker 1.9 has the parent in a file, and a content ID in the document.
		put(t, root+"/graph/"+id+"/json", fmt.Sprintf(`{"id":%q,"parent_id":"sha256:%s","created":"2015-01-01T00:00:00Z"}`, id, hexID("0")))
		put(t, root+"/graph/"+id+"/parent", l.parent)
		put(t, root+"/graph/"+id+"/tar-data.json.gz", string(spliced(t, l.tar)))
		aufsTree(t, root+"/vfs/dir/"+id, l.tree...)
	}
	put(t, root+"/graph/"+hexID("a")+"/json", fmt.Sprintf(`{"id":%q,"created":"2015-01-01T00:00:00Z"}`, hexID("a")))
	put(t, root+"/repositories-vfs", fmt.Sprintf(`{"Repositories":{"app":{"1":%q,"sha256:%s":%q}}}`, hexID("b"), hexID("5"), hexID("b")))
	s := openStore(t)
	if _, err := s.Adopt(t.Context(), root, AdoptOptions{}); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "whole trees") {
		t.Errorf("by reference: %v", err)
	}
	adopt(t, s, root, AdoptOptions{Mode: AdoptCopy})
	shows(t, s, "app:1", "/ /d/ /d/a=a /new=n")
	img, err := s.ResolveImage(t.Context(), "app@sha256:"+hexID("5"))
	if want := []digest.Digest{digest.FromBytes(base), digest.FromBytes(top)}; err != nil || !slices.Equal(img.DiffIDs, want) {
		t.Errorf("diffIDs %v, expected %v: %v", img.DiffIDs, want, err)
	}
	clean(t, s)
}

func TestAdoptDocker(t *testing.T) {
	needRoot(t)
	root, id := dockerRoot(t)
	before := trace(t, root)
	for _, o := range []AdoptOptions{{}, {Verify: true}, {Mode: AdoptCopy}} {
		s := openStore(t)
		if rep := adopt(t, s, root, AdoptOptions{Mode: o.Mode, DryRun: true}); len(rep.Images) != 1 || len(rep.Containers) != 1 {
			t.Errorf("dry run: %+v", rep)
		}
		if n := len(listLayers(t, s)); n != 0 {
			t.Errorf("%d layers after a dry run", n)
		}
		rep := adopt(t, s, root, o)
		if len(rep.Skipped) > 0 {
			t.Errorf("skipped: %s", skipped(rep))
		}
		img, err := s.ResolveImage(t.Context(), "app:2")
		if want := []string{"app:1", "app:2", "app@sha256:" + hexID("5")}; err != nil || img.ID != id || !slices.Equal(img.Refs, want) {
			t.Errorf("image %+v, expected %s %v: %v", img, id, want, err)
		}
		shows(t, s, "app:1", "/ /d/ /d/new=new /etc/ /etc/a=a /l")
		c, err := s.Container(t.Context(), "box")
		if err != nil || c.ID != hexID("7") || c.ImageName != "app:1" {
			t.Fatalf("container %+v %v", c, err)
		}
		st, err := s.ContainerStack(t.Context(), "box")
		if err != nil {
			t.Fatal(err)
		}
		if got := contents(t, Stack{Lowers: st.Lowers[1:]}); got != "/ /d/ /d/new=new /etc/ /etc/a=a /made=here" {
			t.Errorf("container shows %s", got)
		}
		if list, err := s.Images(t.Context(), ""); err != nil || len(list) != 2 {
			t.Errorf("images: %+v %v", list, err)
		}
		// A commit has what was written before and after.
		put(t, st.Upper+"/after", "now")
		if _, err := s.Commit(t.Context(), "box", "more:1", CommitOptions{}); err != nil {
			t.Fatal(err)
		}
		shows(t, s, "more:1", "/ /after=now /d/ /d/new=new /etc/ /etc/a=a /made=here")
		if h, err := s.History(t.Context(), "more:1"); err != nil || len(h) != 4 || !strings.Contains(h[1].CreatedBy, "adopt") || h[1].Size != 4 {
			t.Errorf("history %+v %v", h, err)
		}
		if _, err := s.RemoveImage(t.Context(), "more:1", RemoveOptions{}); err != nil {
			t.Fatal(err)
		}
		clean(t, s)
		// Nothing of the other store is counted, and nothing of it removed.
		du, err := s.DiskUsage(t.Context())
		if err != nil || (du.Adopted > 0) != (o.Mode != AdoptCopy) {
			t.Errorf("disk usage %+v %v", du, err)
		}
		if err := s.RemoveContainer(t.Context(), "box"); err != nil {
			t.Fatal(err)
		}
		if _, err := s.GC(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		if _, err := s.RemoveImage(t.Context(), id.String(), RemoveOptions{Force: true}); err != nil {
			t.Fatal(err)
		}
		if n := len(listLayers(t, s)); n != 0 {
			t.Errorf("%d layers left", n)
		}
		clean(t, s)
	}
	if after := trace(t, root); after != before {
		t.Errorf("the source has changed:\n%s", after)
	}
}

func TestAdoptNothing(t *testing.T) {
	s := openStore(t)
	for name, c := range map[string]struct {
		dir  string
		want error
		text string
	}{
		"empty":        {"", ErrInvalid, "expected the root of Docker"},
		"devicemapper": {"devicemapper", ErrUnsupported, "devicemapper"},
		"btrfs":        {"image/btrfs/layerdb", ErrUnsupported, "btrfs"},
		"zfs":          {"zfs-images", ErrUnsupported, "zfs"},
	} {
		root := t.TempDir()
		if err := os.MkdirAll(filepath.Join(root, c.dir), 0o755); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Adopt(t.Context(), root, AdoptOptions{}); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Adopt(t.Context(), s.Root(), AdoptOptions{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("the store itself: %v", err)
	}
}

// TestAdoptReadOnly: a store on a read-only mount.
func TestAdoptReadOnly(t *testing.T) {
	needRoot(t)
	root, _ := dockerRoot(t)
	mnt := t.TempDir()
	if err := unix.Mount(root, mnt, "", unix.MS_BIND, ""); err != nil {
		t.Skip("no bind mounts here: ", err)
	}
	defer func() {
		if err := unix.Unmount(mnt, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	if err := unix.Mount("", mnt, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	s := openStore(t)
	if rep := adopt(t, s, mnt, AdoptOptions{Verify: true}); len(rep.Images) != 1 || len(rep.Containers) != 1 {
		t.Errorf("%+v", rep)
	}
	clean(t, s)
}

// TestAdoptCrash kills a process that adopts a store at every step. What is done stays,
// what is not is swept, and adopting again gives the rest.
func TestAdoptCrash(t *testing.T) {
	needRoot(t)
	source, id := dockerRoot(t)
	before := trace(t, source)
	for _, role := range []string{"adopt", "adopt-copy"} {
		for _, point := range []string{
			"after-ingest-row", "before-sync", "after-sync", "before-index-sync", "after-index", "after-rename", "after-dirsync", "after-row",
			"after-container-row", "after-container-rename",
		} {
			t.Run(role+" "+point, func(t *testing.T) {
				root := filepath.Join(t.TempDir(), "store")
				s := openAt(t, root)
				c := start(t, role, root, source, point)
				_ = c.Wait()
				if c.ProcessState.ExitCode() != diedCode {
					t.Fatalf("the helper did not reach the point: %v", c.ProcessState)
				}
				o := AdoptOptions{}
				if role == "adopt-copy" {
					o.Mode = AdoptCopy
				}
				if rep := adopt(t, s, source, o); len(rep.Images) != 1 || len(rep.Containers) != 1 || len(rep.Skipped) > 0 {
					t.Errorf("adopted again: %+v", rep)
				}
				if img, err := s.ResolveImage(t.Context(), "app:1"); err != nil || img.ID != id {
					t.Errorf("%+v %v", img, err)
				}
				clean(t, s)
			})
		}
	}
	if after := trace(t, source); after != before {
		t.Error("the source has changed")
	}
}

// overlayRoot writes a root of Docker with overlay2 that has an image of one layer and
// a container, and returns the layer's directory and the container's upper.
func overlayRoot(t testing.TB) (root, layer, upper string) {
	t.Helper()
	root = filepath.Join(t.TempDir(), "docker")
	must(t, os.MkdirAll(root, 0o700))
	b := layerTar(t, dir("d"), file("d/a", "aa"), file("d/b", "bb"), dir("e"), file("f", "data"))
	diff := digest.FromBytes(b)
	ldb := root + "/image/overlay2/layerdb/sha256/" + diff.Encoded()
	put(t, ldb+"/diff", diff.String())
	put(t, ldb+"/cache-id", hexID("1"))
	put(t, ldb+"/tar-split.json.gz", string(spliced(t, b)))
	layer, upper = root+"/overlay2/"+hexID("1")+"/diff", root+"/overlay2/"+hexID("8")+"/diff"
	aufsTree(t, layer, dir("d"), file("d/a", "aa"), file("d/b", "bb"), dir("e"), file("f", "data"))
	config := img{layers: [][]byte{b}}.configJSON(t)
	id := digest.FromBytes(config)
	put(t, root+"/image/overlay2/imagedb/content/sha256/"+id.Encoded(), string(config))
	put(t, root+"/image/overlay2/repositories.json", fmt.Sprintf(`{"Repositories":{"app":{"app:1":%q}}}`, id))
	cid := hexID("7")
	put(t, root+"/image/overlay2/layerdb/mounts/"+cid+"/mount-id", hexID("8"))
	put(t, root+"/image/overlay2/layerdb/mounts/"+cid+"/parent", diff.String())
	put(t, root+"/containers/"+cid+"/config.v2.json", fmt.Sprintf(`{"Name":"/box","Image":%q}`, id))
	must(t, os.MkdirAll(upper, 0o755))
	return root, layer, upper
}

// TestAdoptRedirect: what the kernel has written into the upper of a container is
// believed, and becomes a plain layer; what is in the layer of an image is not.
func TestAdoptRedirect(t *testing.T) {
	needRoot(t)
	set := func(path, attr, value string) {
		t.Helper()
		must(t, unix.Lsetxattr(path, "trusted.overlay."+attr, []byte(value), 0))
	}
	root, layer, upper := overlayRoot(t)
	must(t, os.Mkdir(upper+"/moved", 0o755))
	set(upper+"/moved", "redirect", "/d")
	must(t, unix.Mknod(upper+"/d", unix.S_IFCHR, 0))
	must(t, unix.Mknod(upper+"/moved/b", unix.S_IFCHR, 0))
	put(t, upper+"/f", "\x00\x00\x00\x00")
	set(upper+"/f", "metacopy", "")
	set(upper+"/f", "origin", "x")
	must(t, os.Chmod(upper+"/f", 0o600))
	const want = "/ /e/ /f=data /moved/ /moved/a=aa"
	before := trace(t, root)
	for _, mode := range []string{AdoptReference, AdoptCopy} {
		s := openStore(t)
		if rep := adopt(t, s, root, AdoptOptions{Mode: mode}); len(rep.Skipped) > 0 || mode == AdoptReference && (rep.Referenced != 1 || rep.Copied != 1) {
			t.Errorf("%s: %+v", mode, rep)
		}
		st, err := s.ContainerStack(t.Context(), "box")
		must(t, err)
		if got := contents(t, Stack{Lowers: st.Lowers[1:]}); got != want {
			t.Errorf("%s: the container shows %s, expected %s", mode, got, want)
		}
		clean(t, s)
	}
	if after := trace(t, root); after != before {
		t.Error("the source has changed")
	}

	// Somebody has smuggled them into an image.
	set(layer+"/e", "redirect", "/d")
	s := openStore(t)
	if _, err := s.Adopt(t.Context(), root, AdoptOptions{}); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "redirect") {
		t.Errorf("an image with a redirect: %v", err)
	}
	clean(t, s)
	adopt(t, s, root, AdoptOptions{Mode: AdoptCopy})
	shows(t, s, "app:1", "/ /d/ /d/a=aa /d/b=bb /e/ /f=data")
	clean(t, s)
}

// TestAdoptSettle: a copy of what was adopted by reference takes its place, also below
// containers that have been written to since. Then the other store can go.
func TestAdoptSettle(t *testing.T) {
	needRoot(t)
	root, id := dockerRoot(t)
	s := openStore(t)
	adopt(t, s, root, AdoptOptions{})
	st, err := s.ContainerStack(t.Context(), "box")
	must(t, err)
	put(t, st.Upper+"/since", "written")
	if rep := adopt(t, s, root, AdoptOptions{Mode: AdoptCopy}); rep.Copied != 3 || rep.Present != 0 || len(rep.Skipped) > 0 {
		t.Errorf("%+v", rep)
	}
	must(t, os.RemoveAll(root))
	clean(t, s)
	shows(t, s, "app:1", "/ /d/ /d/new=new /etc/ /etc/a=a /l")
	if st, err = s.ContainerStack(t.Context(), "box"); err != nil {
		t.Fatal(err)
	}
	if got := contents(t, Stack{Lowers: st.Lowers[1:]}); got != "/ /d/ /d/new=new /etc/ /etc/a=a /made=here" {
		t.Errorf("container shows %s", got)
	}
	if b, err := os.ReadFile(st.Upper + "/since"); string(b) != "written" {
		t.Errorf("%q %v", b, err)
	}
	list, err := s.Layers(t.Context(), "")
	must(t, err)
	for _, l := range list {
		if l.Adopted != "" {
			t.Errorf("still elsewhere: %+v", l)
		}
	}
	if du, err := s.DiskUsage(t.Context()); err != nil || du.Adopted != 0 {
		t.Errorf("%+v %v", du, err)
	}
	if img, err := s.ResolveImage(t.Context(), "app:2"); err != nil || img.ID != id {
		t.Errorf("%+v %v", img, err)
	}
}
