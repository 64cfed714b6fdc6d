package registry

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/plyfs/plyfs/layers/registry/registrytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var hasty = Options{
	Answer: 300 * time.Millisecond, Stall: 300 * time.Millisecond, StallBytes: 64,
	Backoff: time.Millisecond, MaxBackoff: 4 * time.Millisecond, Attempts: 4,
}

// patient is for tests in which nothing is slow but perhaps the machine.
var patient = Options{Backoff: hasty.Backoff, MaxBackoff: hasty.MaxBackoff, Attempts: hasty.Attempts}

// open reaches the repository app of each registry, the last one being no mirror.
func open(t *testing.T, change func(*Access), regs ...*registrytest.Server) *Remote {
	t.Helper()
	return openWith(t, patient, change, regs...)
}

func openWith(t *testing.T, o Options, change func(*Access), regs ...*registrytest.Server) *Remote {
	t.Helper()
	var a Access
	for i, reg := range regs {
		e := Endpoint{Host: reg.Host(), Repository: "app", Security: SecurityPlain, Mirror: i < len(regs)-1}
		if strings.HasPrefix(reg.URL, "https") {
			e.Security = SecurityTLS
			e.CAs = [][]byte{pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: reg.Certificate().Raw})}
		}
		a.Endpoints = append(a.Endpoints, e)
	}
	if change != nil {
		change(&a)
	}
	r, err := Open(a, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func content(t *testing.T, r *Remote, b []byte) ([]byte, error) {
	t.Helper()
	rc := r.Blob(t.Context(), ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}, 0)
	defer rc.Close()
	return io.ReadAll(rc)
}

func mustGet(t *testing.T, r *Remote, b []byte) {
	t.Helper()
	if got, err := content(t, r, b); err != nil || !bytes.Equal(got, b) {
		t.Fatalf("got %d bytes, %v", len(got), err)
	}
}

var login = Credential{Username: "me", Password: "geheim"}

// TestRedirect: the servers that hold the blobs see no credentials, on another host, another
// port, or after a detour.
func TestRedirect(t *testing.T) {
	blob := bytes.Repeat([]byte("blob"), 1000)
	for _, tokens := range []bool{false, true} {
		reg := registrytest.New(t)
		reg.User, reg.Password, reg.Tokens = "me", "geheim", tokens
		d := reg.Put("app", blob)
		var mu sync.Mutex
		var saw []string
		storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			defer mu.Unlock()
			saw = append(saw, r.Header.Get("Authorization")+r.Header.Get("Cookie"))
			if r.URL.Path == "/back" {
				http.Redirect(w, r, reg.URL+"/open/blob", http.StatusTemporaryRedirect)
				return
			}
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(blob))
		}))
		defer storage.Close()
		to := storage.URL + "/x?signature=secret"
		var again string
		reg.Fault = func(w http.ResponseWriter, r *http.Request) bool {
			switch {
			case r.URL.Path == "/open/blob":
				again = r.Header.Get("Authorization")
				_, _ = w.Write(blob)
				return true
			case r.Header.Get("Authorization") != "" && strings.HasSuffix(r.URL.Path, d.String()):
				http.Redirect(w, r, to, http.StatusTemporaryRedirect)
				return true
			}
			return false
		}
		r := open(t, func(a *Access) { a.Endpoints[0].Credential = login }, reg)
		mustGet(t, r, blob)
		to = storage.URL + "/back"
		mustGet(t, r, blob)
		if len(saw) != 2 || saw[0]+saw[1] != "" || again != "" {
			t.Errorf("tokens %v: the storage server saw %q, and after a detour %q", tokens, saw, again)
		}
		if log := reg.Log(); !slices.ContainsFunc(log, func(q registrytest.Request) bool { return q.Authorization != "" }) {
			t.Error("the registry saw no credentials either")
		}
	}
}

