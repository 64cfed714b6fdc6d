package mountd

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"

	"github.com/plyfs/plyfs/layers"
)

func TestMain(m *testing.M) {
	hiddenVerb()
	goleak.VerifyTestMain(m)
}

// fakeService answers from its fields. Methods that no test needs are absent:
// a call of one would be a nil dereference, which net/http turns into a
// closed connection.
type fakeService struct {
	Service
	err     error
	changes []Change
	load    func(ctx context.Context, r LoadRequest, src layers.Source, p layers.ProgressFunc) ([]layers.LoadedImage, error)
	save    func(w io.Writer, p layers.ProgressFunc) error
	mount   MountRequest
	pull    func(ctx context.Context, r PullRequest) (layers.PullResult, error)
}

func (f *fakeService) Info(context.Context, Empty) (Info, error) {
	return Info{API: apiVersion, Root: "/store", Pid: 1}, f.err
}

func (f *fakeService) Images(_ context.Context, r ImagesRequest) ([]layers.ImageSummary, error) {
	if f.err != nil {
		return nil, f.err
	}
	return []layers.ImageSummary{{Repository: r.Filter, Tag: "t"}}, nil
}

func (f *fakeService) Diff(context.Context, DiffRequest) ([]Change, error) { return f.changes, f.err }

func (f *fakeService) Analyze(_ context.Context, r AnalyzeRequest) (*layers.Analysis, error) {
	return &layers.Analysis{Refs: []string{r.Name}, Size: int64(r.Largest), Largest: []layers.LargeFile{{Path: "/\xff\n", Size: 1}}}, f.err
}

func (f *fakeService) Mount(_ context.Context, r MountRequest) (MountResult, error) {
	f.mount = r
	return MountResult{Target: r.Target}, f.err
}

func (f *fakeService) Pull(ctx context.Context, r PullRequest, p layers.ProgressFunc) (layers.PullResult, error) {
	p(layers.Progress{ID: "x", Action: "Pull complete", Done: true})
	return f.pull(ctx, r)
}

func (f *fakeService) Load(ctx context.Context, r LoadRequest, src layers.Source, p layers.ProgressFunc) ([]layers.LoadedImage, error) {
	return f.load(ctx, r, src, p)
}

func (f *fakeService) Save(_ context.Context, _ SaveRequest, w io.Writer, p layers.ProgressFunc) error {
	return f.save(w, p)
}

// serveFake starts a daemon's server for f and returns a client of it.
func serveFake(t *testing.T, f *fakeService) *Client {
	t.Helper()
	return serveService(t, f)
}

func serveService(t *testing.T, f Service) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	ln, release, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, ln, NewHandler(f, zaptest.NewLogger(t)), func() {}) }()
	c := NewClient(socket)
	t.Cleanup(func() {
		_ = c.Close() // drops idle connections
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		release()
	})
	return c
}

func TestErrorsSurviveTheSocket(t *testing.T) {
	f := &fakeService{}
	c := serveFake(t, f)
	for _, entry := range codes {
		t.Run(entry.code, func(t *testing.T) {
			f.err = fmt.Errorf("image %q: %w", "a\x1b[31m", entry.err)
			_, err := c.Images(t.Context(), ImagesRequest{})
			if !errors.Is(err, entry.err) {
				t.Errorf("%v does not match %v", err, entry.err)
			}
			if err == nil || err.Error() != f.err.Error() {
				t.Errorf("message %q, want %q", err, f.err)
			}
			for _, other := range codes {
				if other.err != entry.err && errors.Is(err, other.err) {
					t.Errorf("%v also matches %v", err, other.err)
				}
			}
		})
	}
	f.err = errors.New("no sentinel")
	if _, err := c.Images(t.Context(), ImagesRequest{}); err == nil || err.Error() != "no sentinel" {
		t.Errorf("error without sentinel: %v", err)
	}
}

