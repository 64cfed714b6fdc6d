package layers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/plyfs/plyfs/layers/registry"
)

// The tests of this file start the test binary again as another process.
const (
	envRole  = "PLYFS_TEST_ROLE"
	envStore = "PLYFS_TEST_STORE"
	envData  = "PLYFS_TEST_DATA"
	envPoint = "PLYFS_TEST_POINT"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(envRole); role != "" {
		if err := helper(role); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// diedCode is the exit code of a helper that stopped at its fault point.
const diedCode = 77

func helper(role string) error {
	ctx := context.Background()
	s, err := Open(ctx, os.Getenv(envStore), Options{})
	if err != nil {
		return err
	}
	defer s.Close()
	at, n := os.Getenv(envPoint), 0
	s.hook = func(p string) error {
		// Die without any clean-up, as if killed; where each layer passes, at
		// the second pass.
		if p == at {
			if n++; n == 2 || p != "after-ingest-row" && p != "after-unpack" && p != "after-rename" {
				os.Exit(diedCode)
			}
		}
		return nil
	}
	switch role {
	case "load":
		f, err := os.Open(os.Getenv(envData))
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = s.Load(ctx, Source{Reader: f}, LoadOptions{})
		return err
	case "pull":
		host := os.Getenv(envData)
		acc := registry.Access{Endpoints: []registry.Endpoint{{Host: host, Repository: "app", Security: registry.SecurityPlain}}}
		_, err := s.Pull(ctx, host+"/app:1", acc, PullOptions{KeepBlobs: true})
		return err
	case "create":
		_, err := s.CreateContainer(ctx, "base", "c")
		return err
	case "adopt", "adopt-copy":
		o := AdoptOptions{}
		if role == "adopt-copy" {
			o.Mode = AdoptCopy
		}
		_, err := s.Adopt(ctx, os.Getenv(envData), o)
		return err
	case "list":
		for range 20 {
			if _, err := s.Images(ctx, ""); err != nil {
				return err
			}
		}
		return nil
	}
	return errors.New("unknown role")
}

func start(t testing.TB, role, store, data, point string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	c := exec.Command(exe, "-test.run=^$")
	c.Env = append(os.Environ(), envRole+"="+role, envStore+"="+store, envData+"="+data, envPoint+"="+point)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	must(t, c.Start())
	t.Cleanup(func() {
		if out.Len() > 0 {
			t.Logf("%s: %s", role, out.String())
		}
	})
	return c
}

func writeArchive(t testing.TB, images ...img) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "a.tar")
	must(t, os.WriteFile(p, outerTar(t, oldDocker(t, images...)), 0o600))
	return p
}

// TestCrash kills a process at every step and looks at what is left.
func TestCrash(t *testing.T) {
	im := img{refs: []string{"new"}, layers: [][]byte{
		layerTar(t, dir("."), file("a", "1")), layerTar(t, file("d/b", "2")), layerTar(t, wh("a"), file("c", strings.Repeat("3", 10000))),
	}}
	for _, tc := range []struct {
		role, point string
		done        bool // the work counts
	}{
		{"load", "after-ingest-row", false},
		{"load", "after-unpack", false},
		{"load", "before-sync", false},
		{"load", "after-sync", false},
		{"load", "before-index-sync", false},
		{"load", "after-index", false},
		{"load", "after-rename", false},
		{"load", "after-dirsync", false},
		{"load", "after-row", false},
		{"load", "before-images", false},
		{"load", "after-images", true},
		{"create", "after-container-row", false},
		{"create", "after-container-rename", false},
	} {
		t.Run(tc.role+" "+tc.point, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "store")
			s := openAt(t, root)
			baseImage(t, s)
			before := listLayers(t, s)
			c := start(t, tc.role, root, writeArchive(t, im), tc.point)
			_ = c.Wait()
			if c.ProcessState.ExitCode() != diedCode {
				t.Fatalf("the helper did not reach the point: %v", c.ProcessState)
			}
			// Nothing half-made is visible.
			list, err := s.Images(t.Context(), "")
			must(t, err)
			if want := 1; len(list) != want && !tc.done {
				t.Errorf("%d images, expected %d", len(list), want)
			}
			if cs, err := s.Containers(t.Context()); err != nil || len(cs) > 0 {
				t.Error(cs, err)
			}
			rep, err := s.Check(t.Context(), CheckOptions{Deep: true})
			must(t, err)
			for _, f := range rep.Findings {
				if f.Invariant != "K16" {
					t.Errorf("%+v", f)
				}
			}
			// The next use sweeps it.
			must(t, s.sweep(t.Context()))
			clean(t, s)
			if !tc.done {
				if d := cmp.Diff(before, listLayers(t, s)); d != "" {
					t.Error(d)
				}
			}
			// And the work can be done again.
			c = start(t, tc.role, root, writeArchive(t, im), "")
			must(t, c.Wait())
			clean(t, s)
		})
	}
}