func TestRedirectRefused(t *testing.T) {
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "x") }))
	defer plain.Close()
	reg := registrytest.NewTLS(t)
	to := ""
	reg.Fault = func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, to, http.StatusTemporaryRedirect)
		return true
	}
	r := open(t, nil, reg)
	for _, to = range []string{plain.URL + "/x?signature=secret", "file:///etc/passwd", reg.URL + "/loop", strings.Replace(reg.URL, "https://", "https://u:p@", 1) + "/x"} {
		_, err := content(t, r, []byte("x"))
		if err == nil || strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), "redirect") && !strings.Contains(err.Error(), "unsupported protocol") {
			t.Errorf("to %s: %v", to, err)
		}
	}
	// An upload is not sent elsewhere.
	upload := registrytest.New(t)
	for _, code := range []int{http.StatusTemporaryRedirect, http.StatusAccepted} {
		var body []byte
		other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ = io.ReadAll(r.Body)
			w.WriteHeader(http.StatusCreated)
		}))
		upload.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPost && code == http.StatusAccepted || r.Method == http.MethodPut && code != http.StatusAccepted {
				w.Header().Set("Location", other.URL+"/v2/app/blobs/uploads/1")
				w.WriteHeader(code)
				return true
			}
			return false
		})
		r := open(t, nil, upload)
		err := r.PushBlob(t.Context(), ocispec.Descriptor{Digest: digest.FromString("x"), Size: 1}, func(int64) (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("x")), nil })
		other.Close()
		if err == nil || len(body) > 0 {
			t.Errorf("%d: uploaded %q to another host: %v", code, body, err)
		}
	}
}

func TestLogin(t *testing.T) {
	for _, tokens := range []bool{false, true} {
		reg := registrytest.New(t)
		reg.User, reg.Password, reg.Tokens = "me", "geheim", tokens
		raw := []byte(`{"schemaVersion":2}`)
		reg.PutManifest("app", "1", ocispec.MediaTypeImageManifest, raw)
		r := open(t, func(a *Access) { a.Endpoints[0].Credential = login }, reg)
		if _, got, err := r.Manifest(t.Context(), "1"); err != nil || !bytes.Equal(got, raw) {
			t.Errorf("tokens %v: %v", tokens, err)
		}
		blob := []byte("blob")
		d := ocispec.Descriptor{Digest: digest.FromBytes(blob), Size: 4}
		if err := r.PushBlob(t.Context(), d, func(int64) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(blob)), nil }); err != nil {
			t.Errorf("tokens %v: %v", tokens, err)
		}
		if have, err := r.HasBlob(t.Context(), d); err != nil || !have {
			t.Errorf("tokens %v: %v %v", tokens, have, err)
		}
		// The password goes to the token server only.
		for _, q := range reg.Log() {
			if tokens && strings.HasPrefix(q.Authorization, "Basic") != (q.Path == "/token") {
				t.Errorf("%s: %q", q, q.Authorization)
			}
		}
		if tokens { // what docker login leaves for some registries
			for _, c := range []Credential{{IdentityToken: "geheim"}, {RegistryToken: "repository:app:pull"}} {
				r := open(t, func(a *Access) { a.Endpoints[0].Credential = c }, reg)
				if _, _, err := r.Manifest(t.Context(), "1"); err != nil {
					t.Error(err)
				}
			}
		}
		for name, c := range map[string]Credential{"wrong": {Username: "me", Password: "falsch"}, "none": {}} {
			r := open(t, func(a *Access) { a.Endpoints[0].Credential = c }, reg)
			_, _, err := r.Manifest(t.Context(), "1")
			if !errors.Is(err, ErrDenied) || strings.Contains(err.Error(), "falsch") {
				t.Errorf("tokens %v, %s: %v", tokens, name, err)
			}
		}
	}
}

