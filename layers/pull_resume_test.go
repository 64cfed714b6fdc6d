package layers

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers/registry"
	"github.com/plyfs/plyfs/layers/registry/registrytest"
)

// TestPullGoesOnInPlace: what the network does in the middle of a pull is not seen in its result.
func TestPullGoesOnInPlace(t *testing.T) {
	im := img{layers: [][]byte{noise(t, "one", 300_000), noise(t, "two", 200_000)}}
	for name, fault := range map[string]func(n int, w http.ResponseWriter, r *http.Request, b []byte) bool{
		"cut": func(n int, w http.ResponseWriter, r *http.Request, b []byte) bool {
			if n > 2 {
				return false
			}
			from := 0
			if h := r.Header.Get("Range"); h != "" {
				_, _ = fmt.Sscanf(h, "bytes=%d-", &from)
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(b)-1, len(b)))
			}
			w.Header().Set("Content-Length", fmt.Sprint(len(b)-from))
			if from > 0 {
				w.WriteHeader(http.StatusPartialContent)
			}
			_, _ = w.Write(b[from : from+50_000])
			registrytest.Cut(w)
			return true
		},
		"reset": func(n int, w http.ResponseWriter, _ *http.Request, _ []byte) bool {
			if n > 2 {
				return false
			}
			registrytest.Reset(w)
			return true
		},
		"503": func(n int, w http.ResponseWriter, _ *http.Request, _ []byte) bool {
			if n > 3 {
				return false
			}
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		},
		"429": func(n int, w http.ResponseWriter, _ *http.Request, _ []byte) bool {
			if n > 1 {
				return false
			}
			w.WriteHeader(http.StatusTooManyRequests)
			return true
		},
		"knows no ranges": func(n int, w http.ResponseWriter, r *http.Request, b []byte) bool {
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			if n == 1 {
				_, _ = w.Write(b[:100_000])
				registrytest.Cut(w)
				return true
			}
			_, _ = w.Write(b)
			return true
		},
		"short ranges": func(_ int, w http.ResponseWriter, r *http.Request, b []byte) bool {
			from := 0
			if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err != nil {
				w.Header().Set("Content-Length", fmt.Sprint(len(b)))
				_, _ = w.Write(b[:60_000])
				registrytest.Cut(w)
				return true
			}
			to := min(from+70_000, len(b))
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(b)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(b[from:to])
			return true
		},
		"stalls": func(n int, w http.ResponseWriter, r *http.Request, b []byte) bool {
			if n > 1 {
				return false
			}
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			_, _ = w.Write(b[:10_000])
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg, s := registrytest.New(t), openStore(t)
			man, _ := offer(t, reg, "app", "1", ociGzip, im)
			count := map[string]int{}
			reg.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
				i := slices.IndexFunc(man.Layers, func(d ocispec.Descriptor) bool { return strings.HasSuffix(r.URL.Path, d.Digest.String()) })
				if i < 0 || r.Method != http.MethodGet {
					return false
				}
				n := 0
				reg.Lock(func() { count[r.URL.Path]++; n = count[r.URL.Path] })
				return fault(n, w, r, reg.Blob("app", man.Layers[i].Digest))
			})
			res := pull(t, s, reg, "app:1", PullOptions{})
			if res.ID != man.Config.Digest {
				t.Error(res)
			}
			clean(t, s)
		})
	}
}

