package mountd

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/plyfs/plyfs/layers"
)

// Client is the service of a daemon.
type Client struct {
	socket string
	http   *http.Client
	tr     *http.Transport
}

var _ Service = (*Client)(nil)

// dialTimeout bounds the connect only: a daemon that is alive accepts at once.
const dialTimeout = 5 * time.Second

// NewClient talks to the daemon that listens on socket. Nothing is sent yet.
func NewClient(socket string) *Client {
	tr := &http.Transport{
		DisableCompression: true,
		WriteBufferSize:    64 << 10,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialDaemon(ctx, socket)
		},
	}
	return &Client{socket: socket, tr: tr, http: &http.Client{Transport: tr}}
}

// dialDaemon connects, and checks that the other end is root or ourselves:
// what we send is for no other eyes.
func dialDaemon(ctx context.Context, socket string) (net.Conn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	cred, err := peerOf(c)
	if err == nil && cred.Uid != 0 && int(cred.Uid) != os.Geteuid() && os.Geteuid() != 0 {
		err = markedf(ErrRefused, "daemon on %q belongs to user %d", socket, cred.Uid)
	}
	if err != nil {
		_ = c.Close() // nothing was said
		return nil, err
	}
	return c, nil
}

// Close drops idle connections.
func (c *Client) Close() error {
	c.tr.CloseIdleConnections()
	return nil
}

// ask is one call with a JSON request and answer.
func ask[Resp any](ctx context.Context, c *Client, name string, req any) (resp Resp, err error) {
	body, err := json.Marshal(req)
	if err != nil {
		return resp, err
	}
	hresp, err := c.post(ctx, "/"+name, bytes.NewReader(body))
	if err != nil {
		return resp, err
	}
	defer hresp.Body.Close()
	if err := json.NewDecoder(hresp.Body).Decode(&resp); err != nil {
		return resp, markedf(ErrUnavailable, "answer of the daemon on %q: %w", c.socket, err)
	}
	return resp, nil
}

// post sends a request and turns every answer but 200 into its error.
func (c *Client) post(ctx context.Context, path string, body io.Reader) (*http.Response, error) {
	return c.send(ctx, http.MethodPost, path, body)
}

func (c *Client) send(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	hreq, err := http.NewRequestWithContext(ctx, method, "http://plyfs/"+apiVersion+path, body)
	if err != nil {
		return nil, err
	}
	hreq.Header.Set("Content-Type", "application/octet-stream")
	hresp, err := c.http.Do(hreq)
	if err != nil {
		if cause := ctx.Err(); cause != nil {
			return nil, cause
		}
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return nil, markedf(ErrUnavailable, "daemon on %q: %w", c.socket, err)
	}
	if hresp.StatusCode == http.StatusOK {
		return hresp, nil
	}
	defer hresp.Body.Close()
	var e ErrorBody
	if err := json.NewDecoder(io.LimitReader(hresp.Body, maxJSON)).Decode(&e); err != nil {
		return nil, markedf(ErrUnavailable, "daemon on %q: %s", c.socket, hresp.Status)
	}
	return nil, decodeError(e)
}

// transfer is one call with frames as answer, and an archive as body if in is
// not nil.
func (c *Client) transfer(ctx context.Context, name string, req any, in io.Reader, out io.Writer, p layers.ProgressFunc, result any) error {
	r, err := json.Marshal(req)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends a body that is still being sent
	var body io.Reader
	src := &stoppable{r: in}
	if in != nil {
		// net/http waits for a read of the body to return, also when ctx has
		// ended: a read from a pipe in which nothing comes must not be its own.
		pr, pw := io.Pipe()
		go func() {
			_, err := io.CopyBuffer(struct{ io.Writer }{pw}, src, make([]byte, dataChunk))
			pw.CloseWithError(err)
		}()
		context.AfterFunc(ctx, func() { _ = pr.CloseWithError(context.Canceled) })
		body = pr
	}
	hresp, err := c.post(ctx, "/"+name+"?r="+url.QueryEscape(string(r)), body)
	if err != nil {
		return src.orReadError(err)
	}
	defer hresp.Body.Close()
	err = readFrames(hresp.Body, out, p, result)
	src.stop.Store(true)
	if ctx.Err() != nil && err != nil {
		return ctx.Err()
	}
	return src.orReadError(err)
}

// stoppable is a body that ends early when the answer has come, and remembers
// why it could not be read.
type stoppable struct {
	r    io.Reader
	stop atomic.Bool
	err  atomic.Pointer[error]
}

