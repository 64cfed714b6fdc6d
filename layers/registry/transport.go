package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"oras.land/oras-go/v2/registry/remote/retry"
)

// Options configure [Open]. Zero fields take the defaults.
type Options struct {
	Upload        bool          // registries may take their time to look at what they are sent
	UserAgent     string        // "": plyfs
	ManifestBytes int64         // largest manifest; 0: 4 MiB
	Answer        time.Duration // until the headers of an answer come; 0: 1 min (uploads 15 min)
	Stall         time.Duration // in which a body must bring StallBytes; 0: 1 min
	StallBytes    int64         // 0: 4 KiB
	Backoff       time.Duration // before the second attempt, doubled each time; 0: 500 ms
	MaxBackoff    time.Duration // 0: 15 s
	Attempts      int           // of a transfer that brings nothing; 0: 7
}

func (o Options) withDefaults() Options {
	def := func(p *time.Duration, v time.Duration) {
		if *p == 0 {
			*p = v
		}
	}
	if o.UserAgent == "" {
		o.UserAgent = "plyfs"
	}
	if o.ManifestBytes == 0 {
		o.ManifestBytes = 4 << 20
	}
	if o.StallBytes == 0 {
		o.StallBytes = 4 << 10
	}
	if o.Attempts == 0 {
		o.Attempts = 7
	}
	if o.Upload {
		def(&o.Answer, 15*time.Minute)
	}
	def(&o.Answer, time.Minute)
	def(&o.Stall, time.Minute)
	def(&o.Backoff, 500*time.Millisecond)
	def(&o.MaxBackoff, 15*time.Second)
	return o
}

// transport sends requests of one endpoint. What leads to other hosts takes another
// way, without the endpoint's client certificate and its insecurity.
type transport struct {
	host       string
	own, other *http.Transport
}

func newTransport(e Endpoint, p Proxy, o Options) (*transport, error) {
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	for _, ca := range e.CAs {
		if !pool.AppendCertsFromPEM(ca) {
			return nil, fmt.Errorf("%w: a .crt file of %s holds no PEM certificate", ErrInvalid, e.Host)
		}
	}
	t := &transport{host: e.Host}
	// The same authorities for all: a private registry has private neighbours.
	t.other = base(p, o, &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12})
	own := &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12, InsecureSkipVerify: e.Security == SecurityInsecure}
	for _, c := range e.Certs {
		pair, err := tls.X509KeyPair(c.Cert, c.Key)
		if err != nil {
			return nil, fmt.Errorf("%w: client certificate of %s: %w", ErrInvalid, e.Host, err)
		}
		own.Certificates = append(own.Certificates, pair)
	}
	t.own = base(p, o, own)
	return t, nil
}

func base(p Proxy, o Options, c *tls.Config) *http.Transport {
	proxy := p.config().ProxyFunc()
	d := &net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}
	return &http.Transport{
		Proxy:                  func(r *http.Request) (*url.URL, error) { return proxy(r.URL) },
		DialContext:            d.DialContext,
		TLSClientConfig:        c,
		TLSHandshakeTimeout:    30 * time.Second,
		ResponseHeaderTimeout:  o.Answer,
		MaxResponseHeaderBytes: 256 << 10,
		IdleConnTimeout:        30 * time.Second,
		MaxIdleConnsPerHost:    8,
		ForceAttemptHTTP2:      true,
		DisableCompression:     true, // a digest is of the bytes as they are
	}
}

// RoundTrip implements http.RoundTripper.
func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if strings.EqualFold(r.URL.Host, t.host) {
		return t.own.RoundTrip(r)
	}
	return t.other.RoundTrip(r)
}

func (t *transport) close() {
	t.own.CloseIdleConnections()
	t.other.CloseIdleConnections()
}

// errRedirect ends a request that was led where it must not go.
var errRedirect = errors.New("redirect refused")

// checkRedirect follows what keeps the promises of the package. Credentials are
// dropped by oras-go's client.
func checkRedirect(r *http.Request, via []*http.Request) error {
	first := via[0]
	switch {
	case len(via) >= 10:
		return fmt.Errorf("%w: more than 10 in a row", errRedirect)
	case r.URL.Scheme != "https" && via[len(via)-1].URL.Scheme == "https":
		return fmt.Errorf("%w: from https to %s on %s", errRedirect, printable(r.URL.Scheme), printable(r.URL.Host))
	case r.URL.User != nil:
		return fmt.Errorf("%w: to a URL with a user name", errRedirect)
	case first.Method != http.MethodGet && first.Method != http.MethodHead && !strings.EqualFold(r.URL.Host, first.URL.Host):
		return fmt.Errorf("%w: an upload to another host, %s", errRedirect, printable(r.URL.Host))
	}
	return nil
}

// retries wraps a transport so that a request that got no answer, or one that says
// later, is sent again.
func retries(base http.RoundTripper, o Options) http.RoundTripper {
	t := retry.NewTransport(base)
	t.Policy = func() retry.Policy {
		return &retry.GenericPolicy{
			Retryable: retryable,
			Backoff:   retry.ExponentialBackoff(o.Backoff, 2, 0.1),
			MinWait:   o.Backoff / 2, MaxWait: o.MaxBackoff, MaxRetry: 3,
		}
	}
	return t
}

func retryable(resp *http.Response, err error) (bool, error) {
	if err != nil {
		var ne net.Error
		again := errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || isEOF(err) || errors.As(err, &ne) && ne.Timeout()
		if again && !errors.Is(err, context.DeadlineExceeded) {
			return true, nil
		}
		return false, err
	}
	switch resp.StatusCode {
	case http.StatusRequestTimeout, http.StatusTooManyRequests,
		http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true, nil
	}
	return false, nil
}