// TestTokenServer: a registry cannot make us ask a machine behind our back with its credentials.
func TestTokenServer(t *testing.T) {
	for realm, want := range map[string]string{
		"http://169.254.169.254/token": "blocked", "http://[::1]:1/token": "blocked", "file:///etc/passwd": "unsupported scheme",
	} {
		reg := registrytest.New(t)
		reg.Fault = func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf("Bearer realm=%q,service=x", realm))
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		r := open(t, func(a *Access) { a.Endpoints[0].Credential = login }, reg)
		if _, err := r.Resolve(t.Context(), "1"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", realm, err)
		}
	}
	// From https to http.
	reg := registrytest.NewTLS(t)
	reg.Fault = func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf("Bearer realm=%q,service=x", "http://"+reg.Host()+"/token"))
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	r := open(t, func(a *Access) { a.Endpoints[0].Credential = login }, reg)
	if _, err := r.Resolve(t.Context(), "1"); err == nil || !strings.Contains(err.Error(), "uses http but registry was contacted over https") {
		t.Error(err)
	}
}

func TestTLS(t *testing.T) {
	reg := registrytest.NewTLS(t)
	blob := []byte("blob")
	reg.Put("app", blob)
	mustGet(t, open(t, nil, reg), blob)
	bare := func(security string) *Remote {
		return open(t, func(a *Access) { a.Endpoints[0].CAs, a.Endpoints[0].Security = nil, security }, reg)
	}
	if _, err := content(t, bare(SecurityTLS), blob); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("a certificate that nobody trusts: %v", err)
	}
	mustGet(t, bare(SecurityInsecure), blob)
	// An insecure registry may speak http; another one may not.
	plain := registrytest.New(t)
	plain.Put("app", blob)
	mustGet(t, open(t, func(a *Access) { a.Endpoints[0].Security = SecurityInsecure }, plain), blob)
	if _, err := content(t, open(t, func(a *Access) { a.Endpoints[0].Security = SecurityTLS }, plain), blob); err == nil {
		t.Error("https was asked for, http was spoken")
	}
	for _, change := range []func(e *Endpoint){
		func(e *Endpoint) { e.CAs = [][]byte{[]byte("no PEM")} },
		func(e *Endpoint) { e.Certs = []KeyPair{{Cert: []byte("x"), Key: []byte("y")}} },
		func(e *Endpoint) { e.Security = "maybe" },
		func(e *Endpoint) { e.Host = "a/b" },
		func(e *Endpoint) { e.Repository = "a?b" },
	} {
		a := Access{Endpoints: []Endpoint{{Host: "h", Repository: "r", Security: SecurityTLS}}}
		change(&a.Endpoints[0])
		if _, err := Open(a, Options{}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", a, err)
		}
	}
	if _, err := Open(Access{}, Options{}); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
}

// TestClientCertificate: the registry it is for sees it, the host of a redirect does not, and
// neither does that host's own certificate go unchecked because the registry is insecure.
func TestClientCertificate(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, &tmpl, &tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	kder, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	pair := KeyPair{Cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), Key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kder})}
	blob := []byte("blob")
	var mu sync.Mutex
	certs := map[string]int{}
	server := func(name string, h http.HandlerFunc) *httptest.Server {
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			certs[name] += len(r.TLS.PeerCertificates)
			mu.Unlock()
			h(w, r)
		}))
		s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
		s.StartTLS()
		t.Cleanup(s.Close)
		return s
	}
	storage := server("storage", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(blob) })
	reg := server("registry", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, storage.URL, http.StatusTemporaryRedirect)
	})
	for _, c := range []struct {
		security string
		ca       bool
		ok       bool
	}{{SecurityTLS, true, true}, {SecurityInsecure, true, true}, {SecurityInsecure, false, false}} {
		e := Endpoint{Host: strings.TrimPrefix(reg.URL, "https://"), Repository: "app", Security: c.security, Certs: []KeyPair{pair}}
		if c.ca {
			e.CAs = [][]byte{pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: reg.Certificate().Raw})}
		}
		r, err := Open(Access{Endpoints: []Endpoint{e}}, patient)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := content(t, r, blob); (err == nil) != c.ok {
			t.Errorf("%+v: %v", c, err)
		}
		r.Close()
	}
	if certs["registry"] == 0 || certs["storage"] != 0 {
		t.Errorf("client certificates were shown to %v", certs)
	}
}

