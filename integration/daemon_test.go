package integration

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestSocketActivation starts a daemon as systemd does, with a socket on which somebody
// waits already.
func TestSocketActivation(t *testing.T) {
	s := newStore(t)
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	must(t, err)
	ln.SetUnlinkOnClose(false)
	file, err := ln.File()
	must(t, err)
	must(t, ln.Close())

	type answer struct {
		body []byte
		err  error
	}
	early := make(chan answer, 1)
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	go func() {
		resp, err := client.Post("http://plyfs/v1/info", "application/json", strings.NewReader("{}"))
		if err != nil {
			early <- answer{nil, err}
			return
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		early <- answer{b, err}
	}()

	daemon := exec.Command("sh", "-c", `LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" --root "$1" daemon`, s.bin, s.root)
	daemon.ExtraFiles = []*os.File{file}
	var log strings.Builder
	daemon.Stderr = &log
	must(t, daemon.Start())
	must(t, file.Close())
	stopped := make(chan error, 1)
	go func() { stopped <- daemon.Wait() }()
	timer := time.AfterFunc(time.Minute, func() { _ = daemon.Process.Kill() }) // it may have ended
	defer timer.Stop()

	a := <-early
	var info struct{ Root string }
	if a.err != nil || json.Unmarshal(a.body, &info) != nil || info.Root != s.root {
		t.Errorf("who asked before the daemon was there gets %q, %v", a.body, a.err)
	}
	if out, err := s.try("--socket", socket, "images"); err != nil {
		t.Errorf("images: %v: %s", err, out)
	}
	resp, err := client.Get("http://plyfs/v1/openapi.json")
	must(t, err)
	var doc struct{ Paths map[string]any }
	if err := json.NewDecoder(resp.Body).Decode(&doc); err != nil || doc.Paths["/v1/mount"] == nil {
		t.Errorf("description: %v", err)
	}
	must(t, resp.Body.Close())

	must(t, daemon.Process.Signal(unix.SIGTERM))
	if err := <-stopped; err != nil {
		t.Errorf("the daemon: %v\n%s", err, &log)
	}
	if st, err := os.Lstat(socket); err != nil || st.Mode()&os.ModeSocket == 0 {
		t.Errorf("the socket is not ours to remove: %v", err)
	}
}
