package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/net/http/httpproxy"
)

// Env is where [Discover] looks.
type Env struct {
	Get  func(string) string // a variable
	Home string              // "": none
	Etc  string              // "/etc"
	UID  int
}

// SystemEnv is that of this process.
func SystemEnv() Env {
	home, err := os.UserHomeDir()
	if err != nil {
		home = ""
	}
	return Env{Get: os.Getenv, Home: home, Etc: "/etc", UID: os.Geteuid()}
}

func (e Env) config() string {
	if d := e.Get("XDG_CONFIG_HOME"); d != "" {
		return d
	}
	if e.Home == "" {
		return ""
	}
	return filepath.Join(e.Home, ".config")
}

// inHome joins a path below the user's configuration; "" if there is none.
func inHome(dir string, elem ...string) string {
	if dir == "" {
		return ""
	}
	return filepath.Join(append([]string{dir}, elem...)...)
}

// DiscoverOptions configure [Discover].
type DiscoverOptions struct {
	Push bool // no mirrors
	// PlainHTTP asks a registry of this machine over http.
	PlainHTTP bool
}

// hubHost is where docker.io is served.
const hubHost = "registry-1.docker.io"

// Discover finds out how to reach the repository of a reference. It may run the
// credential helpers that the user has configured.
func Discover(ctx context.Context, ref Reference, env Env, o DiscoverOptions) (Access, error) {
	var a Access
	if o.PlainHTTP && !Loopback(ref.Host()) {
		return a, fmt.Errorf("%w: --plain-http is for a registry on this machine, not for %q: whoever is on the way could read and change everything. "+
			"To do so nevertheless, set insecure = true for it in registries.conf", ErrInvalid, ref.Host())
	}
	conf, err := loadRegistries(env)
	if err != nil {
		return a, err
	}
	places, err := conf.places(ref, o.Push)
	if err != nil {
		return a, err
	}
	auths := loadAuths(env)
	for _, p := range places {
		host, repo, ok := strings.Cut(p.name, "/")
		if !ok || host == "" || repo == "" {
			return a, fmt.Errorf("%w: registries.conf makes %q of %s: expected HOST/REPOSITORY", ErrInvalid, p.name, ref.Name())
		}
		e := Endpoint{Host: host, Repository: repo, Mirror: p.mirror, Security: SecurityTLS}
		switch {
		case o.PlainHTTP && !p.mirror:
			e.Security = SecurityPlain
		case p.insecure:
			e.Security = SecurityInsecure
		}
		if e.Security != SecurityPlain {
			if err := e.readCerts(env, &a.Notes); err != nil {
				return a, err
			}
		}
		if e.Credential, err = auths.find(ctx, host, repo); err != nil {
			a.Notes = append(a.Notes, fmt.Sprintf("no credentials for %s: %v", host, err))
		}
		if host == "docker.io" {
			e.Host = hubHost
		}
		a.Endpoints = append(a.Endpoints, e)
	}
	a.Notes = append(a.Notes, auths.notes...)
	a.Proxy = proxyOf(env)
	return a, nil
}

// proxyOf reads the variables as net/http does: lower case ones too.
func proxyOf(env Env) Proxy {
	get := func(name string) string {
		if v := env.Get(name); v != "" {
			return v
		}
		return env.Get(strings.ToLower(name))
	}
	p := Proxy{HTTP: get("HTTP_PROXY"), HTTPS: get("HTTPS_PROXY"), No: get("NO_PROXY")}
	if env.Get("REQUEST_METHOD") != "" {
		p.HTTP = "" // a CGI program's HTTP_PROXY comes from whoever asks
	}
	return p
}

func (p Proxy) config() *httpproxy.Config {
	return &httpproxy.Config{HTTPProxy: p.HTTP, HTTPSProxy: p.HTTPS, NoProxy: p.No}
}

// configMax bounds each configuration file.
const configMax = 4 << 20

// readFile reads a configuration file; nil if there is none.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) || path == "" {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, configMax+1))
	if err == nil && len(raw) > configMax {
		err = fmt.Errorf("%s: %w: more than %d bytes", path, ErrUnsupported, configMax)
	}
	if err == nil && raw == nil {
		raw = []byte{}
	}
	return raw, err
}