// TestMirrors: in order, and what one does not have or gets wrong comes from the next.
func TestMirrors(t *testing.T) {
	first, second, origin := registrytest.New(t), registrytest.New(t), registrytest.New(t)
	blob := bytes.Repeat([]byte("0123456789"), 10_000)
	raw := []byte(`{"schemaVersion":2}`)
	for _, reg := range []*registrytest.Server{second, origin} {
		reg.Put("app", blob)
		reg.PutManifest("app", "1", ocispec.MediaTypeImageManifest, raw)
	}
	origin.User = "nobody" // a credential of a mirror is not for the registry, nor the other way round
	r := open(t, func(a *Access) { a.Endpoints[1].Credential = login }, first, second, origin)
	d, _, err := r.Manifest(t.Context(), "1")
	if err != nil || d.Digest != digest.FromBytes(raw) {
		t.Fatal(err)
	}
	mustGet(t, r, blob)
	if n := len(first.Log()); n != 1 { // asked once, and then the one that had the manifest
		t.Errorf("the first mirror was asked %d times", n)
	}
	if log := origin.Log(); len(log) > 0 {
		t.Errorf("the registry was asked %v", log)
	}
	// In the middle of a blob.
	origin.Lock(func() { origin.User = "" })
	second.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		if r.Header.Get("Range") != "" {
			w.WriteHeader(http.StatusNotFound)
			return true
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
		_, _ = w.Write(blob[:40_000])
		registrytest.Cut(w)
		return true
	})
	mustGet(t, r, blob)
	if log := origin.Log(); len(log) != 1 || log[0].Range != "bytes=40000-" || log[0].Authorization != "" {
		t.Errorf("the registry was asked %+v", log)
	}
	// All fail: the error is that of the registry, and names the others.
	_, err = r.Resolve(t.Context(), "2")
	if !errors.Is(err, ErrNotFound) || strings.Count(err.Error(), "mirror") != 2 {
		t.Error(err)
	}
	// A push goes to the registry.
	if err := r.PushManifest(t.Context(), ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(raw)}, raw, "3"); err != nil {
		t.Error(err)
	}
	if origin.Manifest("app", "3") == nil || second.Manifest("app", "3") != nil {
		t.Error("the push went elsewhere")
	}
}

func TestProxy(t *testing.T) {
	var mu sync.Mutex
	var asked []string
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, r.Host)
		w.WriteHeader(http.StatusNotFound)
	}))
	defer proxy.Close()
	get := func(no string) error {
		r, err := Open(Access{
			Endpoints: []Endpoint{{Host: "registry.invalid", Repository: "app", Security: SecurityPlain}},
			Proxy:     Proxy{HTTP: proxy.URL, No: no},
		}, patient)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		_, err = r.Resolve(t.Context(), "1")
		return err
	}
	if err := get(""); !errors.Is(err, ErrNotFound) || !slices.Equal(asked, []string{"registry.invalid"}) {
		t.Errorf("the proxy was asked %q: %v", asked, err)
	}
	if err := get("invalid"); errors.Is(err, ErrNotFound) || len(asked) != 1 {
		t.Errorf("in spite of NO_PROXY the proxy was asked %q: %v", asked, err)
	}
}