// TestPullGoesOnLater: a pull that has failed leaves what has arrived to the next one.
func TestPullGoesOnLater(t *testing.T) {
	reg, s := registrytest.New(t), openStore(t)
	man, _ := offer(t, reg, "app", "1", ociGzip, img{layers: [][]byte{noise(t, "one", 300_000), noise(t, "two", 200_000)}})
	blob := reg.Blob("app", man.Layers[0].Digest)
	// The second layer arrives, half of the first, and then there is no network.
	arrived := make(chan struct{})
	cut := func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case strings.HasSuffix(r.URL.Path, man.Layers[1].Digest.String()):
			defer close(arrived)
			_, _ = w.Write(reg.Blob("app", man.Layers[1].Digest))
			return true
		case !strings.HasSuffix(r.URL.Path, man.Layers[0].Digest.String()):
			return false
		case r.Header.Get("Range") != "":
			registrytest.Reset(w)
			return true
		}
		<-arrived
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
		_, _ = w.Write(blob[:150_000])
		registrytest.Cut(w)
		return true
	}
	fail := func() {
		t.Helper()
		arrived = make(chan struct{})
		reg.SetFault(cut)
		_, err := tryPull(t, s, reg, "app:1", PullOptions{})
		if err == nil || errors.Is(err, ErrCorrupt) || !errors.Is(err, registry.ErrUnavailable) || !strings.Contains(err.Error(), "layer 1 ("+man.Layers[0].Digest.String()+")") {
			t.Fatalf("got %v", err)
		}
		clean(t, s) // no stage, no row
		reg.SetFault(nil)
		reg.Log()
	}
	fail()
	if f := files(t, s, blobsName); len(f) != 2 {
		t.Fatalf("the partial blobs are %v", f)
	}
	u, err := s.DiskUsage(t.Context())
	must(t, err)
	if u.Stage < 300_000 {
		t.Errorf("df does not count the partial blobs: %+v", u)
	}
	res := pull(t, s, reg, "app:1", PullOptions{})
	log := reg.Log()
	i := slices.IndexFunc(log, func(r registrytest.Request) bool { return r.Range != "" })
	if i < 0 || log[i].Range != "bytes=150000-" || asked(log, "GET", man.Layers[1].Digest.String()) != 0 || res.Downloaded != int64(len(blob))-150_000 {
		t.Errorf("the second pull asked %v, result %+v", log, res)
	}
	if f := files(t, s, blobsName); len(f) > 0 {
		t.Errorf("blobs are left: %v", f)
	}
	clean(t, s)

	// A partial blob that is not the beginning of the right one is noticed, and all is well.
	_, err = s.RemoveImage(t.Context(), res.ID.String(), RemoveOptions{})
	must(t, err)
	fail()
	must(t, os.WriteFile(filepath.Join(s.root, blobsName, partialName, man.Layers[0].Digest.Encoded()), make([]byte, 150_000), 0o600))
	pull(t, s, reg, "app:1", PullOptions{})
	clean(t, s)

	// Others are removed by gc, and by age.
	_, err = s.RemoveImage(t.Context(), res.ID.String(), RemoveOptions{})
	must(t, err)
	fail()
	rep, err := s.GC(t.Context(), true)
	if err != nil || len(rep.Paths) != 2 || len(files(t, s, blobsName)) != 2 {
		t.Errorf("dry run: %+v %v", rep, err)
	}
	path := filepath.Join(s.root, blobsName, partialName, man.Layers[0].Digest.Encoded())
	old := time.Now().Add(-partialAge - time.Minute)
	must(t, os.Chtimes(path, old, old))
	must(t, s.sweep(t.Context()))
	if f := files(t, s, blobsName); !slices.Equal(f, []string{man.Layers[1].Digest.Encoded()}) {
		t.Errorf("after the sweep of the old one: %v", f)
	}
	// One that somebody is at stays.
	dl, err := s.newDownload(man.Layers[1].Digest, man.Layers[1].Size)
	must(t, err)
	if _, err = s.GC(t.Context(), false); err != nil || len(files(t, s, blobsName)) != 1 {
		t.Errorf("gc took a download away: %v", err)
	}
	second, err := s.newDownload(man.Layers[1].Digest, man.Layers[1].Size)
	if err != nil || second.name == dl.name || second.resumed != 0 {
		t.Errorf("two downloads share a file: %v", err)
	}
	second.close()
	dl.close()
	if _, err = s.GC(t.Context(), false); err != nil || len(files(t, s, blobsName)) != 0 {
		t.Errorf("gc left %v: %v", files(t, s, blobsName), err)
	}
}

// TestPullIsCancelled: Ctrl-C in the middle.
func TestPullIsCancelled(t *testing.T) {
	reg, s := registrytest.New(t), openStore(t)
	man, _ := offer(t, reg, "app", "1", ociGzip, img{layers: [][]byte{noise(t, "one", 300_000)}})
	ctx, cancel := context.WithCancel(t.Context())
	reg.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, man.Layers[0].Digest.String()) {
			return false
		}
		_, _ = w.Write(reg.Blob("app", man.Layers[0].Digest)[:100_000])
		w.(http.Flusher).Flush()
		cancel()
		<-r.Context().Done()
		return true
	})
	_, err := s.Pull(ctx, reg.Host()+"/app:1", reach(reg, "app"), PullOptions{})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	clean(t, s)
}

// TestPullSameAtOnce: of several that pull the same, one does it.
func TestPullSameAtOnce(t *testing.T) {
	reg := registrytest.New(t)
	man, _ := offer(t, reg, "app", "1", ociGzip, img{layers: [][]byte{noise(t, "one", 50_000), noise(t, "two", 60_000)}})
	root := filepath.Join(t.TempDir(), "store")
	const n = 5
	waiting := make(chan struct{})
	var once sync.Once
	reg.Fault = func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			<-waiting
		}
		return false
	}
	results := make(chan error, n)
	for range n {
		s := openAt(t, root)
		go func() {
			_, err := tryPull(t, s, reg, "app:1", PullOptions{Progress: func(p Progress) {
				if strings.HasPrefix(p.Action, "Waiting") {
					once.Do(func() { close(waiting) })
				}
			}})
			results <- err
		}()
	}
	for range n {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	log := reg.Log()
	for _, l := range man.Layers {
		if got := asked(log, "GET", l.Digest.String()); got != 1 {
			t.Errorf("layer %s was fetched %d times", l.Digest, got)
		}
	}
	s := openAt(t, root)
	clean(t, s)
	if f := files(t, s, blobsName); len(f) > 0 {
		t.Errorf("left %v", f)
	}
}

