package layers

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/override"
)

// imageLines says what a store shows of ownersImage, but for the copies that hard
// links to files of a lower layer have become: nothing tells about them for good.
func imageLines(t testing.TB, s *Store) []string {
	t.Helper()
	st, err := s.ImageStack(t.Context(), "owners")
	must(t, err)
	var b bytes.Buffer
	must(t, s.Export(t.Context(), "owners", &b))
	lines := append(entryLines(t, b.Bytes()), chainLines(t, s, st)...)
	return slices.DeleteFunc(lines, func(l string) bool { return strings.Contains(l, "copy-of") })
}

// TestVirtualLayers: layers without any attribute, as older versions have unpacked
// them, and as they are where the file system has none, show what the tar says.
func TestVirtualLayers(t *testing.T) {
	needRoot(t)
	archive := outerTar(t, oldDocker(t, ownersImage(t)))
	root, s := openStore(t), userStore(t)
	load(t, root, archive)
	want := imageLines(t, root)
	s.powers.override = override.None
	load(t, s, archive)
	clean(t, s)
	sameLines(t, want, imageLines(t, s))
	asUser(t, s) // which now can have attributes

	// An older version let an image have this attribute. Nobody believes it.
	must(t, unix.Setxattr(stackFile(t, s, "hostile"), "user.containers.override_stat", []byte("9:9:0"), 0))
	// An older version's index has the files' owners where the tar says nothing.
	st, err := s.ImageStack(t.Context(), "owners")
	must(t, err)
	for _, d := range st.Lowers {
		if !d.Virtual || d.Override != override.None {
			t.Errorf("%+v", d)
		}
		id, err := s.stackID([]LayerDir{d})
		must(t, err)
		d.Virtual = false
		if real, err := s.stackID([]LayerDir{d}); err != nil || real == id {
			t.Errorf("chain %s of a layer whose files tell everything: %v", real, err)
		}
		w, err := newLayerIndex(d.CacheID, filepath.Dir(d.Path))
		must(t, err)
		l, err := s.openFiles(d.CacheID)
		must(t, err)
		must(t, indexDirectory(t.Context(), l, d, w), w.Commit(indexPath(s, d)))
		l.Close()
	}
	_, err = s.DropChains(t.Context())
	must(t, err)
	sameLines(t, want, imageLines(t, s))
	clean(t, s)

	// What is made of it now has attributes, and the same layer comes out.
	create(t, root, "owners", "c")
	create(t, s, "owners", "c")
	for i, s := range []*Store{root, s} {
		st := upperOf(t, s, "c")
		if i == 1 && (st.Override != override.Containers || st.Lowers[0].Override != override.Containers || !st.Lowers[1].Virtual) {
			t.Errorf("%+v", st)
		}
		mounted{t, st}.change()
	}
	a, err := root.Commit(t.Context(), "c", "", CommitOptions{})
	must(t, err)
	b, err := s.Commit(t.Context(), "c", "", CommitOptions{})
	must(t, err)
	if !slices.Equal(a.DiffIDs, b.DiffIDs) {
		t.Errorf("layers %v, expected %v", b.DiffIDs, a.DiffIDs)
	}
	clean(t, s)
}

// stackFile returns where a file of the lowest layer of ownersImage lies.
func stackFile(t testing.TB, s *Store, name string) string {
	t.Helper()
	st, err := s.ImageStack(t.Context(), "owners")
	must(t, err)
	return filepath.Join(st.Lowers[len(st.Lowers)-1].Path, name)
}

