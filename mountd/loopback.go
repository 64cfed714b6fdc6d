package mountd

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"go.uber.org/zap"
)

// serveMetrics serves metrics, and nothing else, over HTTP on a loopback address. It returns
// where, and what ends that.
func serveMetrics(ctx context.Context, address string, metrics http.Handler, log *zap.Logger) (where net.Addr, stop func(), err error) {
	at, err := loopback(address)
	if err != nil {
		return nil, nil, err
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", at.String())
	if err != nil {
		return nil, nil, fmt.Errorf("address %q for metrics: %w", address, err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET "+metricsPath, metrics)
	srv := &http.Server{
		Handler:           onlyLoopback(mux),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      2 * scrapeTimeout,
		IdleTimeout:       idleClose,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          zap.NewStdLog(log.Named("metrics")),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(ln) // ends when it is closed
	}()
	log.Info("metrics are served", zap.String("name", "http://"+ln.Addr().String()+metricsPath))
	return ln.Addr(), func() {
		_ = srv.Close() // who asks for metrics asks again
		<-done
	}, nil
}

// loopback parses an address and refuses all that others than this machine reach: there is
// no password, and names of mount points are among the metrics.
func loopback(address string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(address)
	if err == nil && host == "localhost" {
		address = net.JoinHostPort("127.0.0.1", port)
	}
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return at, markedf(ErrUsage, "address %q for metrics: expected 127.0.0.1:PORT or [::1]:PORT", address)
	}
	if !at.Addr().IsLoopback() {
		return at, markedf(ErrUsage, "address %q for metrics is not one of the loopback interface: use 127.0.0.1:PORT, and a proxy that knows who may ask", address)
	}
	return at, nil
}

// onlyLoopback refuses requests that were meant for a name: a web page can make a browser
// take our address for one of its own.
func onlyLoopback(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		if ip, err := netip.ParseAddr(strings.Trim(host, "[]")); host != "localhost" && (err != nil || !ip.IsLoopback()) {
			http.Error(w, "ask by the address", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}
