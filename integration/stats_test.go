package integration

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/archive"
	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// statsDoc is what `plyfs stats --json` says of a mount.
type statsDoc struct {
	ID, Container, Target, IO string
	Restarts                  int
	Counters                  *struct {
		Operations []struct {
			Name   string
			Count  uint64
			Errors map[string]uint64
		}
		BytesRead, BytesWritten uint64
		CopyUps                 struct{ Count, Metadata, Completed, Bytes uint64 }
	}
}

// count returns how often an operation was asked for, and how often something was not there.
func (d *statsDoc) count(names ...string) (n, absent uint64) {
	for _, o := range d.Counters.Operations {
		for _, name := range names {
			if o.Name == name {
				n += o.Count
				absent += o.Errors["not_found"]
			}
		}
	}
	return n, absent
}

// stats asks for the counters of one mount.
func (s *store) stats(name string, options ...string) *statsDoc {
	s.t.Helper()
	var all []statsDoc
	must(s.t, json.Unmarshal([]byte(s.run(append(options, "stats", "--json", name)...)), &all))
	if len(all) != 1 || all[0].Counters == nil {
		s.t.Fatalf("%+v", all)
	}
	return &all[0]
}

// statsStore is a store with a container that is mounted.
func statsStore(t *testing.T) (s *store, target string) {
	t.Helper()
	harness.NeedFUSE(t)
	s = newStore(t)
	file := filepath.Join(t.TempDir(), "a.tar")
	lower := oracle.Layer{Entries: []oracle.Entry{{Path: "dir", Kind: oracle.Dir}, {Path: "lower", Kind: oracle.File, Size: 5000, Seed: 1}}}
	must(t, imageOf(t, "rw:1", oracle.Recipe{Lowers: []oracle.Layer{lower}}).Write(file, archive.Options{}))
	s.run("load", "-i", file)
	target = filepath.Join(t.TempDir(), "m")
	must(t, os.Mkdir(target, 0o755))
	s.run("mount", "--name", "work", "--io", "cache", "rw:1", target)
	t.Cleanup(func() {
		if out, err := s.try("umount", target); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return s, target
}

// statsDaemon runs a daemon that serves metrics on the loopback interface too, and returns
// its socket and that address.
func statsDaemon(t *testing.T, s *store) (socket, url string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	daemon := exec.Command(s.bin, "--root", s.root, "--socket", socket, "daemon", "--metrics-address", "127.0.0.1:0")
	stderr, err := daemon.StderrPipe()
	must(t, err)
	must(t, daemon.Start())
	read := make(chan struct{})
	t.Cleanup(func() {
		_ = daemon.Process.Signal(os.Interrupt) // it may have ended
		<-read
		_ = daemon.Wait() // it was told to end
	})
	found := make(chan string, 1)
	go func() {
		defer close(read)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			if u := regexp.MustCompile(`http://127\.0\.0\.1:[0-9]+/metrics`).FindString(lines.Text()); u != "" {
				found <- u
			}
		}
	}()
	select {
	case url = <-found:
	case <-time.After(20 * time.Second):
		t.Fatal("the daemon does not say where its metrics are")
	}
	waitFor(t, "the daemon to listen", func() bool { _, err := os.Stat(socket); return err == nil })
	return socket, url
}

// scrape reads a document as Prometheus does.
func scrape(t *testing.T, c *http.Client, url string) map[string]*dto.MetricFamily {
	t.Helper()
	resp, err := c.Get(url)
	must(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(t, err)
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s", resp.Status, body)
	}
	p := expfmt.NewTextParser(model.UTF8Validation)
	all, err := p.TextToMetricFamilies(strings.NewReader(string(body)))
	must(t, err)
	return all
}

// sampleOf returns the sample of a family that has these labels, as "name=value".
func sampleOf(t *testing.T, all map[string]*dto.MetricFamily, family string, labels ...string) *dto.Metric {
	t.Helper()
	for _, m := range all[family].GetMetric() {
		has := map[string]bool{}
		for _, l := range m.GetLabel() {
			has[l.GetName()+"="+l.GetValue()] = true
		}
		match := true
		for _, l := range labels {
			match = match && has[l]
		}
		if match {
			return m
		}
	}
	t.Fatalf("no %s with %v", family, labels)
	return nil
}

// TestStats does a known number of operations and finds it everywhere.
func TestStats(t *testing.T) {
	s, target := statsStore(t)
	const n = 23
	at := func(format string, i int) string { return filepath.Join(target, fmt.Sprintf(format, i)) }
	before := s.stats("work")
	for i := range n {
		must(t, os.Mkdir(at("dir%d", i), 0o755))
		must(t, os.WriteFile(at("file%d", i), []byte("123"), 0o644))
		must(t, os.Rename(at("file%d", i), at("new%d", i)))
		must(t, os.Remove(at("new%d", i)))
		if _, err := os.Stat(at("dir/absent%d", i)); !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	must(t, os.Chmod(filepath.Join(target, "lower"), 0o600))
	after := s.stats(target)
	if after.ID != before.ID || after.Container != "work" || after.IO != "cache" {
		t.Errorf("%+v", after)
	}
	for _, c := range []struct {
		exact bool
		names []string
	}{{true, []string{"mkdir"}}, {true, []string{"create"}}, {true, []string{"write"}}, {true, []string{"rename", "rename2"}}, {true, []string{"unlink"}}, {false, []string{"lookup"}}} {
		was, _ := before.count(c.names...)
		is, _ := after.count(c.names...)
		if is-was < n || c.exact && is-was != n {
			t.Errorf("%v: %d, did %d", c.names, is-was, n)
		}
	}
	_, was := before.count("lookup")
	if _, is := after.count("lookup"); is-was < n {
		t.Errorf("%d names were not found, looked for %d", is-was, n)
	}
	if got := after.Counters.BytesWritten - before.Counters.BytesWritten; got != 3*n {
		t.Errorf("%d bytes written, wrote %d", got, 3*n)
	}
	if c := after.Counters.CopyUps; c.Metadata != 1 || c.Bytes != 0 {
		t.Errorf("copy-ups %+v after a change of mode", c)
	}

	socket, url := statsDaemon(t, s)
	if d := s.stats("work", "--socket", socket); d.Counters.BytesWritten != after.Counters.BytesWritten || d.ID != after.ID {
		t.Errorf("the daemon says %+v, the command %+v", d, after)
	}
	overUnix := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	overTCP := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for name, all := range map[string]map[string]*dto.MetricFamily{
		"socket": scrape(t, overUnix, "http://plyfs/metrics"), "loopback": scrape(t, overTCP, url),
	} {
		mkdir := sampleOf(t, all, "plyfs_request_duration_seconds", "op=mkdir", "target="+target, "mount="+after.ID)
		if got := mkdir.GetHistogram().GetSampleCount(); got != n {
			t.Errorf("%s: %d mkdir, did %d", name, got, n)
		}
		absent := sampleOf(t, all, "plyfs_request_errors_total", "op=lookup", "class=not_found", "mount="+after.ID)
		if got := absent.GetCounter().GetValue(); got < n {
			t.Errorf("%s: %v names were not found, looked for %d", name, got, n)
		}
		for family, want := range map[string]float64{"plyfs_written_bytes_total": 3 * n, "plyfs_copy_ups_metadata_total": 1} {
			if got := sampleOf(t, all, family, "mount="+after.ID).GetCounter().GetValue(); got != want {
				t.Errorf("%s: %s is %v, want %v", name, family, got, want)
			}
		}
		for family, labels := range map[string][]string{"plyfs_mount_up": {"mount=" + after.ID}, "plyfs_images": nil, "plyfs_mounts": {"state=mounted"}} {
			if got := sampleOf(t, all, family, labels...).GetGauge().GetValue(); got != 1 {
				t.Errorf("%s: %s is %v, want 1", name, family, got)
			}
		}
	}
}

// TestStatsAsText looks at what people get.
func TestStatsAsText(t *testing.T) {
	s, target := statsStore(t)
	if _, err := os.ReadFile(filepath.Join(target, "lower")); err != nil {
		t.Fatal(err)
	}
	if out := s.run("stats"); !regexp.MustCompile(`(?m)^work +` + regexp.QuoteMeta(target) + ` +[1-9][0-9]* +0 `).MatchString(out) {
		t.Errorf("a line for each mount:\n%s", out)
	}
	out := s.run("stats", "work")
	for _, want := range []string{`^work on ` + regexp.QuoteMeta(target), `^OPERATION +COUNT +ABSENT +ERRORS +P50 +P90 +P99 +TIME`, `^open +1 +0 +0 .*%`, `^total .*100\.0%`, `^copy-ups: +0 `} {
		if !regexp.MustCompile(`(?m)` + want).MatchString(out) {
			t.Errorf("no %s in\n%s", want, out)
		}
	}
	var rounds []int
	dec := json.NewDecoder(strings.NewReader(s.run("stats", "--json", "--interval", "10ms", "-n", "3", "work")))
	for dec.More() {
		var all []statsDoc
		must(t, dec.Decode(&all))
		rounds = append(rounds, len(all[0].Counters.Operations))
	}
	if len(rounds) != 3 || rounds[0]+rounds[1]+rounds[2] != 0 {
		t.Errorf("operations in rounds of rest: %v", rounds)
	}
	for _, c := range []struct {
		args []string
		code int
	}{
		{[]string{"stats", "nobody"}, 3},
		{[]string{"stats", "--interval", "-1s"}, 2},
		{[]string{"stats", "-n", "-1"}, 2},
		{[]string{"daemon", "--metrics-address", "0.0.0.0:9834"}, 2},
	} {
		_, err := s.try(c.args...)
		if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != c.code {
			t.Errorf("%v: %v, want exit status %d", c.args, err, c.code)
		}
	}
	raw := filepath.Join(t.TempDir(), "raw")
	must(t, os.Mkdir(raw, 0o755))
	s.run("overlay", "-o", "lowerdir="+t.TempDir(), raw)
	defer s.run("umount", raw)
	if out := s.run("stats", raw); !strings.Contains(out, "(no store) on ") || !strings.Contains(out, "getattr") {
		t.Errorf("a mount of no store:\n%s", out)
	}
	if out := s.run("stats"); !strings.Contains(out, raw) {
		t.Errorf("it is not among all:\n%s", out)
	}
}

// TestStatsOfNextServer: another server counts from zero, and how many there were.
func TestStatsOfNextServer(t *testing.T) {
	m := newReadOnlyMount(t, imageRecipe(3))
	if _, err := os.ReadDir(m.target); err != nil {
		t.Fatal(err)
	}
	holder, last := m.pids()
	for round := 1; round <= 3; round++ {
		must(t, unix.Kill(last, unix.SIGKILL))
		d := m.s.stats(m.target) // at once: it waits for the next one
		if d.Restarts != round {
			t.Errorf("after %d kills: %d restarts", round, d.Restarts)
		}
		if _, err := os.Stat(filepath.Join(m.target, fmt.Sprint("absent", round))); !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if n, _ := m.s.stats(m.target).count("lookup"); n < 1 {
			t.Error("the next server does not count")
		}
		waitFor(t, "another server", func() bool { _, s := m.pids(); return s != last })
		_, last = m.pids()
	}
	if h, _ := m.pids(); h != holder {
		t.Errorf("another holder: %d, %d", h, holder)
	}
}
