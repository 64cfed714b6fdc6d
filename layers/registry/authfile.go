package registry

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"oras.land/oras-go/v2/registry/remote/credentials"
)

// authFile is an auth.json of podman or a config.json of docker.
type authFile struct {
	path        string
	Auths       map[string]authEntry `json:"auths"`
	CredHelpers map[string]string    `json:"credHelpers"`
	CredsStore  string               `json:"credsStore"`
}

type authEntry struct {
	Auth          string `json:"auth"`
	Username      string `json:"username"`
	Password      string `json:"password"`
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// authFiles are the files in the order in which they are asked.
type authFiles struct {
	files []authFile
	notes []string
}

// helperTime is how long a credential helper may take: it may ask for a password.
const helperTime = 2 * time.Minute

// authPaths are those of podman, then that of docker. $REGISTRY_AUTH_FILE replaces
// them all.
func authPaths(env Env) []string {
	if p := env.Get("REGISTRY_AUTH_FILE"); p != "" {
		return []string{p}
	}
	run := filepath.Join("/run/containers", strconv.Itoa(env.UID))
	if d := env.Get("XDG_RUNTIME_DIR"); d != "" {
		run = filepath.Join(d, "containers")
	}
	docker := env.Get("DOCKER_CONFIG")
	if docker == "" {
		docker = inHome(env.Home, ".docker")
	}
	return []string{
		filepath.Join(run, "auth.json"),
		inHome(env.config(), "containers", "auth.json"),
		inHome(docker, "config.json"),
	}
}

// loadAuths reads the files. One that cannot be read is told and left out: what it
// would have allowed may be allowed to everybody.
func loadAuths(env Env) *authFiles {
	a := &authFiles{}
	for _, p := range authPaths(env) {
		raw, err := readFile(p)
		if err != nil {
			a.notes = append(a.notes, fmt.Sprintf("credentials of %s are not used: %v", p, err))
			continue
		}
		if raw == nil || len(strings.TrimSpace(string(raw))) == 0 {
			continue
		}
		f, err := parseAuthFile(raw)
		if err != nil {
			a.notes = append(a.notes, fmt.Sprintf("credentials of %s are not used: %v", p, err))
			continue
		}
		f.path = p
		a.files = append(a.files, f)
	}
	return a
}

// parseAuthFile never repeats what is in the file: an error message with a part of
// it might be one with a password.
func parseAuthFile(raw []byte) (f authFile, err error) {
	if err := json.Unmarshal(raw, &f); err != nil {
		return f, fmt.Errorf("%w: it is not the JSON of an auth.json or config.json", ErrInvalid)
	}
	return f, nil
}

// find returns the credential of a repository: that of the longest key that is a
// beginning of its name, in the first file that has one.
func (a *authFiles) find(ctx context.Context, host, repo string) (Credential, error) {
	for _, f := range a.files {
		helper := f.CredHelpers[host]
		if helper == "" {
			helper = f.CredHelpers[serverKey(host)]
		}
		if helper == "" {
			helper = f.CredsStore
		}
		if helper != "" {
			c, err := ask(ctx, helper, serverKey(host))
			if err != nil {
				return Credential{}, fmt.Errorf("credential helper %q of %s: %w", helper, f.path, err)
			}
			if c != (Credential{}) {
				return c, nil
			}
		}
		c, err := f.entry(host, repo)
		if err != nil {
			return Credential{}, fmt.Errorf("%s: %w", f.path, err)
		}
		if c != (Credential{}) {
			return c, nil
		}
	}
	return Credential{}, nil
}

// serverKey is the name under which docker login stores a registry.
func serverKey(host string) string {
	if host == "docker.io" || host == hubHost {
		return "https://index.docker.io/v1/"
	}
	return host
}

// hostOf is the registry that a key of docker's file means.
func hostOf(key string) string {
	key = strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://")
	key, _, _ = strings.Cut(key, "/")
	if key == "index.docker.io" || key == hubHost {
		return "docker.io"
	}
	return key
}

func (f authFile) entry(host, repo string) (Credential, error) {
	if host == hubHost {
		host = "docker.io"
	}
	// podman login takes namespaces: registry.example/team/app, …/team, the host.
	for key := host + "/" + repo; ; {
		if e, ok := f.Auths[key]; ok {
			if c, err := e.credential(); err != nil || c != (Credential{}) {
				return c, err
			}
		}
		i := strings.LastIndexByte(key, '/')
		if i < 0 {
			break
		}
		key = key[:i]
	}
	// Old keys are URLs; only those without a namespace of podman mean the host.
	for key, e := range f.Auths {
		if isURL := strings.Contains(key, "://") || !strings.Contains(key, "/"); isURL && hostOf(key) == host {
			if c, err := e.credential(); err != nil || c != (Credential{}) {
				return c, err
			}
		}
	}
	return Credential{}, nil
}

func (e authEntry) credential() (Credential, error) {
	c := Credential{Username: e.Username, Password: e.Password, IdentityToken: e.IdentityToken, RegistryToken: e.RegistryToken}
	if e.Auth != "" {
		raw, err := base64.StdEncoding.DecodeString(e.Auth)
		user, password, ok := strings.Cut(string(raw), ":")
		if err != nil || !ok {
			return Credential{}, fmt.Errorf("%w: an auth entry is not base64 of NAME:PASSWORD", ErrInvalid)
		}
		c.Username, c.Password = user, strings.TrimRight(password, "\x00")
	}
	return c, nil
}

var helperName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// ask runs docker-credential-HELPER.
func ask(ctx context.Context, helper, server string) (Credential, error) {
	if !helperName.MatchString(helper) {
		return Credential{}, fmt.Errorf("%w: not the name of one", ErrInvalid)
	}
	ctx, cancel := context.WithTimeout(ctx, helperTime)
	defer cancel()
	c, err := credentials.NewNativeStore(helper).Get(ctx, server)
	if err != nil {
		return Credential{}, err
	}
	return Credential{Username: c.Username, Password: c.Password, IdentityToken: c.RefreshToken, RegistryToken: c.AccessToken}, nil
}