// TestNoAttributes: on a file system without attributes a user's store goes on, and
// shows what the tar says.
func TestNoAttributes(t *testing.T) {
	im := ownersImage(t)
	im.layers = im.layers[:1] // an opaque directory needs an attribute
	if where := os.Getenv("PLYFS_TEST_OWNERS"); where != "" {
		s, err := Open(t.Context(), where, Options{})
		must(t, err)
		defer s.Close()
		if s.powers.override != override.None {
			t.Fatal("the store believes that there are attributes")
		}
		load(t, s, outerTar(t, oldDocker(t, im)))
		lines := imageLines(t, s)
		raw, err := json.Marshal(lines)
		must(t, err, os.WriteFile(os.Getenv("PLYFS_TEST_OUT"), raw, 0o600))
		clean(t, s)
		st, err := s.ImageStack(t.Context(), "owners")
		must(t, err, os.Remove(indexPath(s, st.Lowers[0])))
		_, err = s.DropChains(t.Context())
		must(t, err)
		if d := cmp.Diff(lines, imageLines(t, s)); d != "" {
			t.Errorf("with an index made anew: %s", d)
		}
		return
	}
	needRoot(t)
	root := openStore(t)
	load(t, root, outerTar(t, oldDocker(t, im)))
	exe, dir := testBinary(t)
	mnt := filepath.Join(dir, "tmp")
	if err := unix.Mount("none", mnt, "ramfs", 0, "mode=777"); err != nil {
		t.Skip("needs a ramfs of its own:", err)
	}
	defer func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) }()
	must(t, os.Chmod(mnt, 0o777))
	cmd := exec.Command(exe, "-test.run=^TestNoAttributes$", "-test.v")
	cmd.Dir, cmd.SysProcAttr = dir, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	cmd.Env = append(os.Environ(), "TMPDIR="+mnt, "PLYFS_TEST_OWNERS="+mnt+"/store", "PLYFS_TEST_OUT="+mnt+"/out")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	raw, err := os.ReadFile(mnt + "/out")
	must(t, err)
	var got []string
	must(t, json.Unmarshal(raw, &got))
	sameLines(t, imageLines(t, root), got)
}

// TestInheritedACL: what files of the store inherit from where it lies is none of an
// image's.
func TestInheritedACL(t *testing.T) {
	dir := t.TempDir()
	inherited := []byte(posixACL)
	inherited[6], inherited[len(inherited)-6] = 7, 0 // the owner may do everything, others nothing
	if err := unix.Setxattr(dir, "system.posix_acl_default", inherited, 0); err != nil {
		t.Skip("needs ACLs:", err)
	}
	s, plain := openAt(t, filepath.Join(dir, "store")), userStore(t)
	asUser(t, s)
	for _, s := range []*Store{s, plain} {
		load(t, s, outerTar(t, oldDocker(t, ownersImage(t))))
	}
	if d := cmp.Diff(imageLines(t, plain), imageLines(t, s)); d != "" {
		t.Errorf("- elsewhere, + below an ACL:\n%s", d)
	}
	clean(t, s)
}

// TestSilentLinks: of a copy that a hard link to a symbolic link of a lower layer
// has become, only the first index knows the owner.
func TestSilentLinks(t *testing.T) {
	s := userStore(t)
	st := loadLayers(t, s, layerTar(t, ent{name: "l", typ: tar.TypeSymlink, link: "x", mode: 0o777, uid: 7}, ent{name: "f", mode: 0o4755, uid: 8}),
		layerTar(t, hard("copy", "l"), hard("file", "f")))
	for _, want := range []uint32{7, 0} {
		x, err := s.layerIndex(t.Context(), st.Lowers[0])
		must(t, err)
		if o := objectAt(t, x, "copy"); o.UID != want {
			t.Errorf("owner %d, expected %d", o.UID, want)
		}
		if o := objectAt(t, x, "file"); o.UID != 8 || o.Mode != unix.S_IFREG|0o4755 {
			t.Errorf("%+v", o)
		}
		must(t, x.Close())
		clean(t, s)
		must(t, os.Remove(indexPath(s, st.Lowers[0])))
	}
}

// TestChangedOwner: a deep check compares what files say they are with the tar, and puts
// them right from the layer's own record.
func TestChangedOwner(t *testing.T) {
	for name, value := range map[string]string{"d/highid": "0:0:640", "closed": "0:0:755", "dev/loop": "0:6:660:block-7-1", "d/plain": "0:0:4644"} {
		s := userStore(t)
		load(t, s, outerTar(t, oldDocker(t, ownersImage(t))))
		must(t, unix.Setxattr(stackFile(t, s, name), override.Containers.Attr(), []byte(value), 0))
		for _, repair := range []bool{false, true} {
			rep, err := s.Check(t.Context(), CheckOptions{Deep: true, Repair: repair})
			must(t, err)
			if len(rep.Findings) != 1 || rep.Findings[0].Invariant != "K20" || rep.Findings[0].Fixed != repair || !strings.Contains(rep.Findings[0].Problem, `"/`+name+`"`) {
				t.Errorf("%s: %+v", name, rep.Findings)
			}
		}
		clean(t, s)
	}
}

