package mountd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/layers/registry"
)

// TestPullSurvivesTheSocket: all that was found out for a pull arrives, in the body of the request.
func TestPullSurvivesTheSocket(t *testing.T) {
	want := PullRequest{
		Name: "host/app@sha256:x", Platform: "linux/arm64", KeepBlobs: true,
		Access: registry.Access{
			Endpoints: []registry.Endpoint{{
				Host: "host", Repository: "app", Security: registry.SecurityTLS, CAs: [][]byte{bytes.Repeat([]byte("ca"), 1<<20)},
				Certs:      []registry.KeyPair{{Cert: []byte("cert"), Key: []byte("key")}},
				Credential: registry.Credential{Username: "me", Password: "geheim"},
			}},
			Proxy: registry.Proxy{HTTPS: "http://p", No: "x"},
		},
	}
	var got PullRequest
	f := &fakeService{pull: func(_ context.Context, r PullRequest) (layers.PullResult, error) {
		got = r
		return layers.PullResult{Ref: "r", Notes: []string{"n"}}, nil
	}}
	c := serveFake(t, f)
	var seen []layers.Progress
	res, err := c.Pull(t.Context(), want, func(p layers.Progress) { seen = append(seen, p) })
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(layers.PullResult{Ref: "r", Notes: []string{"n"}}, res); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]layers.Progress{{ID: "x", Action: "Pull complete", Done: true}}, seen); d != "" {
		t.Error(d)
	}
}

// TestPullCancel: who goes away ends the pull.
func TestPullCancel(t *testing.T) {
	ended, begun := make(chan error, 1), make(chan struct{})
	f := &fakeService{pull: func(ctx context.Context, _ PullRequest) (layers.PullResult, error) {
		close(begun)
		<-ctx.Done()
		ended <- ctx.Err()
		return layers.PullResult{}, ctx.Err()
	}}
	c := serveFake(t, f)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-begun
		cancel()
	}()
	if _, err := c.Pull(ctx, PullRequest{}, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestPullRequestIsNotRepeated: a body that cannot be read may hold a password.
func TestPullRequestIsNotRepeated(t *testing.T) {
	c := serveFake(t, &fakeService{})
	resp, err := c.http.Post("http://plyfs/"+apiVersion+"/pull?r=%7B%7D", "text/plain", bytes.NewReader([]byte(`{"access": "geheim"`)))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || bytes.Contains(text, []byte("geheim")) || !bytes.Contains(text, []byte("cannot be read")) {
		t.Errorf("%d %q %v", resp.StatusCode, text, err)
	}
	// An access that makes no sense reaches no network.
	l, err := OpenLocal(t.Context(), filepath.Join(t.TempDir(), "store"), LocalOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := l.Pull(t.Context(), PullRequest{Name: "x"}, nil); !errors.Is(err, layers.ErrInvalid) {
		t.Error(err)
	}
}
