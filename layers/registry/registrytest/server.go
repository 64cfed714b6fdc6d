package registrytest

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// Request is what a client has asked.
type Request struct {
	Method, Path, Query, Range, Authorization, Host string
}

// String is the method and path.
func (r Request) String() string { return r.Method + " " + r.Path }

// Server is a registry. Its fields are set before the first request, or under Lock.
type Server struct {
	*httptest.Server
	// Fault sees each request first. It answers and returns true, or returns false.
	Fault func(w http.ResponseWriter, r *http.Request) bool
	// CutUploads is how many uploads break after a third of what they bring.
	CutUploads int
	// User and Password are asked for if set: as tokens if Tokens, else as basic
	// authentication.
	User, Password string
	Tokens         bool

	mu        sync.Mutex
	blobs     map[digest.Digest][]byte
	has       map[string]bool // repository@digest
	manifests map[string]manifest
	log       []Request
	uploads   map[string][]byte // what has arrived, by path
	tls       bool
}

type manifest struct {
	mediaType string
	raw       []byte
}

// New starts a registry on loopback, over http; it ends with the test.
func New(t testing.TB) *Server { return start(t, false) }

// NewTLS starts one over https, with a certificate that nobody trusts.
func NewTLS(t testing.TB) *Server { return start(t, true) }

func start(t testing.TB, tls bool) *Server {
	s := &Server{blobs: map[digest.Digest][]byte{}, has: map[string]bool{}, uploads: map[string][]byte{}, manifests: map[string]manifest{}, tls: tls}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	if tls {
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(func() {
		s.CloseClientConnections() // a client that is stuck must not keep us
		s.Close()
	})
	return s
}

// Host is the name of the registry.
func (s *Server) Host() string { return s.Listener.Addr().String() }

// Lock runs f while no request changes anything.
func (s *Server) Lock(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// SetFault changes the fault while requests may come.
func (s *Server) SetFault(f func(w http.ResponseWriter, r *http.Request) bool) {
	s.Lock(func() { s.Fault = f })
}

// Put adds a blob to a repository.
func (s *Server) Put(repo string, b []byte) digest.Digest {
	d := digest.FromBytes(b)
	s.Lock(func() { s.blobs[d], s.has[repo+"@"+d.String()] = b, true })
	return d
}

// PutAs adds a blob under a digest that is not its own.
func (s *Server) PutAs(repo string, d digest.Digest, b []byte) {
	s.Lock(func() { s.blobs[d], s.has[repo+"@"+d.String()] = b, true })
}

// PutManifest adds a manifest under its digest, and a tag unless that is empty.
func (s *Server) PutManifest(repo, tag, mediaType string, raw []byte) digest.Digest {
	d := digest.FromBytes(raw)
	s.Lock(func() {
		s.manifests[repo+"@"+d.String()] = manifest{mediaType, raw}
		if tag != "" {
			s.manifests[repo+"@"+tag] = manifest{mediaType, raw}
		}
	})
	return d
}

// Manifest returns a manifest by tag or digest; nil if there is none.
func (s *Server) Manifest(repo, version string) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.manifests[repo+"@"+version].raw
}

// Blob returns a blob of a repository; nil if there is none.
func (s *Server) Blob(repo string, d digest.Digest) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.has[repo+"@"+d.String()] {
		return nil
	}
	return s.blobs[d]
}

// Log returns what has been asked since the last call.
func (s *Server) Log() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.log
	s.log = nil
	return out
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.log = append(s.log, Request{r.Method, r.URL.Path, r.URL.RawQuery, r.Header.Get("Range"), r.Header.Get("Authorization"), r.Host})
	fault := s.Fault
	s.mu.Unlock()
	if fault != nil && fault(w, r) {
		return
	}
	if r.URL.Path == "/token" {
		s.token(w, r)
		return
	}
	if !s.allowed(w, r) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	path, ok := strings.CutPrefix(r.URL.Path, "/v2/")
	if !ok {
		http.NotFound(w, r)
		return
	}
	if path == "" {
		return
	}
	if repo, version, ok := cutLast(path, "/manifests/"); ok {
		s.manifest(w, r, repo, version)
	} else if repo, _, ok := cutLast(path, "/blobs/uploads/"); ok {
		s.upload(w, r, repo)
	} else if repo, d, ok := cutLast(path, "/blobs/"); ok {
		s.blob(w, r, repo, digest.Digest(d))
	} else {
		http.NotFound(w, r)
	}
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

