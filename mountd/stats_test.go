package mountd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/metrics"
	"github.com/plyfs/plyfs/unionfs/counters"
)

// statsService answers what metrics are made of.
type statsService struct {
	fakeService
	mounts []MountStats
	asked  StatsRequest
	du     atomic.Int32 // how often the store was measured
	hold   chan struct{}
}

func (s *statsService) Stats(_ context.Context, r StatsRequest) ([]MountStats, error) {
	s.asked = r
	return s.mounts, s.err
}

func (s *statsService) List(context.Context, Empty) ([]Status, error) {
	return []Status{{State: StateMounted}, {State: StateMounted}, {State: StateCreated}}, nil
}

func (s *statsService) DiskUsage(context.Context, Empty) (layers.DiskUsage, error) {
	if s.hold != nil {
		<-s.hold
	}
	s.du.Add(1)
	return layers.DiskUsage{Images: layers.Usage{Count: 2}, Layers: layers.Usage{Count: 3, Size: 1000}, Database: 7}, nil
}

// counted are counters with something in all of them.
func counted() *counters.Snapshot {
	c := counters.New()
	for range 3 {
		c.End(1, c.Begin(), unix.ENOENT)
	}
	c.End(16, c.Begin(), unix.EIO)
	c.End(15, c.Begin(), 0)
	c.Read(100)
	c.CopiedUp(5)
	c.OpenedPassed()
	s := c.Snapshot()
	return &s
}

func mountStats(id string) MountStats {
	return MountStats{
		ID: id, Container: "work", ImageID: digest.FromString("i"), Target: "/m\xff\"\n\\", State: StateMounted,
		Mounted: time.Unix(1e9, 0).UTC(), Since: time.Unix(1e9+1, 0).UTC(), Restarts: 2, IO: "cache", Counters: counted(),
	}
}

func TestStatsSurviveTheSocket(t *testing.T) {
	s := &statsService{mounts: []MountStats{mountStats("aa"), {ID: "bb", Target: "/n", State: StateMounted, Problem: "no answer"}}}
	c := serveService(t, s)
	r := StatsRequest{Name: "x", Target: "/x\xff"}
	got, err := c.Stats(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(s.mounts, got); d != "" {
		t.Error(d)
	}
	if s.asked != r {
		t.Errorf("arrived %+v", s.asked)
	}
}

// scrape gets a document over the socket of a daemon.
func scrape(t *testing.T, c *Client) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://plyfs"+metricsPath, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.http.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode == http.StatusOK && resp.Header.Get("Content-Type") != metrics.ContentType {
		t.Errorf("type %q", resp.Header.Get("Content-Type"))
	}
	return resp.StatusCode, string(b)
}