func (s *stoppable) Read(b []byte) (int, error) {
	if s.stop.Load() {
		return 0, io.EOF
	}
	n, err := s.r.Read(b)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err.Store(&err)
	}
	return n, err
}

// orReadError prefers the error of our own file to what the daemon made of it.
func (s *stoppable) orReadError(err error) error {
	if rerr := s.err.Load(); rerr != nil && err != nil {
		return *rerr
	}
	return err
}

// Info implements Service.
func (c *Client) Info(ctx context.Context, r Empty) (Info, error) {
	return ask[Info](ctx, c, "info", r)
}

// Images implements Service.
func (c *Client) Images(ctx context.Context, r ImagesRequest) ([]layers.ImageSummary, error) {
	return ask[[]layers.ImageSummary](ctx, c, "images", r)
}

// History implements Service.
func (c *Client) History(ctx context.Context, r NameRequest) ([]layers.HistoryEntry, error) {
	return ask[[]layers.HistoryEntry](ctx, c, "history", r)
}

// Inspect implements Service.
func (c *Client) Inspect(ctx context.Context, r NameRequest) (Inspection, error) {
	return ask[Inspection](ctx, c, "inspect", r)
}

// Layers implements Service.
func (c *Client) Layers(ctx context.Context, r NameRequest) ([]layers.LayerInfo, error) {
	return ask[[]layers.LayerInfo](ctx, c, "layers", r)
}

// Analyze implements Service.
func (c *Client) Analyze(ctx context.Context, r AnalyzeRequest) (*layers.Analysis, error) {
	return ask[*layers.Analysis](ctx, c, "analyze", r)
}

// Tag implements Service.
func (c *Client) Tag(ctx context.Context, r TagRequest) (Empty, error) {
	return ask[Empty](ctx, c, "tag", r)
}

// RemoveImage implements Service.
func (c *Client) RemoveImage(ctx context.Context, r RemoveImageRequest) ([]layers.RemoveAction, error) {
	return ask[[]layers.RemoveAction](ctx, c, "rmi", r)
}

// Create implements Service.
func (c *Client) Create(ctx context.Context, r CreateRequest) (layers.Container, error) {
	return ask[layers.Container](ctx, c, "create", r)
}

// Remove implements Service.
func (c *Client) Remove(ctx context.Context, r RemoveRequest) (Empty, error) {
	return ask[Empty](ctx, c, "rm", r)
}

// List implements Service.
func (c *Client) List(ctx context.Context, r Empty) ([]Status, error) {
	return ask[[]Status](ctx, c, "list", r)
}

// Explain implements Service.
func (c *Client) Explain(ctx context.Context, r ExplainRequest) (Explanation, error) {
	return ask[Explanation](ctx, c, "explain", r)
}

// Stats implements Service.
func (c *Client) Stats(ctx context.Context, r StatsRequest) ([]MountStats, error) {
	return ask[[]MountStats](ctx, c, "stats", r)
}

// Mount implements Service.
func (c *Client) Mount(ctx context.Context, r MountRequest) (MountResult, error) {
	return ask[MountResult](ctx, c, "mount", r)
}

// Restore implements Service.
func (c *Client) Restore(ctx context.Context, r Empty) ([]Restored, error) {
	return ask[[]Restored](ctx, c, "restore", r)
}

// Unmount implements Service.
func (c *Client) Unmount(ctx context.Context, r UnmountRequest) (UnmountResult, error) {
	return ask[UnmountResult](ctx, c, "umount", r)
}

// Diff implements Service.
func (c *Client) Diff(ctx context.Context, r DiffRequest) ([]Change, error) {
	return ask[[]Change](ctx, c, "diff", r)
}

// GC implements Service.
func (c *Client) GC(ctx context.Context, r GCRequest) (layers.GCReport, error) {
	return ask[layers.GCReport](ctx, c, "gc", r)
}

// FindBuild implements Service.
func (c *Client) FindBuild(ctx context.Context, r layers.BuildStep) (layers.Image, error) {
	return ask[layers.Image](ctx, c, "findbuild", r)
}

// RecordBuild implements Service.
func (c *Client) RecordBuild(ctx context.Context, r RecordBuildRequest) (Empty, error) {
	return ask[Empty](ctx, c, "recordbuild", r)
}

// Prune implements Service.
func (c *Client) Prune(ctx context.Context, r PruneRequest) (layers.GCReport, error) {
	return ask[layers.GCReport](ctx, c, "prune", r)
}

// Rebuild implements Service.
func (c *Client) Rebuild(ctx context.Context, r Empty) (layers.RebuildReport, error) {
	return ask[layers.RebuildReport](ctx, c, "rebuild", r)
}