func TestCallsSurviveTheSocket(t *testing.T) {
	f := &fakeService{changes: []Change{
		{Kind: "A", Path: "/plain"},
		{Kind: "C", Path: "/\xff\xfe", ChangeDetail: ChangeDetail{Type: "file", Size: 2, OldSize: 1, LinkTo: "/\xff", Why: []string{"size"}, Details: []string{"size 1 -> 2"}}},
		{Kind: "D", Path: "/new\nline \u202e"},
	}}
	c := serveFake(t, f)
	images, err := c.Images(t.Context(), ImagesRequest{Filter: "x"})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]layers.ImageSummary{{Repository: "x", Tag: "t"}}, images); d != "" {
		t.Error(d)
	}
	changes, err := c.Diff(t.Context(), DiffRequest{A: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(f.changes, changes); d != "" {
		t.Error(d)
	}
	a, err := c.Analyze(t.Context(), AnalyzeRequest{Name: "n", AnalyzeOptions: layers.AnalyzeOptions{Largest: 3}})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(&layers.Analysis{Refs: []string{"n"}, Size: 3, Largest: []layers.LargeFile{{Path: "/\xff\n", Size: 1}}}, a); d != "" {
		t.Error(d)
	}
	req := MountRequest{Source: "i", Target: "/m\xff", ReadOnly: true}
	res, err := c.Mount(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if res.Target != req.Target || f.mount != req {
		t.Errorf("mount: sent %+v, arrived %+v, answered %q", req, f.mount, res.Target)
	}
}

func TestLoadStreamsAndReports(t *testing.T) {
	var got bytes.Buffer
	f := &fakeService{load: func(_ context.Context, r LoadRequest, src layers.Source, p layers.ProgressFunc) ([]layers.LoadedImage, error) {
		if src.Dir != "" {
			return nil, errors.New("the daemon was given a directory")
		}
		_, err := io.Copy(&got, src.Reader)
		p(layers.Progress{ID: "x", Action: "unpacking", Current: int64(got.Len()), Total: r.Size, Done: true})
		return []layers.LoadedImage{{Refs: []string{"a:b"}}}, err
	}}
	c := serveFake(t, f)
	body := strings.Repeat("archive ", 1<<17)
	var seen []layers.Progress
	out, err := c.Load(t.Context(), LoadRequest{}, layers.Source{Reader: strings.NewReader(body), Size: int64(len(body))},
		func(p layers.Progress) { seen = append(seen, p) })
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != body {
		t.Errorf("%d bytes arrived of %d", got.Len(), len(body))
	}
	if d := cmp.Diff([]layers.LoadedImage{{Refs: []string{"a:b"}}}, out); d != "" {
		t.Error(d)
	}
	want := []layers.Progress{{ID: "x", Action: "unpacking", Current: int64(len(body)), Total: int64(len(body)), Done: true}}
	if d := cmp.Diff(want, seen); d != "" {
		t.Error(d)
	}
}

// An error found early must arrive whole, though the archive is still being sent.
func TestLoadFailsEarly(t *testing.T) {
	f := &fakeService{load: func(_ context.Context, _ LoadRequest, src layers.Source, _ layers.ProgressFunc) ([]layers.LoadedImage, error) {
		_, _ = io.ReadFull(src.Reader, make([]byte, 512)) // as a reader of tar headers does
		return nil, fmt.Errorf("not an archive: %w", layers.ErrInvalid)
	}}
	c := serveFake(t, f)
	for range 20 {
		endless := io.LimitReader(zeros{}, 1<<40)
		_, err := c.Load(t.Context(), LoadRequest{}, layers.Source{Reader: endless}, nil)
		if !errors.Is(err, layers.ErrInvalid) || err.Error() != "not an archive: invalid argument" {
			t.Fatalf("error %v", err)
		}
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// What the client cannot read is the client's error, with its own words.
func TestLoadReportsReadError(t *testing.T) {
	f := &fakeService{load: func(_ context.Context, _ LoadRequest, src layers.Source, _ layers.ProgressFunc) ([]layers.LoadedImage, error) {
		_, err := io.Copy(io.Discard, src.Reader)
		return nil, err
	}}
	c := serveFake(t, f)
	broken := errors.New("disk is broken")
	r := io.MultiReader(strings.NewReader("x"), errorReader{broken})
	if _, err := c.Load(t.Context(), LoadRequest{}, layers.Source{Reader: r}, nil); !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
}

type errorReader struct{ err error }

func (e errorReader) Read([]byte) (int, error) { return 0, e.err }

// Cancelling the client cancels the daemon's work.
func TestLoadCancel(t *testing.T) {
	ended := make(chan error, 1)
	started := make(chan struct{})
	f := &fakeService{load: func(ctx context.Context, _ LoadRequest, src layers.Source, _ layers.ProgressFunc) ([]layers.LoadedImage, error) {
		close(started)
		_, err := io.Copy(io.Discard, src.Reader)
		ended <- err
		return nil, err
	}}
	c := serveFake(t, f)
	ctx, cancel := context.WithCancel(t.Context())
	pr, pw := io.Pipe()
	defer pw.Close()
	go func() {
		<-started
		cancel()
	}()
	if _, err := c.Load(ctx, LoadRequest{}, layers.Source{Reader: pr}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("client: %v", err)
	}
	if err := <-ended; err == nil {
		t.Error("the daemon took the cut for the end of the archive")
	}
}

func TestLoadDirectoryIsSentAsArchive(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"oci-layout": "{}", "index.json": "[]", "blobs/sha256/aa": "blob"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("aa", filepath.Join(dir, "blobs/sha256/bb")); err != nil {
		t.Fatal(err)
	}
	var got []string
	f := &fakeService{load: func(_ context.Context, _ LoadRequest, src layers.Source, _ layers.ProgressFunc) ([]layers.LoadedImage, error) {
		for tr := tar.NewReader(src.Reader); ; {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				return nil, nil
			}
			if err != nil {
				return nil, err
			}
			b, _ := io.ReadAll(tr)
			got = append(got, h.Name+" "+h.Linkname+string(b))
		}
	}}
	if _, err := serveFake(t, f).Load(t.Context(), LoadRequest{}, layers.Source{Dir: dir}, nil); err != nil {
		t.Fatal(err)
	}
	want := []string{"oci-layout {}", "index.json []", "blobs/sha256/aa blob", "blobs/sha256/bb aa"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestSaveStreams(t *testing.T) {
	body := bytes.Repeat([]byte("data"), 1<<18)
	f := &fakeService{save: func(w io.Writer, p layers.ProgressFunc) error {
		p(layers.Progress{ID: "a", Done: true})
		_, err := w.Write(body)
		return err
	}}
	c := serveFake(t, f)
	var got bytes.Buffer
	if err := c.Save(t.Context(), SaveRequest{}, &got, nil); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), body) {
		t.Errorf("%d bytes of %d", got.Len(), len(body))
	}
	f.save = func(w io.Writer, _ layers.ProgressFunc) error {
		_, _ = w.Write(body[:100])
		return fmt.Errorf("layer x: %w", layers.ErrCorrupt)
	}
	if err := c.Save(t.Context(), SaveRequest{}, io.Discard, nil); !errors.Is(err, layers.ErrCorrupt) {
		t.Errorf("error in the middle of the data: %v", err)
	}
}

func TestCutAnswerIsAnError(t *testing.T) {
	var buf bytes.Buffer
	w := newFrameWriter(&buf, func() error { return nil })
	if _, err := w.Write([]byte("half")); err != nil {
		t.Fatal(err)
	}
	for n := range buf.Len() + 1 {
		err := readFrames(bytes.NewReader(buf.Bytes()[:n]), io.Discard, nil, nil)
		if !errors.Is(err, ErrUnavailable) {
			t.Errorf("cut after %d bytes: %v", n, err)
		}
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "s")
	ln, release, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode of the socket: %v %v", st.Mode(), err)
	}
	if _, _, err := Listen(socket); !errors.Is(err, layers.ErrInUse) {
		t.Errorf("second daemon: %v", err)
	}
	// A daemon that was killed leaves its socket behind.
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = ln.Close() // the test's own
	release()
	ln, release, err = Listen(socket)
	if err != nil {
		t.Fatalf("stale socket: %v", err)
	}
	_ = ln.Close() // the test's own
	release()

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Listen(file); !errors.Is(err, layers.ErrExists) {
		t.Errorf("file in place of the socket: %v", err)
	}
}

func TestNobodyListens(t *testing.T) {
	c := NewClient(filepath.Join(t.TempDir(), "none"))
	if _, err := c.Info(t.Context(), Empty{}); !nobodyListens(err) || !errors.Is(err, ErrUnavailable) {
		t.Errorf("no socket: %v", err)
	}
}

func TestRunDirsOfRootsDiffer(t *testing.T) {
	t.Setenv(RunDirEnv, t.TempDir())
	dir := mkdirs(t, "a", "b")
	if err := os.Symlink("a", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	root := func(p string) string {
		r, err := CanonicalRoot(filepath.Join(dir, p))
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if SocketPath(root("a")) == SocketPath(root("b")) {
		t.Error("two stores share a socket")
	}
	if SocketPath(root("a/new/store")) != SocketPath(root("link/new/store")) {
		t.Error("one store has two sockets")
	}
	if got, want := root("link/new/store"), dir+"/a/new/store"; got != want {
		t.Errorf("root %q, want %q", got, want)
	}
}

func TestMakeRunDirTrustsOnlyItsOwner(t *testing.T) {
	base := t.TempDir()
	t.Setenv(RunDirEnv, base)
	if err := makeRunDir(RunDir("/store")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(RunDir("/store"), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := makeRunDir(RunDir("/store")); !errors.Is(err, ErrRefused) {
		t.Errorf("directory that anybody can write: %v", err)
	}
}