func TestMetrics(t *testing.T) {
	s := &statsService{mounts: []MountStats{mountStats("aa"), {ID: "bb", Target: "/n", State: StateMounted, Problem: "no answer"}}}
	c := serveService(t, s)
	status, text := scrape(t, c)
	if status != http.StatusOK {
		t.Fatal(status, text)
	}
	const labels = `mount="aa",target="/m` + "\ufffd" + `\"\n\\"`
	for _, want := range []string{
		`plyfs_mounts{state="mounted"} 2`, `plyfs_mounts{state="created"} 1`, `plyfs_mounts{state="dead"} 0`,
		`plyfs_images 2`, `plyfs_layers 3`, `plyfs_store_bytes{what="layers"} 1000`, `plyfs_store_bytes{what="database"} 7`,
		`plyfs_mount_up{` + labels + `} 1`, `plyfs_mount_up{mount="bb",target="/n"} 0`,
		`plyfs_mount_restarts_total{` + labels + `} 2`, `plyfs_mount_start_time_seconds{` + labels + `} 1000000000`,
		`plyfs_read_bytes_total{` + labels + `} 100`, `plyfs_copy_up_bytes_total{` + labels + `} 5`,
		`plyfs_opens_total{` + labels + `,how="passthrough"} 1`, `plyfs_opens_total{` + labels + `,how="cached"} 0`,
		`plyfs_request_duration_seconds_count{` + labels + `,op="lookup"} 3`,
		`plyfs_request_errors_total{` + labels + `,op="lookup",class="not_found"} 3`,
		`plyfs_request_errors_total{` + labels + `,op="write",class="io"} 1`,
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	if strings.Contains(text, `plyfs_read_bytes_total{mount="bb"`) {
		t.Error("a mount that did not answer has counters")
	}
	if _, text = scrape(t, c); s.du.Load() != 1 || !strings.Contains(text, "plyfs_images 2\n") {
		t.Errorf("measured %d times", s.du.Load())
	}
	s.err = fmt.Errorf("store: %w", layers.ErrCorrupt)
	if status, text := scrape(t, c); status != http.StatusUnprocessableEntity {
		t.Error(status, text)
	}
}

// The page has each metric and each class of errors, and none that is not there.
func TestMetricsAreDocumented(t *testing.T) {
	_, text := scrape(t, serveService(t, &statsService{mounts: []MountStats{mountStats("aa")}}))
	page, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+)`).FindAllStringSubmatch(text, -1) {
		known[m[1]] = true
		if !strings.Contains(string(page), "`"+m[1]+"`") {
			t.Errorf("%s is not in docs/metrics.md", m[1])
		}
	}
	for _, m := range regexp.MustCompile("`(plyfs_[a-z_]+)`").FindAllStringSubmatch(string(page), -1) {
		if !known[m[1]] {
			t.Errorf("docs/metrics.md has %s, which does not exist", m[1])
		}
	}
	for _, c := range counters.Classes() {
		if !strings.Contains(string(page), "| `"+c.String()+"` |") {
			t.Errorf("class %s is not in docs/metrics.md", c)
		}
	}
}

func TestMetricsOfManyMountsAreBounded(t *testing.T) {
	s := &statsService{}
	for i := range maxMetricMounts + 5 {
		s.mounts = append(s.mounts, mountStats(fmt.Sprintf("%08x", i)))
	}
	_, text := scrape(t, serveService(t, s))
	if !strings.Contains(text, "plyfs_mounts_left_out 5\n") {
		t.Error("it is not said that mounts are left out")
	}
	if n := strings.Count(text, "\nplyfs_mount_up{"); n != maxMetricMounts {
		t.Errorf("%d mounts", n)
	}
}

// A store that takes long to measure keeps nobody from the other metrics.
func TestMetricsWithoutSizes(t *testing.T) {
	s := &statsService{hold: make(chan struct{})}
	c := serveService(t, s)
	status, text := scrape(t, c)
	if status != http.StatusOK || strings.Contains(text, "plyfs_images") || !strings.Contains(text, "plyfs_mounts{") {
		t.Error(status, text)
	}
	close(s.hold)
	poll(t, func() bool { _, text := scrape(t, c); return strings.Contains(text, "plyfs_images 2\n") })
}

// poll waits for something that comes by itself.
func poll(t *testing.T, ok func() bool) {
	t.Helper()
	for until := time.Now().Add(20 * time.Second); !ok(); <-time.After(10 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("it has not come")
		}
	}
}

func TestLoopbackOnly(t *testing.T) {
	for _, a := range []string{"127.0.0.1:0", "[::1]:9000", "localhost:1", "127.3.2.1:80"} {
		if _, err := loopback(a); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
	for _, a := range []string{"", ":9000", "0.0.0.0:9000", "[::]:9000", "192.0.2.1:9000", "example.org:80", "127.0.0.1", "[fe80::1%lo]:1", "127.0.0.1:99999"} {
		if _, err := loopback(a); !errors.Is(err, ErrUsage) {
			t.Errorf("%q: %v", a, err)
		}
	}
}

func TestMetricsOverHTTP(t *testing.T) {
	s := &statsService{mounts: []MountStats{mountStats("aa")}}
	h := newMetrics(s, zaptest.NewLogger(t))
	where, stop, err := serveMetrics(t.Context(), "127.0.0.1:0", h, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	at := where.String()
	if _, _, err := serveMetrics(t.Context(), at, h, zaptest.NewLogger(t)); err == nil {
		t.Error("an address that is in use")
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(method, path, host string) int {
		r, err := http.NewRequestWithContext(t.Context(), method, "http://"+at+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = host
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close() // only its status counts
		return resp.StatusCode
	}
	for _, c := range []struct {
		method, path, host string
		want               int
	}{
		{"GET", "/metrics", "", 200},
		{"GET", "/metrics", "localhost:9000", 200},
		{"GET", "/metrics", "[::1]", 200},
		{"GET", "/metrics", "evil.example", 403},
		{"POST", "/metrics", "", 405},
		{"POST", "/v1/list", "", 404},
		{"GET", "/", "", 404},
	} {
		if got := get(c.method, c.path, c.host); got != c.want {
			t.Errorf("%s %s for %q: %d, want %d", c.method, c.path, c.host, got, c.want)
		}
	}
}