// TestFaults ends the work with an error instead: the store is as before at
// once.
func TestFaults(t *testing.T) {
	im := img{refs: []string{"new"}, layers: [][]byte{layerTar(t, dir("."), file("a", "1")), layerTar(t, file("d/b", "2"))}}
	for _, point := range []string{"after-ingest-row", "after-unpack", "before-sync", "after-sync", "after-index", "after-rename", "after-dirsync", "before-images"} {
		t.Run(point, func(t *testing.T) {
			s := openStore(t)
			baseImage(t, s)
			before := listLayers(t, s)
			s.hook = func(p string) error {
				if p == point {
					return errFault
				}
				return nil
			}
			_, err := s.Load(t.Context(), Source{Reader: bytes.NewReader(outerTar(t, oldDocker(t, im)))}, LoadOptions{})
			if !errors.Is(err, errFault) {
				t.Fatal(err)
			}
			s.hook = nil
			if d := cmp.Diff(before, listLayers(t, s)); d != "" {
				t.Error(d)
			}
			clean(t, s)
		})
	}
}

// TestConcurrentLoads: eight processes load images that share layers, while
// others list.
func TestConcurrentLoads(t *testing.T) {
	root := filepath.Join(t.TempDir(), "store")
	var shared [][]byte
	for i := range 4 {
		shared = append(shared, layerTar(t, dir("."), file(fmt.Sprintf("f%d", i), strings.Repeat("x", 20000+i))))
	}
	// No store yet: they race for making it, too.
	var procs []*exec.Cmd
	for i := range 8 {
		own := layerTar(t, dir("."), file("own", fmt.Sprint(i/2)))
		im := img{refs: []string{fmt.Sprintf("img%d", i)}, layers: append(append([][]byte{}, shared...), own)}
		procs = append(procs, start(t, "load", root, writeArchive(t, im), ""))
	}
	for range 2 {
		procs = append(procs, start(t, "list", root, "", ""))
	}
	for _, p := range procs {
		if err := p.Wait(); err != nil {
			t.Error(err)
		}
	}
	s := openAt(t, root)
	clean(t, s)
	list, err := s.Images(t.Context(), "")
	must(t, err)
	if len(list) != 8 {
		t.Errorf("%d images, expected 8", len(list))
	}
	if n := len(listLayers(t, s)); n != 8 {
		t.Errorf("%d layer directories, expected 4 shared and 4 own", n)
	}
}

// TestLiveStageIsLeftAlone: a sweep spares the work of a living process.
func TestLiveStageIsLeftAlone(t *testing.T) {
	s := openStore(t)
	st, err := s.newStage(t.Context(), "test")
	must(t, err)
	lease, err := s.newLease(t.Context())
	must(t, err)
	other := openAt(t, s.root)
	must(t, other.sweep(t.Context()))
	if _, err := os.Stat(filepath.Join(s.root, stageName, st.id)); err != nil {
		t.Error(err)
	}
	st.discard()
	s.dropLease(lease)
	clean(t, s)
}