// TestBadOverride: an upper in which a file says what cannot be is an error with the
// name of the file, and nothing in it is a whiteout that is none on the disk.
func TestBadOverride(t *testing.T) {
	for value, want := range map[string]error{"nonsense": ErrCorrupt, "0:0:0:char-0-0": ErrUnsupported} {
		s := userStore(t)
		load(t, s, outerTar(t, oldDocker(t, ownersImage(t))))
		create(t, s, "owners", "c")
		st := upperOf(t, s, "c")
		p := filepath.Join(st.Upper, "hostile")
		must(t, os.WriteFile(p, nil, 0o600), unix.Setxattr(p, st.Override.Attr(), []byte(value), 0))
		if _, err := s.Commit(t.Context(), "c", "", CommitOptions{}); !errors.Is(err, want) || !strings.Contains(fmt.Sprint(err), "hostile") {
			t.Errorf("%s: %v", value, err)
		}
		if want == ErrCorrupt {
			continue
		}
		changes, err := s.Diff(t.Context(), "c")
		if err != nil || len(changes) != 1 || changes[0] != (Change{"C", "/hostile"}) {
			t.Errorf("%s: %v, %v", value, changes, err)
		}
	}
}

// TestLongNames: an attribute whose name is too long for the prefix is lost, and
// nothing else is.
func TestLongNames(t *testing.T) {
	s := userStore(t)
	long := "trusted." + strings.Repeat("n", 240)
	st := loadLayers(t, s, layerTar(t, ent{name: "f", mode: 0o400, x: map[string]string{long: "1", "trusted.short": "2"}}))
	side, err := func() (Sidecar, error) {
		l, side, err := s.openLayer(st.Lowers[0].CacheID)
		l.Close()
		return side, err
	}()
	must(t, err)
	if !side.Incomplete {
		t.Error("the sidecar does not say that something is lost")
	}
	if l := chainLines(t, s, st); len(l) != 2 || !strings.HasSuffix(l[1], `1 links trusted.short="2"`) {
		t.Errorf("%q", l)
	}
	roundTrip(t, s, img{layers: [][]byte{layerTar(t, ent{name: "f", mode: 0o400, x: map[string]string{long: "1", "trusted.short": "2"}})}})
	clean(t, s)
}

// TestEncodingLaws: whatever name an image gives an attribute, it comes back, and
// reaches none of those that mean something on the disk.
func TestEncodingLaws(t *testing.T) {
	private := []string{"opaque", "whiteout", "redirect", "metacopy", "origin"}
	names := rapid.OneOf(
		rapid.StringMatching(`(user|trusted|security|system)\.[a-z._]{1,20}`),
		rapid.StringMatching(`(user\.containers\.override_){0,2}(trusted|user)\.overlay\.(overlay\.){0,2}(opaque|redirect)`),
		rapid.StringMatching(`(user\.containers\.override_){0,3}(user\.fuseoverlayfs\.|user\.overlay\.|system\.posix_acl_|stat)?[a-z]{0,8}`),
	)
	rapid.Check(t, func(t *rapid.T) {
		e := encoding{
			dialect:  rapid.SampledFrom([]whiteout.Dialect{whiteout.Overlay, whiteout.UserXattr, whiteout.AUFS, whiteout.Auto, whiteout.AutoUser}).Draw(t, "dialect"),
			override: rapid.SampledFrom([]override.Form{override.None, override.Containers}).Draw(t, "override"),
		}
		name := names.Draw(t, "name")
		disk := e.toDisk(name)
		if back, visible := e.fromDisk(disk); back != name || !visible {
			t.Fatalf("%+v: %q is stored as %q and read as %q, %v", e, name, disk, back, visible)
		}
		for _, p := range private {
			if disk == e.dialect.Attr(p) {
				t.Fatalf("%+v: %q reaches %q", e, name, disk)
			}
		}
		if e.override != override.None && disk == e.override.Attr() {
			t.Fatalf("%+v: %q reaches the attribute itself", e, name)
		}
		for _, p := range private {
			if _, visible := e.fromDisk(e.dialect.Attr(p)); visible {
				t.Fatalf("%+v: shows %q", e, e.dialect.Attr(p))
			}
		}
	})
}