func (s *Server) allowed(w http.ResponseWriter, r *http.Request) bool {
	if s.User == "" {
		return true
	}
	if s.Tokens {
		repo, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/blobs/")
		repo, _, _ = strings.Cut(repo, "/manifests/")
		action := "pull"
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			action = "push"
		}
		got, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if slices.ContainsFunc(strings.Split(got, " "), func(scope string) bool {
			p := strings.Split(scope, ":")
			return len(p) == 3 && p[1] == repo && slices.Contains(strings.Split(p[2], ","), action)
		}) {
			return true
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf("Bearer realm=%q,service=%q,scope=%q", s.URL+"/token", "test", "repository:"+repo+":"+action))
	} else {
		if user, password, ok := r.BasicAuth(); ok && user == s.User && password == s.Password {
			return true
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
	}
	w.WriteHeader(http.StatusUnauthorized)
	fmt.Fprint(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
	return false
}

// token gives a token that is the scopes that were asked for.
func (s *Server) token(w http.ResponseWriter, r *http.Request) {
	if r.FormValue("grant_type") == "refresh_token" && r.FormValue("refresh_token") == s.Password {
		fmt.Fprintf(w, `{"access_token":%q}`, r.FormValue("scope"))
		return
	}
	user, password, _ := r.BasicAuth()
	if user != s.User || password != s.Password {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	fmt.Fprintf(w, `{"token":%q}`, strings.Join(r.URL.Query()["scope"], " "))
}

func (s *Server) manifest(w http.ResponseWriter, r *http.Request, repo, version string) {
	if r.Method == http.MethodPut {
		raw, err := io.ReadAll(r.Body)
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		m := manifest{r.Header.Get("Content-Type"), raw}
		d := digest.FromBytes(raw)
		s.manifests[repo+"@"+version], s.manifests[repo+"@"+d.String()] = m, m
		w.Header().Set("Docker-Content-Digest", d.String())
		w.WriteHeader(http.StatusCreated)
		return
	}
	m, ok := s.manifests[repo+"@"+version]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}`)
		return
	}
	w.Header().Set("Content-Type", m.mediaType)
	w.Header().Set("Content-Length", fmt.Sprint(len(m.raw)))
	w.Header().Set("Docker-Content-Digest", digest.FromBytes(m.raw).String())
	if r.Method == http.MethodGet {
		_, _ = w.Write(m.raw) // the client may be gone
	}
}

func (s *Server) blob(w http.ResponseWriter, r *http.Request, repo string, d digest.Digest) {
	b, ok := s.blobs[d]
	if !ok || !s.has[repo+"@"+d.String()] {
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown to registry"}]}`)
		return
	}
	w.Header().Set("Docker-Content-Digest", d.String())
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b)) // with ranges
}

func (s *Server) upload(w http.ResponseWriter, r *http.Request, repo string) {
	q := r.URL.Query()
	switch r.Method {
	case http.MethodPost:
		if d := q.Get("mount"); d != "" && s.has[q.Get("from")+"@"+d] {
			s.has[repo+"@"+d] = true
			w.Header().Set("Docker-Content-Digest", d)
			w.WriteHeader(http.StatusCreated)
			return
		}
		path := fmt.Sprintf("/v2/%s/blobs/uploads/%d", repo, len(s.uploads))
		s.uploads[path] = nil
		w.Header().Set("Location", path+"?_state="+url.QueryEscape("secret state"))
		w.WriteHeader(http.StatusAccepted)
	case http.MethodGet:
		w.Header().Set("Location", r.URL.Path+"?_state=new")
		w.Header().Set("Range", fmt.Sprintf("0-%d", max(len(s.uploads[r.URL.Path])-1, 0)))
		w.WriteHeader(http.StatusNoContent)
	case http.MethodPut:
		body := io.Reader(r.Body)
		cut := s.CutUploads > 0
		if cut {
			s.CutUploads--
			body = io.LimitReader(body, r.ContentLength/3)
		}
		s.mu.Unlock() // the body may be long in coming
		raw, err := io.ReadAll(body)
		s.mu.Lock()
		raw = append(s.uploads[r.URL.Path], raw...)
		s.uploads[r.URL.Path] = raw
		if cut {
			Reset(w)
			return
		}
		d := digest.Digest(q.Get("digest"))
		if err != nil || digest.FromBytes(raw) != d {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, `{"errors":[{"code":"DIGEST_INVALID","message":"provided digest did not match uploaded content"}]}`)
			return
		}
		s.blobs[d], s.has[repo+"@"+d.String()] = raw, true
		w.WriteHeader(http.StatusCreated)
	default:
		w.WriteHeader(http.StatusMethodNotAllowed)
	}
}

// Cut ends the connection of a request in the middle: what was written reaches the
// client, and then nothing.
func Cut(w http.ResponseWriter) {
	if f, ok := w.(http.Flusher); ok {
		f.Flush()
	}
	c, _, err := http.NewResponseController(w).Hijack()
	if err == nil {
		_ = c.Close() // that is the point
	}
}

// Reset ends it with a reset.
func Reset(w http.ResponseWriter) {
	c, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // which makes it one
	}
	_ = c.Close()
}
