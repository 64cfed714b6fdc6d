package registry

import (
	"fmt"
	"net"
	"strings"
)

// Access is everything that is needed to reach one repository. It is made by
// [Discover] and may be sent to another process; it holds secrets.
type Access struct {
	// Endpoints are tried in this order; the last one is the registry itself, the
	// ones before are its mirrors. A push goes to the last one.
	Endpoints []Endpoint `json:"endpoints"`
	Proxy     Proxy      `json:"proxy"`
	// Notes are sentences for the user: what was found but not used.
	Notes []string `json:"notes,omitempty"`
}

// Security of a connection to an endpoint.
const (
	SecurityTLS      = "tls"      // https, with a certificate that is trusted
	SecurityInsecure = "insecure" // https with any certificate; http if that is what the registry speaks
	SecurityPlain    = "plain"    // http
)

// Endpoint is one place that has a repository.
type Endpoint struct {
	Host       string `json:"host"` // host or host:port to connect to
	Repository string `json:"repository"`
	Security   string `json:"security"`
	Mirror     bool   `json:"mirror,omitempty"`
	// CAs are PEM files, trusted beside those of the machine.
	CAs        [][]byte   `json:"cas,omitempty"`
	Certs      []KeyPair  `json:"certs,omitempty"` // for a registry that asks for a client's
	Credential Credential `json:"credential"`
}

// KeyPair is a client certificate and its key, PEM.
type KeyPair struct {
	Cert []byte `json:"cert"`
	Key  []byte `json:"key"`
}

// String hides the key.
func (KeyPair) String() string { return "<certificate>" }

// GoString hides the key.
func (KeyPair) GoString() string { return "<certificate>" }

// Credential is what docker login or podman login has left for a registry. All
// empty: none.
type Credential struct {
	Username      string `json:"username,omitempty"`
	Password      string `json:"password,omitempty"`
	IdentityToken string `json:"identityToken,omitempty"` // to get tokens with
	RegistryToken string `json:"registryToken,omitempty"` // to be used as it is
}

// String hides the secrets.
func (c Credential) String() string {
	if c == (Credential{}) {
		return "<none>"
	}
	return "<credential>"
}

// GoString hides the secrets.
func (c Credential) GoString() string { return c.String() }

// Proxy is what the variables HTTP_PROXY, HTTPS_PROXY and NO_PROXY say.
type Proxy struct {
	HTTP  string `json:"http,omitempty"`
	HTTPS string `json:"https,omitempty"`
	No    string `json:"no,omitempty"`
}

// String hides passwords of proxies.
func (Proxy) String() string { return "<proxy>" }

// GoString hides them too.
func (Proxy) GoString() string { return "<proxy>" }

// check looks at what another process may have sent.
func (a Access) check() error {
	if len(a.Endpoints) == 0 {
		return fmt.Errorf("%w: no endpoint", ErrInvalid)
	}
	if len(a.Endpoints) > 64 {
		return fmt.Errorf("%w: %d endpoints", ErrInvalid, len(a.Endpoints))
	}
	for _, e := range a.Endpoints {
		switch e.Security {
		case SecurityTLS, SecurityInsecure, SecurityPlain:
		default:
			return fmt.Errorf("%w: endpoint %q: security %q", ErrInvalid, e.Host, e.Security)
		}
		if e.Host == "" || strings.ContainsAny(e.Host, "/@?#\\ \t\r\n") || e.Repository == "" || strings.ContainsAny(e.Repository, "?#%\\ \t\r\n") {
			return fmt.Errorf("%w: endpoint %q, repository %q", ErrInvalid, e.Host, e.Repository)
		}
	}
	return nil
}

// Loopback reports whether a registry is on this machine by its name.
func Loopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
