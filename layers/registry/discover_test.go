package registry

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// home is a user's home and a machine's /etc for a test.
func home(t *testing.T, vars map[string]string, files map[string]string) Env {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o600)
		if strings.HasPrefix(name, "bin/") {
			mode = 0o755
		}
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	return Env{
		Get:  func(v string) string { return strings.ReplaceAll(vars[v], "$DIR", dir) },
		Home: filepath.Join(dir, "home"), Etc: filepath.Join(dir, "etc"), UID: 4711,
	}
}

func mustParse(t *testing.T, name string) Reference {
	t.Helper()
	r, err := Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func basic(user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
}

func TestParse(t *testing.T) {
	const d = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for name, want := range map[string]string{
		"debian":                  "docker.io/library/debian latest debian:latest true",
		"debian:12":               "docker.io/library/debian 12 debian:12 false",
		"team/app":                "docker.io/team/app latest team/app:latest true",
		"127.0.0.1:5000/app:1":    "127.0.0.1:5000/app 1 127.0.0.1:5000/app:1 false",
		"localhost/a/b/c":         "localhost/a/b/c latest localhost/a/b/c:latest true",
		"host.example/app@" + d:   "host.example/app " + d + " host.example/app@" + d + " false",
		"host.example/app:1@" + d: "host.example/app " + d + " host.example/app@" + d + " false",
	} {
		r := mustParse(t, name)
		if got := fmt.Sprint(r.Name(), " ", r.Version(), " ", r.Familiar(), " ", r.Implied); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	for _, name := range []string{"", "Debian", "a:b:c", "http://host/x", strings.Repeat("a", 64), "x@sha256:1", "../x", "x y"} {
		if _, err := Parse(name); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := Parse("x@sha512:" + strings.Repeat("0", 128)); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
}

func TestRegistriesConf(t *testing.T) {
	const d = "@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	conf := `
unqualified-search-registries = ["evil.example"]
short-name-mode = "enforcing"

[[registry]]
location = "docker.io"
[[registry.mirror]]
location = "mirror.example:5000/hub/"
insecure = true
[[registry.mirror]]
location = "second.example"
pull-from-mirror = "digest-only"
[[registry.mirror]]
location = "third.example"
pull-from-mirror = "tag-only"

[[registry]]
prefix = "corp.example/team"
location = "inside.example/t"

[[registry]]
prefix = "corp.example/team/secret"
blocked = true

[[registry]]
prefix = "*.wild.example"
insecure = true

[[registry]]
prefix = "only.example"
mirror-by-digest-only = true
[[registry.mirror]]
location = "copy.example"
`
	env := home(t, nil, map[string]string{
		"etc/containers/registries.conf":          conf,
		"etc/containers/registries.conf.d/a.conf": "[[registry]]\nlocation = \"late.example\"\ninsecure = true\n",
		"etc/containers/registries.conf.d/b.conf": "[[registry]]\nlocation = \"late.example\"\n",
		"etc/containers/registries.conf.d/c.txt":  "this is no configuration",
	})
	show := func(a Access) string {
		var out []string
		for _, e := range a.Endpoints {
			out = append(out, fmt.Sprintf("%s %s %s", e.Host, e.Repository, e.Security))
		}
		return strings.Join(out, ", ")
	}
	for _, c := range []struct{ name, pull, push string }{
		{"debian", "mirror.example:5000 hub/library/debian insecure, third.example library/debian tls, registry-1.docker.io library/debian tls", "registry-1.docker.io library/debian tls"},
		{"debian" + d, "mirror.example:5000 hub/library/debian insecure, second.example library/debian tls, registry-1.docker.io library/debian tls", "registry-1.docker.io library/debian tls"},
		{"corp.example/team/app:1", "inside.example t/app tls", "inside.example t/app tls"},
		{"corp.example/teamwork:1", "corp.example teamwork tls", "corp.example teamwork tls"},
		{"corp.example/team/secretary", "inside.example t/secretary tls", "inside.example t/secretary tls"},
		{"a.b.wild.example/x", "a.b.wild.example x insecure", "a.b.wild.example x insecure"},
		{"wild.example/x", "wild.example x tls", "wild.example x tls"},
		{"only.example/x", "only.example x tls", "only.example x tls"},
		{"only.example/x" + d, "copy.example x tls, only.example x tls", "only.example x tls"},
		{"late.example/x", "late.example x tls", "late.example x tls"},
	} {
		for push, want := range map[bool]string{false: c.pull, true: c.push} {
			a, err := Discover(t.Context(), mustParse(t, c.name), env, DiscoverOptions{Push: push})
			if err != nil || show(a) != want {
				t.Errorf("%s, push %v: got %q (%v), want %q", c.name, push, show(a), err, want)
			}
		}
	}
	if _, err := Discover(t.Context(), mustParse(t, "corp.example/team/secret/x"), env, DiscoverOptions{}); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "blocks corp.example/team/secret") {
		t.Error(err)
	}
	// A user's file replaces that of the machine, a variable both; drop-ins stay.
	env = home(t, nil, map[string]string{
		"etc/containers/registries.conf":                    conf,
		"home/.config/containers/registries.conf":           "[registries.insecure]\nregistries = ['corp.example']\n",
		"home/.config/containers/registries.conf.d/mine":    "[[registry]]\nlocation = 'x.example'\nblocked = true\n",
		"home/.config/containers/registries.conf.d/my.conf": "[[registry]]\nlocation = 'y.example'\nblocked = true\n",
	})
	if a, err := Discover(t.Context(), mustParse(t, "corp.example/team/secret/x"), env, DiscoverOptions{}); err != nil || show(a) != "corp.example team/secret/x insecure" {
		t.Error(show(a), err)
	}
	if _, err := Discover(t.Context(), mustParse(t, "x.example/x"), env, DiscoverOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := Discover(t.Context(), mustParse(t, "y.example/x"), env, DiscoverOptions{}); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
	for name, text := range map[string]string{
		"no TOML":   "[[registry",
		"scheme":    "[[registry]]\nlocation = 'https://x'\n",
		"nothing":   "[[registry]]\ninsecure = true\n",
		"from when": "[[registry]]\nlocation = 'x'\n[[registry.mirror]]\nlocation = 'y'\npull-from-mirror = 'sometimes'\n",
	} {
		env := home(t, map[string]string{"CONTAINERS_REGISTRIES_CONF": "$DIR/r.conf"}, map[string]string{"r.conf": text})
		if _, err := Discover(t.Context(), mustParse(t, "x"), env, DiscoverOptions{}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	env = home(t, map[string]string{"CONTAINERS_REGISTRIES_CONF": "$DIR/absent"}, nil)
	if _, err := Discover(t.Context(), mustParse(t, "x"), env, DiscoverOptions{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("a file that was named and is not there: %v", err)
	}
}

func TestPlainHTTP(t *testing.T) {
	env := home(t, nil, nil)
	for _, name := range []string{"127.0.0.1:5000/x", "localhost:5000/x", "127.1.2.3/x", "localhost/x"} {
		a, err := Discover(t.Context(), mustParse(t, name), env, DiscoverOptions{PlainHTTP: true})
		if err != nil || a.Endpoints[0].Security != SecurityPlain {
			t.Errorf("%s: %+v %v", name, a, err)
		}
	}
	for _, name := range []string{"x", "host.example/x", "10.0.0.1:5000/x", "localhost.example/x"} {
		if _, err := Discover(t.Context(), mustParse(t, name), env, DiscoverOptions{PlainHTTP: true}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCredentials(t *testing.T) {
	helper := `#!/bin/sh
read server
case $1,$server in
get,helped.example) echo '{"ServerURL":"x","Username":"h","Secret":"s3"}' ;;
get,token.example) echo '{"ServerURL":"x","Username":"<token>","Secret":"idtoken"}' ;;
get,https://index.docker.io/v1/) echo '{"ServerURL":"x","Username":"hub","Secret":"s4"}' ;;
*) echo "credentials not found in native keychain"; exit 1 ;;
esac
`
	files := map[string]string{
		"run/containers/auth.json": fmt.Sprintf(`{"auths": {
			"one.example": {"auth": %q}, "one.example/team": {"auth": %q}, "one.example/team/app": {"auth": %q}}}`,
			basic("host", "p:1"), basic("team", "2"), basic("app", "3")),
		"home/.config/containers/auth.json": fmt.Sprintf(`{"auths": {"two.example": {"auth": %q}, "one.example": {"auth": %q}}}`, basic("two", "x"), basic("shadowed", "x")),
		"home/.docker/config.json": fmt.Sprintf(`{"auths": {"https://three.example/v2/": {"auth": %q}, "https://index.docker.io/v1/": {"auth": %q},
			"four.example": {"identitytoken": "id"}, "five.example": {"registrytoken": "reg"}, "six.example": {}, "bad.example": {"auth": "!"}},
			"credHelpers": {"helped.example": "test", "token.example": "test", "gone.example": "is-not-there", "odd.example": "../../bin/sh"}}`,
			basic("three", "x"), basic("hub", "pw")),
		"bin/docker-credential-test": helper,
	}
	env := home(t, map[string]string{"XDG_RUNTIME_DIR": "$DIR/run"}, files)
	t.Setenv("PATH", filepath.Join(filepath.Dir(env.Home), "bin")+":"+os.Getenv("PATH"))
	for name, want := range map[string]Credential{
		"one.example/team/app/sub":  {Username: "app", Password: "3"},
		"one.example/team/appendix": {Username: "team", Password: "2"},
		"one.example/other":         {Username: "host", Password: "p:1"},
		"two.example/x":             {Username: "two", Password: "x"},
		"three.example/x":           {Username: "three", Password: "x"},
		"debian":                    {Username: "hub", Password: "pw"},
		"four.example/x":            {IdentityToken: "id"},
		"five.example/x":            {RegistryToken: "reg"},
		"six.example/x":             {},
		"helped.example/x":          {Username: "h", Password: "s3"},
		"token.example/x":           {IdentityToken: "idtoken"},
		"nobody.example/x":          {},
	} {
		a, err := Discover(t.Context(), mustParse(t, name), env, DiscoverOptions{})
		if err != nil || a.Endpoints[0].Credential != want || len(a.Notes) > 0 {
			t.Errorf("%s: got %#v, %v, %v", name, [4]string{a.Endpoints[0].Credential.Username, a.Endpoints[0].Credential.Password, a.Endpoints[0].Credential.IdentityToken, a.Endpoints[0].Credential.RegistryToken}, a.Notes, err)
		}
	}
	// What cannot be used is told, without the secret.
	for _, name := range []string{"bad.example/x", "gone.example/x", "odd.example/x"} {
		a, err := Discover(t.Context(), mustParse(t, name), env, DiscoverOptions{})
		if err != nil || len(a.Notes) != 1 || a.Endpoints[0].Credential != (Credential{}) {
			t.Errorf("%s: %+v %v", name, a, err)
		}
	}
	// Docker's store for everything.
	env = home(t, nil, map[string]string{"home/.docker/config.json": `{"auths": {"https://index.docker.io/v1/": {}}, "credsStore": "test"}`})
	a, err := Discover(t.Context(), mustParse(t, "debian"), env, DiscoverOptions{})
	if err != nil || a.Endpoints[0].Credential != (Credential{Username: "hub", Password: "s4"}) {
		t.Error(a, err)
	}
	// A variable replaces all files, or that of docker.
	env = home(t, map[string]string{"REGISTRY_AUTH_FILE": "$DIR/mine.json", "XDG_RUNTIME_DIR": "$DIR/run"}, map[string]string{
		"mine.json": fmt.Sprintf(`{"auths": {"two.example": {"auth": %q}}}`, basic("mine", "x")), "run/containers/auth.json": files["run/containers/auth.json"],
	})
	for name, want := range map[string]string{"two.example/x": "mine", "one.example/x": ""} {
		if a, err := Discover(t.Context(), mustParse(t, name), env, DiscoverOptions{}); err != nil || a.Endpoints[0].Credential.Username != want {
			t.Error(name, a, err)
		}
	}
	env = home(t, map[string]string{"DOCKER_CONFIG": "$DIR/d"}, map[string]string{"d/config.json": fmt.Sprintf(`{"auths": {"two.example": {"auth": %q}}}`, basic("d", "x"))})
	if a, err := Discover(t.Context(), mustParse(t, "two.example/x"), env, DiscoverOptions{}); err != nil || a.Endpoints[0].Credential.Username != "d" {
		t.Error(a, err)
	}
	env = home(t, map[string]string{"REGISTRY_AUTH_FILE": "$DIR/bad.json"}, map[string]string{"bad.json": `{"auths": "geheim"}`})
	if a, err := Discover(t.Context(), mustParse(t, "two.example/x"), env, DiscoverOptions{}); err != nil || len(a.Notes) != 1 || strings.Contains(a.Notes[0], "geheim") {
		t.Error(a, err)
	}
}

// TestSecretsAreNotPrinted: whatever prints an Access does not print what is in it.
func TestSecretsAreNotPrinted(t *testing.T) {
	a := Access{
		Endpoints: []Endpoint{{Host: "h", Credential: Credential{Username: "u", Password: "geheim"}, Certs: []KeyPair{{Key: []byte("geheim")}}}},
		Proxy:     Proxy{HTTP: "http://u:geheim@proxy"},
	}
	for _, f := range []string{"%v", "%+v", "%s", "%#v"} {
		if text := fmt.Sprintf(f, a); strings.Contains(text, "geheim") || strings.Contains(text, fmt.Sprint([]byte("geheim"))[1:10]) {
			t.Errorf("%s prints %s", f, text)
		}
	}
}

func TestProxyVariables(t *testing.T) {
	env := home(t, map[string]string{"https_proxy": "http://p:1", "HTTP_PROXY": "http://q:2", "NO_PROXY": "in.example"}, nil)
	a, err := Discover(t.Context(), mustParse(t, "x"), env, DiscoverOptions{})
	if want := (Proxy{HTTP: "http://q:2", HTTPS: "http://p:1", No: "in.example"}); err != nil || a.Proxy != want {
		t.Error([]string{a.Proxy.HTTP, a.Proxy.HTTPS, a.Proxy.No}, err)
	}
	env = home(t, map[string]string{"HTTP_PROXY": "http://q:2", "REQUEST_METHOD": "GET"}, nil)
	if a, err := Discover(t.Context(), mustParse(t, "x"), env, DiscoverOptions{}); err != nil || a.Proxy != (Proxy{}) {
		t.Error(a.Proxy.HTTP, err)
	}
}

func TestCertFiles(t *testing.T) {
	env := home(t, nil, map[string]string{
		"etc/docker/certs.d/a.example:5000/ca.crt":               "docker",
		"etc/containers/certs.d/b.example/ca.crt":                "one",
		"etc/containers/certs.d/b.example/more.crt":              "two",
		"etc/containers/certs.d/b.example/client.cert":           "cert",
		"etc/containers/certs.d/b.example/client.key":            "key",
		"etc/containers/certs.d/b.example/README":                "no",
		"etc/docker/certs.d/b.example/ca.crt":                    "not this",
		"home/.config/containers/certs.d/c.example/c.crt":        "mine",
		"etc/containers/certs.d/c.example/c.crt":                 "not this",
		"etc/containers/certs.d/d.example/lonely.cert":           "cert",
		"etc/containers/certs.d/registry-1.docker.io/nobody.crt": "not this",
		"etc/docker/certs.d/docker.io/hub.crt":                   "hub",
	})
	for name, want := range map[string][]string{
		"a.example:5000/x": {"docker"}, "a.example/x": nil, "b.example/x": {"one", "two"}, "c.example/x": {"mine"}, "debian": {"hub"},
	} {
		a, err := Discover(t.Context(), mustParse(t, name), env, DiscoverOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, ca := range a.Endpoints[0].CAs {
			got = append(got, string(ca))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
		if n := len(a.Endpoints[0].Certs); (n == 1) != (name == "b.example/x") {
			t.Errorf("%s: %d client certificates", name, n)
		}
	}
	if _, err := Discover(t.Context(), mustParse(t, "d.example/x"), env, DiscoverOptions{}); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "lonely.key is missing") {
		t.Error(err)
	}
}

func FuzzRegistriesConf(f *testing.F) {
	f.Add([]byte("[[registry]]\nprefix='*.x'\nlocation='y/z'\n[[registry.mirror]]\nlocation='m'\npull-from-mirror='digest-only'\n"))
	f.Add([]byte("[registries.insecure]\nregistries=['a']\n"))
	ref, err := Parse("a.x/b/c:d")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		tables, err := parseRegistries(raw)
		if err != nil {
			return
		}
		all := registries{}
		for _, x := range tables {
			all[x.Prefix] = x
		}
		places, err := all.places(ref, false)
		if err == nil && (len(places) == 0 || places[len(places)-1].mirror) {
			t.Errorf("no place for %s: %+v", ref, places)
		}
	})
}

func FuzzAuthFile(f *testing.F) {
	f.Add([]byte(`{"auths": {"a.x": {"auth": "YTpi"}, "https://a.x/v1/": {"identitytoken": "t"}}, "credHelpers": {"b": "c"}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		file, err := parseAuthFile(raw)
		if err == nil {
			_, _ = file.entry("a.x", "b/c") // any answer is right, none may panic
		}
	})
}