// Compact implements Service.
func (c *Client) Compact(ctx context.Context, r Empty) (CompactResult, error) {
	return ask[CompactResult](ctx, c, "compact", r)
}

// CopyDatabase implements Service.
func (c *Client) CopyDatabase(ctx context.Context, r Empty) (CopyResult, error) {
	return ask[CopyResult](ctx, c, "copy-database", r)
}

// DiskUsage implements Service.
func (c *Client) DiskUsage(ctx context.Context, r Empty) (layers.DiskUsage, error) {
	return ask[layers.DiskUsage](ctx, c, "df", r)
}

// Load implements Service. A directory is sent as the archive of its files.
func (c *Client) Load(ctx context.Context, r LoadRequest, src layers.Source, p layers.ProgressFunc) (out []layers.LoadedImage, err error) {
	if r.Size == 0 {
		r.Size = src.Size
	}
	if src.Dir == "" {
		return out, c.transfer(ctx, "load", r, src.Reader, nil, p, &out)
	}
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		pw.CloseWithError(tarDir(pw, src.Dir))
	}()
	err = c.transfer(ctx, "load", r, pr, nil, p, &out)
	_ = pr.Close() // ends tarDir if the daemon has had enough
	<-done
	return out, err
}

// Import implements Service.
func (c *Client) Import(ctx context.Context, r ImportRequest, src layers.Source, p layers.ProgressFunc) (out layers.Image, err error) {
	if r.Size == 0 {
		r.Size = src.Size
	}
	return out, c.transfer(ctx, "import", r, src.Reader, nil, p, &out)
}

// Pull implements Service. The request travels as the body: it is long, and holds
// secrets.
func (c *Client) Pull(ctx context.Context, r PullRequest, p layers.ProgressFunc) (out layers.PullResult, err error) {
	return out, c.confide(ctx, "pull", r, p, &out)
}

// Push implements Service.
func (c *Client) Push(ctx context.Context, r PushRequest, p layers.ProgressFunc) (out layers.PushResult, err error) {
	return out, c.confide(ctx, "push", r, p, &out)
}

func (c *Client) confide(ctx context.Context, name string, req any, p layers.ProgressFunc, result any) error {
	body, err := json.Marshal(req)
	if err != nil {
		return err
	}
	return c.transfer(ctx, name, Empty{}, bytes.NewReader(body), nil, p, result)
}

// Save implements Service.
func (c *Client) Save(ctx context.Context, r SaveRequest, w io.Writer, p layers.ProgressFunc) error {
	return c.transfer(ctx, "save", r, nil, w, p, nil)
}

// Export implements Service.
func (c *Client) Export(ctx context.Context, r NameRequest, w io.Writer) error {
	return c.transfer(ctx, "export", r, nil, w, nil, nil)
}

// Commit implements Service.
func (c *Client) Commit(ctx context.Context, r CommitRequest, p layers.ProgressFunc) (out layers.Image, err error) {
	return out, c.transfer(ctx, "commit", r, nil, nil, p, &out)
}

// Check implements Service.
func (c *Client) Check(ctx context.Context, r CheckRequest, p layers.ProgressFunc) (out layers.Report, err error) {
	return out, c.transfer(ctx, "check", r, nil, nil, p, &out)
}

// tarDir writes the files of an OCI layout or unpacked docker archive. The
// small files that say what the others are go first, as archives have them.
func tarDir(w io.Writer, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	tw := tar.NewWriter(w)
	first := []string{"oci-layout", "index.json", "manifest.json", "repositories"}
	sent := map[string]bool{}
	add := func(name string) error {
		st, err := root.Lstat(name)
		if err != nil {
			return err
		}
		h := &tar.Header{Name: filepath.ToSlash(name), Mode: 0o644, Size: st.Size(), Typeflag: tar.TypeReg}
		switch {
		case st.Mode().IsRegular():
		case st.Mode()&fs.ModeSymlink != 0: // old docker archives link equal layers
			h.Typeflag, h.Size = tar.TypeSymlink, 0
			if h.Linkname, err = root.Readlink(name); err != nil {
				return err
			}
			return tw.WriteHeader(h)
		default:
			return nil
		}
		f, err := root.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if _, err = io.Copy(tw, f); err != nil {
			return fmt.Errorf("%s: %w", filepath.Join(dir, name), err)
		}
		return nil
	}
	for _, n := range first {
		if err := add(n); err == nil {
			sent[n] = true
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	err = fs.WalkDir(root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || sent[p] {
			return err
		}
		return add(p)
	})
	if err != nil {
		return err
	}
	return tw.Close()
}