// TestSlow: nobody keeps us waiting for ever, at any point.
func TestSlow(t *testing.T) {
	blob := bytes.Repeat([]byte("x"), 100_000)
	drip := func(w http.ResponseWriter, r *http.Request) { // a byte at a time
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			if _, err := w.Write([]byte("x")); err != nil {
				return
			}
			w.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
				return
			case <-tick.C:
			}
		}
	}
	for name, fault := range map[string]func(w http.ResponseWriter, r *http.Request){
		"no answer":      func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"drip":           func(w http.ResponseWriter, r *http.Request) { w.Header().Set("Content-Length", "100000"); drip(w, r) },
		"drip in chunks": drip,
		"dripping error": func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusForbidden); drip(w, r) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := registrytest.New(t)
			reg.Put("app", blob)
			reg.Fault = func(w http.ResponseWriter, r *http.Request) bool { fault(w, r); return true }
			r := openWith(t, hasty, nil, reg)
			start := time.Now()
			if _, err := content(t, r, blob); err == nil {
				t.Error("no error")
			}
			if _, _, err := r.Manifest(t.Context(), "1"); err == nil {
				t.Error("no error")
			}
			limit := 10 * time.Second
			if strings.Contains(name, "error") {
				limit = 25 * time.Second // 10 s for what it says, each time
			}
			if d := time.Since(start); d > limit {
				t.Errorf("it took %s", d)
			}
		})
	}
	t.Run("upload", func(t *testing.T) {
		reg := registrytest.New(t)
		done := make(chan struct{})
		defer close(done) // a server does not notice who goes while it does not read
		reg.Fault = func(_ http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPut {
				<-done
				return true
			}
			return false
		}
		r := openWith(t, hasty, nil, reg)
		big := bytes.Repeat([]byte("x"), 50<<20) // more than sockets buffer
		err := r.PushBlob(t.Context(), ocispec.Descriptor{Digest: digest.FromBytes(big), Size: int64(len(big))}, func(int64) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(big)), nil })
		if !errors.Is(err, ErrUnavailable) {
			t.Error(err)
		}
	})
	t.Run("cancel", func(t *testing.T) {
		reg := registrytest.New(t)
		reg.Fault = func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true }
		r := openWith(t, hasty, nil, reg)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(50*time.Millisecond, cancel)
		if _, _, err := r.Manifest(ctx, "1"); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// TestUploadGoesOn: what has arrived of an upload that broke is not sent again, unless the
// registry has forgotten it, or cannot go on.
func TestUploadGoesOn(t *testing.T) {
	blob := bytes.Repeat([]byte("0123456789"), 100_000)
	d := ocispec.Descriptor{Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	for name, fault := range map[string]func(w http.ResponseWriter, r *http.Request) bool{
		"goes on": func(http.ResponseWriter, *http.Request) bool { return false },
		"forgotten": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet {
				w.WriteHeader(http.StatusNotFound)
				return true
			}
			return false
		},
		"says nonsense": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet {
				w.Header().Set("Range", "0-99999999")
				w.WriteHeader(http.StatusNoContent)
				return true
			}
			return false
		},
		"says less than it has": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet {
				w.Header().Set("Range", "0-9")
				w.WriteHeader(http.StatusNoContent)
				return true
			}
			return false
		},
	} {
		t.Run(name, func(t *testing.T) {
			reg := registrytest.New(t)
			reg.CutUploads, reg.Fault = 2, fault
			r := open(t, nil, reg)
			var offsets []int64
			err := r.PushBlob(t.Context(), d, func(off int64) (io.ReadCloser, error) {
				offsets = append(offsets, off)
				return io.NopCloser(bytes.NewReader(blob[off:])), nil
			})
			if err != nil || !bytes.Equal(reg.Blob("app", d.Digest), blob) {
				t.Fatal(offsets, err)
			}
			if went := len(offsets) == 3 && offsets[1] > 0 && offsets[2] > offsets[1]; went != (name == "goes on") {
				t.Errorf("sent from %v on", offsets)
			}
		})
	}
}

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-1/2", "bytes 5-9/*", "bytes */3", "", "bytes 9223372036854775807-9223372036854775808/1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if from, total, ok := contentRange(s); ok && (from < 0 || total < -1) {
			t.Errorf("%q: %d %d", s, from, total)
		}
	})
}
