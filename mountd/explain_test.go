package mountd

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/unionfs/explain"
)

// TestExplain: of a container, its image and its mount, by this process and by a daemon.
func TestExplain(t *testing.T) {
	f := newFixture(t)
	f.mount("c")
	if err := os.WriteFile(f.mnt+"/file", []byte("upper!"), 0o644); err != nil {
		t.Fatal(err)
	}
	at, err := FindLive(f.mnt + "/file")
	if err != nil {
		t.Fatal(err)
	}
	if at.In != "/file" {
		t.Errorf("in the mount it is %q", at.In)
	}
	daemon := serveService(t, f.Local)
	for _, r := range []ExplainRequest{at.Request(), {Name: "c", Path: "file"}, {Name: "localhost/img:1", Path: "/file"}, {Name: "c", Path: "/", Tree: true, Depth: 1}} {
		x, err := f.Explain(t.Context(), r)
		if err != nil {
			t.Fatalf("%+v: %v", r, err)
		}
		if got, err := daemon.Explain(t.Context(), r); err != nil || !cmp.Equal(got, x) {
			t.Errorf("%+v: the daemon says otherwise: %s, %v", r, cmp.Diff(x, got), err)
		}
		if r.Tree {
			if len(x.Lines) == 0 || x.Report != nil || len(x.Layers) == 0 {
				t.Errorf("tree: %+v", x)
			}
			continue
		}
		want := "the upper, copied up"
		if r.Name == "localhost/img:1" {
			want = "layer 1 of 1"
		}
		if !x.Report.Exists || !strings.Contains(x.Report.Answer, want) {
			t.Errorf("%+v: %s", r, x.Report.Answer)
		}
		if r.Target != "" && (x.Container != "c" || x.Target != Path(f.mnt)) {
			t.Errorf("of the mount: %+v", x)
		}
	}
	if o := at.Look(); o.Errno != "" || o.Kind != "file" || o.Size != 6 {
		t.Errorf("the mount shows %+v", o)
	}
	if _, err := f.unmount(false); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Explain(t.Context(), at.Request()); !errors.Is(err, layers.ErrNotFound) {
		t.Errorf("a mount that is gone: %v", err)
	}
	if _, err := f.Explain(t.Context(), ExplainRequest{Name: "none", Path: "/"}); !errors.Is(err, layers.ErrNotFound) {
		t.Errorf("of nothing: %v", err)
	}
}

// TestExplainRaw: the server of a mount tells what it is made of.
func TestExplainRaw(t *testing.T) {
	f := newFixture(t)
	dir := mkdirs(t, "low", "up", "wrk")
	if err := os.WriteFile(dir+"/low/f", make([]byte, 10000), 0o644); err != nil {
		t.Fatal(err)
	}
	o, err := ParseRawOptions(OverlayStyle, []string{"lowerdir=" + dir + "/low,upperdir=" + dir + "/up,workdir=" + dir + "/wrk,metacopy=on"})
	if err != nil {
		t.Fatal(err)
	}
	if err := RawMount(t.Context(), o, f.mnt); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(f.mnt+"/f", 0o600); err != nil {
		t.Fatal(err)
	}
	at, err := FindLive(filepath.Join(f.mnt, "..", "mnt", "f"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Explain(t.Context(), at.Request()); !errors.Is(err, layers.ErrNotFound) {
		t.Errorf("the store says it has the mount: %v", err)
	}
	x, err := ExplainRaw(t.Context(), at, at.Request())
	if err != nil {
		t.Fatal(err)
	}
	if x.Report.CopyUp != explain.CopyMetadata || x.Report.Data == nil || *x.Report.Data != 1 {
		t.Errorf("%+v", x.Report)
	}
	if _, err := UnmountRaw(t.Context(), UnmountRequest{Name: Path(f.mnt), Target: Path(f.mnt)}); err != nil {
		t.Fatal(err)
	}
	if _, err := ExplainRaw(t.Context(), at, at.Request()); !errors.Is(err, layers.ErrNotFound) || !errors.Is(err, layers.ErrUnsupported) {
		t.Errorf("of a mount that is gone: %v", err)
	}
}

// TestExplainKernelOverlay: the mount table tells what a mount of kernel overlayfs is made of,
// in the kernel's way of writing names.
func TestExplainKernelOverlay(t *testing.T) {
	f := newFixture(t)
	dir := mkdirs(t, "a b", `c\:d,e`, "up,per", "wrk")
	if err := errors.Join(os.WriteFile(dir+"/a b/f", nil, 0o644), os.WriteFile(dir+`/c\:d,e/f`, nil, 0o644), os.WriteFile(dir+`/c\:d,e/g`, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	options := "lowerdir=" + dir + "/a b:" + dir + `/c\\\:d\,e,upperdir=` + dir + `/up\,per,workdir=` + dir + "/wrk"
	if err := unix.Mount("overlay", f.mnt, "overlay", 0, options); err != nil {
		t.Skipf("needs kernel overlayfs: %v", err)
	}
	defer func() {
		if err := unix.Unmount(f.mnt, 0); err != nil {
			t.Error(err)
		}
	}()
	if err := os.WriteFile(f.mnt+"/f", []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, layers := range map[string][]int{"f": {0, 1, 2}, "g": {2}} {
		at, err := FindLive(f.mnt + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		x, err := ExplainRaw(t.Context(), at, at.Request())
		if err != nil {
			t.Fatalf("%q: %v", at.mount.VFSOptions, err)
		}
		var have []int
		for _, e := range x.Report.Entries {
			have = append(have, e.Layer)
		}
		if !cmp.Equal(have, layers) || !x.Report.Exists {
			t.Errorf("%s: %v, %s", name, have, x.Report.Answer)
		}
	}
}

func TestFindLiveElsewhere(t *testing.T) {
	if _, err := FindLive("/proc/self/status"); !errors.Is(err, ErrUsage) {
		t.Errorf("procfs: %v", err)
	}
}