// TestPullAtOnce: several pulls of images that share layers, in one store.
func TestPullAtOnce(t *testing.T) {
	reg := registrytest.New(t)
	base, mid := noise(t, "base", 300_000), noise(t, "mid", 100_000)
	const n = 6
	var stores []*Store
	root := filepath.Join(t.TempDir(), "store")
	for i := range n {
		offer(t, reg, "app", fmt.Sprint(i%3), ociGzip, img{layers: [][]byte{base, mid, layerTar(t, file("f", fmt.Sprint(i%3)))}})
		stores = append(stores, openAt(t, root))
	}
	errs := make(chan error, n)
	for i, s := range stores {
		go func() {
			_, err := tryPull(t, s, reg, "app:"+fmt.Sprint(i%3), PullOptions{KeepBlobs: i%2 == 0})
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	s := stores[0]
	clean(t, s)
	if got := listLayers(t, s); len(got) != 5 {
		t.Errorf("%d layers are in the store", len(got))
	}
	if f := files(t, s, blobsName+"/"+partialName); len(f) > 0 {
		t.Errorf("left %v", f)
	}
	images, err := s.Images(t.Context(), "")
	must(t, err)
	for _, i := range images {
		_, err := s.RemoveImage(t.Context(), i.ID.String(), RemoveOptions{Force: true})
		must(t, err)
	}
	clean(t, s)
	if f := files(t, s, blobsName); len(f) > 0 {
		t.Errorf("left %v", f)
	}
}

// TestPullDiskFull: a pull that fills the disk gives it back.
func TestPullDiskFull(t *testing.T) {
	needRoot(t)
	mnt := t.TempDir()
	if err := unix.Mount("none", mnt, "tmpfs", 0, "size=3m"); err != nil {
		t.Skip("needs a tmpfs of its own:", err)
	}
	defer func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) }()
	s, err := Open(t.Context(), filepath.Join(mnt, "store"), Options{})
	must(t, err)
	defer s.Close()
	reg := registrytest.New(t)
	offer(t, reg, "app", "1", ociGzip, img{layers: [][]byte{noise(t, "one", 4<<20)}})
	if _, err := tryPull(t, s, reg, "app:1", PullOptions{}); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	clean(t, s)
	if f := files(t, s, blobsName); len(f) > 0 {
		t.Errorf("the disk is full of %v", f)
	}
	offer(t, reg, "app", "2", ociGzip, img{layers: [][]byte{noise(t, "one", 10_000)}})
	pull(t, s, reg, "app:2", PullOptions{})
	clean(t, s)
}

// TestPullCrash kills a pull at every step. What is left is swept, and what has arrived whole is
// not fetched again as long as it is not in its place.
func TestPullCrash(t *testing.T) {
	im := img{layers: [][]byte{layerTar(t, dir("."), file("a", "1")), layerTar(t, file("d/b", "2")), noise(t, "c", 100_000)}}
	for point, fetched := range map[string]bool{ // whether all blobs had arrived
		"after-ingest-row": false, "after-unpack": false, "before-sync": true, "after-sync": true, "after-index": true, "after-rename": true, "after-dirsync": true,
		"after-row": true, "after-blob-rename": false, "after-blob-sync": false, "before-images": false, "after-images": false,
	} {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			reg := registrytest.New(t)
			man, _ := offer(t, reg, "app", "1", ociGzip, im)
			root := filepath.Join(t.TempDir(), "store")
			s := openAt(t, root)
			c := start(t, "pull", root, reg.Host(), point)
			_ = c.Wait()
			if c.ProcessState.ExitCode() != diedCode {
				t.Fatalf("the helper did not reach the point: %v", c.ProcessState)
			}
			images, err := s.Images(t.Context(), "")
			if err != nil || len(images) > 0 != (point == "after-images") {
				t.Error(images, err)
			}
			rep, err := s.Check(t.Context(), CheckOptions{Deep: true})
			must(t, err)
			for _, f := range rep.Findings {
				if f.Invariant != "K16" && (f.Invariant != "K30" || f.Problem != "a kept blob that no row names") {
					t.Errorf("%+v", f)
				}
			}
			reg.Log()
			c = start(t, "pull", root, reg.Host(), "")
			must(t, c.Wait())
			n := 0
			log := reg.Log()
			for _, l := range man.Layers {
				n += asked(log, "GET", l.Digest.String())
			}
			if fetched && n > 0 {
				t.Errorf("blobs were fetched again: %v", log)
			}
			_, err = s.GC(t.Context(), false)
			must(t, err)
			clean(t, s)
			if f := files(t, s, blobsName); len(f) != 3 {
				t.Errorf("kept %v", f)
			}
		})
	}
}
