package integration

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/archive"
	"github.com/plyfs/plyfs/integration/oracle"
	"github.com/plyfs/plyfs/layers/registry/registrytest"
)

// dockerRegistry is Debian's docker-registry on loopback.
type dockerRegistry struct {
	t      *testing.T
	addr   string
	config string
	cmd    *exec.Cmd
	out    strings.Builder
	ping   func() bool
}

// newRegistry starts one with a storage of its own; it ends with the test.
func newRegistry(t *testing.T) *dockerRegistry {
	t.Helper()
	return startRegistry(t, http.DefaultClient, "http", "")
}

// startRegistry starts one with more configuration; client gets an answer from it.
func startRegistry(t *testing.T, client *http.Client, scheme, more string) *dockerRegistry {
	t.Helper()
	needTool(t, "docker-registry")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &dockerRegistry{t: t, addr: ln.Addr().String(), config: filepath.Join(t.TempDir(), "config.yml")}
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	r.ping = func() bool {
		resp, err := client.Get(scheme + "://" + r.addr + "/v2/")
		if err != nil {
			return false
		}
		_ = resp.Body.Close()
		return resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusUnauthorized
	}
	text := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %q}}\nhttp:\n  addr: %q\n%s\n",
		filepath.Join(t.TempDir(), "data"), r.addr, more)
	if err := os.WriteFile(r.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r.start()
	t.Cleanup(r.kill)
	return r
}

func (r *dockerRegistry) start() {
	r.t.Helper()
	r.cmd = exec.Command("docker-registry", "serve", r.config)
	r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.out
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	waitFor(r.t, "the registry to answer", r.ping)
}

// kill ends the registry at once, in the middle of whatever it does.
func (r *dockerRegistry) kill() {
	if r.cmd.ProcessState == nil {
		_ = r.cmd.Process.Kill()
		_ = r.cmd.Wait() // killed
	}
}

// alone gives a command no configuration but what lies in home.
func alone(cmd *exec.Cmd, home string) {
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home, "TMPDIR=" + os.TempDir(), "XDG_RUNTIME_DIR=" + home}
}

// registryStore is a store whose commands find only configuration of the test.
type registryStore struct {
	*store
	home string
}

func newRegistryStore(t *testing.T) *registryStore {
	return &registryStore{newStore(t), t.TempDir()}
}

func (s *registryStore) try(args ...string) (string, error) {
	cmd, done := s.cmd(args...)
	defer done()
	alone(cmd, s.home)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out) + stderr.String(), err
	}
	return string(out), nil
}

func (s *registryStore) run(args ...string) string {
	s.t.Helper()
	out, err := s.try(args...)
	if err != nil {
		s.t.Fatalf("plyfs %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

var digestLine = regexp.MustCompile(`(?m)^(?:Digest|\S+: digest): (sha256:[0-9a-f]{64})`)

func digestIn(t *testing.T, out string) string {
	t.Helper()
	m := digestLine.FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no digest in %q", out)
	}
	return m[1]
}

func skopeo(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command("skopeo", append([]string{"--insecure-policy"}, args...)...)
	alone(cmd, t.TempDir())                                                   // it stops at configuration that it may not read
	timer := time.AfterFunc(2*time.Minute, func() { _ = cmd.Process.Kill() }) // it may have ended
	defer timer.Stop()
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("skopeo %s: %v\n%s", strings.Join(args, " "), err, &stderr)
	}
	return string(out)
}

// digestOf asks skopeo for the digest of a tag.
func (r *dockerRegistry) digestOf(name string) string {
	return strings.TrimSpace(skopeo(r.t, "inspect", "--tls-verify=false", "--format", "{{.Digest}}", "docker://"+r.addr+"/"+name))
}

// sampleImage writes an image as an OCI archive.
func sampleImage(t *testing.T, layers ...oracle.Layer) (file string, im archive.Image) {
	t.Helper()
	im.Ref = "sample:1"
	for _, l := range layers {
		b, err := l.Tar()
		if err != nil {
			t.Fatal(err)
		}
		im.Layers = append(im.Layers, b)
	}
	file = filepath.Join(t.TempDir(), "image.tar")
	if err := im.Write(file, archive.Options{Format: "oci", Compress: "gzip"}); err != nil {
		t.Fatal(err)
	}
	return file, im
}

// ociLayout unpacks an archive, which skopeo can do as root only, and names it for skopeo.
func ociLayout(t *testing.T, file string) string {
	t.Helper()
	dir := t.TempDir()
	mustRun(t, "tar", "--no-same-owner", "-xf", file, "-C", dir)
	return "oci:" + dir
}

// bigLayer does not compress.
func bigLayer(size int) oracle.Layer {
	r, b := rand.New(rand.NewPCG(3, uint64(size))), make([]byte, size)
	for i := range b {
		b[i] = byte('!' + r.IntN(90)) // text, of which not much can be saved
	}
	return oracle.Layer{Entries: []oracle.Entry{{Path: oracle.Name(fmt.Sprint("big", size)), Kind: oracle.File, Text: string(b)}}}
}

// TestRegistryExchange: what skopeo puts into a registry plyfs takes out, and the other way round.
func TestRegistryExchange(t *testing.T) {
	needTool(t, "skopeo")
	reg := newRegistry(t)
	file, im := sampleImage(t, sampleLayers()...)
	want := strings.Join(im.DiffIDs(), "\n")
	other := newRegistry(t)
	for name, args := range map[string][]string{
		"oci":    nil,
		"docker": {"--format", "v2s2"},
		"zstd":   {"--format", "oci", "--dest-compress", "--dest-compress-format", "zstd"},
	} {
		skopeo(t, append(append([]string{"copy", "--dest-tls-verify=false"}, args...), ociLayout(t, file), "docker://"+reg.addr+"/team/"+name+":1")...)
		s := newRegistryStore(t)
		ref := reg.addr + "/team/" + name
		out := s.run("pull", "--plain-http", "--keep-blobs", ref+":1")
		d := reg.digestOf("team/" + name + ":1")
		for _, line := range []string{"1: Pulling from team/" + name, "Digest: " + d, "Status: Downloaded newer image for " + ref + ":1", ref + ":1"} {
			if !strings.Contains(out, line+"\n") {
				t.Errorf("%s: pull does not say %q:\n%s", name, line, out)
			}
		}
		if strings.Count(out, ": Pull complete\n") != len(im.Layers) {
			t.Errorf("%s: pull says\n%s", name, out)
		}
		if got := strings.Join(diffIDs(t, s.store, ref+":1"), "\n"); got != want {
			t.Errorf("%s: layers are\n%s\nwant\n%s", name, got, want)
		}
		if out = s.run("pull", "--plain-http", ref+":1"); !strings.Contains(out, "Status: Image is up to date for "+ref+":1\n") {
			t.Errorf("%s: a second pull says\n%s", name, out)
		}
		if out = s.run("images", "--digests"); !strings.Contains(out, d) {
			t.Errorf("%s: images --digests:\n%s", name, out)
		}
		s.run("check", "--deep")
		// With the blobs, the image goes elsewhere as it is; without, as another manifest.
		out = s.run("push", "--plain-http", ref+":1", reg.addr+"/copy/"+name)
		if got := reg.digestOf("copy/" + name + ":latest"); got != d || digestIn(t, out) != d {
			t.Errorf("%s: pushed as %s, it was %s:\n%s", name, got, d, out)
		}
		bare := newRegistryStore(t)
		bare.run("pull", "--plain-http", ref+"@"+d)
		out = bare.run("push", "--plain-http", ref+"@"+d, other.addr+"/"+name+":1")
		if got := other.digestOf(name + ":1"); digestIn(t, out) != got || got == d {
			t.Errorf("%s: pushed as %s, it was %s:\n%s", name, got, d, out)
		}
		// skopeo verifies what it reads, also that layers are what the config says.
		dir := filepath.Join(t.TempDir(), "out")
		skopeo(t, "copy", "--src-tls-verify=false", "docker://"+other.addr+"/"+name+":1", "oci:"+dir+":x")
		back := newRegistryStore(t)
		back.run("load", "-i", dir, "--ref", "back:x")
		if got := strings.Join(diffIDs(t, back.store, "back:x"), "\n"); got != want {
			t.Errorf("%s: layers came back as\n%s\nwant\n%s", name, got, want)
		}
	}
}

// TestRegistryMount: a blob that another repository has is not sent.
func TestRegistryMount(t *testing.T) {
	reg := newRegistry(t)
	s := newRegistryStore(t)
	file, _ := sampleImage(t, bigLayer(100_000))
	s.run("load", "-i", file)
	s.run("tag", "sample:1", reg.addr+"/first:1")
	out := s.run("push", "--plain-http", reg.addr+"/first:1")
	d := digestIn(t, out)
	if strings.Count(out, ": Pushed\n") != 2 { // layer and config
		t.Errorf("push says\n%s", out)
	}
	if out = s.run("push", "--plain-http", reg.addr+"/first:1"); !strings.Contains(out, ": Layer already exists\n") || strings.Contains(out, ": Pushed\n") {
		t.Errorf("a second push says\n%s", out)
	}
	out = s.run("push", "--plain-http", "sample:1", reg.addr+"/second:1")
	if !strings.Contains(out, ": Mounted from first\n") || digestIn(t, out) != d {
		t.Errorf("a push beside it says\n%s", out)
	}
	other := newRegistryStore(t)
	other.run("pull", "--plain-http", reg.addr+"/second@"+d)
}

// TestRegistryLogin: TLS with an authority of certs.d, and a password that skopeo login has
// left.
func TestRegistryLogin(t *testing.T) {
	needTool(t, "skopeo")
	dir := t.TempDir()
	put := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, data, 0o600)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(crand.Reader, &tmpl, &tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	kder, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true}}
	// The password is geheim.
	reg := startRegistry(t, client, "https", fmt.Sprintf("  tls: {certificate: %q, key: %q}\nauth: {htpasswd: {realm: test, path: %q}}",
		put("tls.crt", cert), put("tls.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kder})),
		put("htpasswd", []byte("me:$2b$05$qKc4Mw1E5wzu/TA1jxkSLOlXQ5LyplFsVTSpNEvMleilBD7uUsUQG\n"))))
	file, im := sampleImage(t, sampleLayers()...)
	s := newRegistryStore(t)
	s.run("load", "-i", file)
	name := reg.addr + "/app:1"
	if out, err := s.try("push", "sample:1", name); err == nil || !strings.Contains(out, "certificate") {
		t.Errorf("a push to a registry that nobody knows: %v\n%s", err, out)
	}
	certs := filepath.Join(s.home, ".config", "containers", "certs.d", reg.addr)
	if err := errors.Join(os.MkdirAll(certs, 0o700), os.WriteFile(filepath.Join(certs, "ca.crt"), cert, 0o600)); err != nil {
		t.Fatal(err)
	}
	if out, err := s.try("push", "sample:1", name); err == nil || !strings.Contains(out, "docker login") {
		t.Errorf("a push without credentials: %v\n%s", err, out)
	}
	authfile := filepath.Join(s.home, "containers", "auth.json") // XDG_RUNTIME_DIR is home
	skopeo(t, "login", "--authfile", authfile, "--cert-dir", certs, "-u", "me", "-p", "geheim", reg.addr)
	s.run("push", "sample:1", name)
	s.run("rmi", "sample:1")
	s.run("pull", name)
	if got := diffIDs(t, s.store, name); strings.Join(got, "") != strings.Join(im.DiffIDs(), "") {
		t.Error(got)
	}
}

// slowProxy passes bytes on, at most rate a second from the server to the client.
type slowProxy struct {
	ln   net.Listener
	sent atomic.Int64 // by the server
	got  atomic.Int64 // from clients
	// cut ends, once, the connection on which so many bytes have come from the client.
	cut  atomic.Int64
	mu   sync.Mutex
	open map[net.Conn]bool // guarded by mu
	wg   sync.WaitGroup
}

func newSlowProxy(t *testing.T, to string, rate int) *slowProxy {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &slowProxy{ln: ln, open: map[net.Conn]bool{}}
	p.wg.Go(func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				_ = in.Close() // as the server would do it
				continue
			}
			p.mu.Lock()
			p.open[in], p.open[out] = true, true
			p.mu.Unlock()
			done := func() {
				_, _ = in.Close(), out.Close() // whichever end has gone
			}
			p.wg.Go(func() {
				defer done()
				for total := int64(0); ; {
					n, err := io.CopyN(out, in, 16<<10)
					p.got.Add(n)
					total += n
					if limit := p.cut.Load(); err != nil || limit > 0 && total >= limit && p.cut.CompareAndSwap(limit, 0) {
						return
					}
				}
			})
			p.wg.Go(func() {
				defer done()
				tick := time.NewTicker(10 * time.Millisecond)
				defer tick.Stop()
				for {
					n, err := io.CopyN(in, out, int64(rate/100))
					p.sent.Add(n)
					if err != nil {
						return
					}
					<-tick.C
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		p.mu.Lock()
		for c := range p.open {
			_ = c.Close()
		}
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p
}

func (p *slowProxy) addr() string { return p.ln.Addr().String() }

// TestRegistryRestarts: a pull survives the end and the return of the registry.
func TestRegistryRestarts(t *testing.T) {
	needTool(t, "skopeo")
	reg := newRegistry(t)
	const size = 1_500_000
	file, im := sampleImage(t, bigLayer(size), bigLayer(size+1))
	skopeo(t, "copy", "--dest-tls-verify=false", ociLayout(t, file), "docker://"+reg.addr+"/app:1")
	proxy := newSlowProxy(t, reg.addr, 2_000_000)
	s := newRegistryStore(t)
	done := make(chan error, 1)
	go func() {
		out, err := s.try("pull", "--plain-http", proxy.addr()+"/app:1")
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, out)
		}
		done <- err
	}()
	waitFor(t, "a part of the layers to arrive", func() bool { return proxy.sent.Load() > size/3 })
	reg.kill()
	reg.start()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := diffIDs(t, s.store, proxy.addr()+"/app:1"); strings.Join(got, "") != strings.Join(im.DiffIDs(), "") {
		t.Error(got)
	}
	if n := proxy.sent.Load(); n > 2*size+size/2 {
		t.Errorf("%d bytes were sent for layers of less than %d", n, 2*size)
	}
	s.run("check", "--deep")
}

// TestPushIsCut: a push survives that the connection of an upload breaks. This registry knows
// no upload any more whose request it has not read to its end, so the blob is sent anew; one
// that does is in package registry's tests.
func TestPushIsCut(t *testing.T) {
	reg := newRegistry(t)
	s := newRegistryStore(t)
	const size = 2_000_000
	file, im := sampleImage(t, bigLayer(size))
	s.run("load", "-i", file)
	proxy := newSlowProxy(t, reg.addr, 1<<30)
	proxy.cut.Store(size / 2)
	name := proxy.addr() + "/app:1"
	d := digestIn(t, s.run("push", "--plain-http", "sample:1", name))
	if proxy.cut.Load() != 0 {
		t.Error("the connection was not cut")
	}
	other := newRegistryStore(t)
	other.run("pull", "--plain-http", reg.addr+"/app@"+d)
	if got := diffIDs(t, other.store, reg.addr+"/app@"+d); strings.Join(got, "") != strings.Join(im.DiffIDs(), "") {
		t.Error(got)
	}
}

// TestPullKilled: a pull that is killed leaves a clean store, and what it has fetched to the next.
func TestPullKilled(t *testing.T) {
	needTool(t, "skopeo")
	reg := newRegistry(t)
	const size = 2_000_000
	file, im := sampleImage(t, sampleLayers()[0], bigLayer(size))
	skopeo(t, "copy", "--dest-tls-verify=false", ociLayout(t, file), "docker://"+reg.addr+"/app:1")
	proxy := newSlowProxy(t, reg.addr, 4_000_000)
	s := newRegistryStore(t)
	for i := range 3 {
		cmd, stop := s.cmd("pull", "--plain-http", proxy.addr()+"/app:1")
		alone(cmd, s.home)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		until := int64(i+1) * size / 5
		waitFor(t, "a part of the layer to arrive", func() bool { return proxy.sent.Load() > until })
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
		stop()
		if out := s.run("images", "-q"); out != "" {
			t.Errorf("a pull that was killed has left an image: %s", out)
		}
	}
	var du struct{ Stage int64 }
	if err := json.Unmarshal([]byte(s.run("df", "--json")), &du); err != nil || du.Stage < size/3 {
		t.Errorf("df counts %d bytes of unfinished work: %v", du.Stage, err)
	}
	before := proxy.sent.Load()
	s.run("pull", "--plain-http", proxy.addr()+"/app:1")
	if n := proxy.sent.Load() - before; n > size*2/3 {
		t.Errorf("the last pull has fetched %d bytes of a layer of less than %d", n, size)
	}
	if got := diffIDs(t, s.store, proxy.addr()+"/app:1"); strings.Join(got, "") != strings.Join(im.DiffIDs(), "") {
		t.Error(got)
	}
	s.run("check", "--deep")
	if out := s.run("gc"); !strings.Contains(out, "Total reclaimed space: 0B") {
		t.Errorf("something was left: %s", out)
	}
}

// TestRegistryDaemon: a daemon moves images with the credentials and the configuration of the
// client, and sees no file of it.
func TestRegistryDaemon(t *testing.T) {
	reg := registrytest.New(t)
	reg.User, reg.Password, reg.Tokens = "me", "geheim", true
	s := newRegistryStore(t)
	file, im := sampleImage(t, sampleLayers()...)
	s.run("load", "-i", file)
	socket := filepath.Join(s.home, "s")
	daemon := exec.Command(s.bin, "--root", s.root, "--socket", socket, "--log-level", "debug", "daemon")
	alone(daemon, t.TempDir())
	var log strings.Builder
	daemon.Stderr = &log
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	end := func() {
		if !ended {
			ended = true
			_ = daemon.Process.Signal(os.Interrupt) // it may have ended
			_ = daemon.Wait()
		}
	}
	t.Cleanup(end)
	waitFor(t, "the daemon to listen", func() bool { _, err := os.Stat(socket); return err == nil })

	name := reg.Host() + "/team/app:1"
	try := func(args ...string) (string, error) { return s.try(append([]string{"--socket", socket}, args...)...) }
	if out, err := try("push", "--plain-http", "sample:1", name); err == nil || !strings.Contains(out, "docker login") {
		t.Errorf("a push without credentials: %v\n%s", err, out)
	}
	// {"auths": {HOST: {"auth": base64 of me:geheim}}}
	conf := fmt.Sprintf(`{"auths": {%q: {"auth": "bWU6Z2VoZWlt"}}}`, reg.Host())
	if err := os.MkdirAll(filepath.Join(s.home, ".docker"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.home, ".docker", "config.json"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := try("push", "--plain-http", "sample:1", name)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	d := digestIn(t, out)
	for _, args := range [][]string{
		{"rmi", "sample:1"},
		{"pull", "--plain-http", name},
		{"check", "--deep"},
	} {
		if out, err = try(args...); err != nil {
			t.Fatalf("plyfs %q: %v\n%s", args, err, out)
		}
	}
	if got := diffIDs(t, s.store, name); strings.Join(got, "") != strings.Join(im.DiffIDs(), "") {
		t.Error(got)
	}
	// The name is known, so nothing is asked; another one is, by --pull, and only then. Insecure
	// registries are those of the client, too.
	if err := os.MkdirAll(filepath.Join(s.home, ".config", "containers"), 0o700); err != nil {
		t.Fatal(err)
	}
	conf = fmt.Sprintf("[[registry]]\nprefix = 'made.up.example'\nlocation = %q\ninsecure = true\n", reg.Host())
	if err := os.WriteFile(filepath.Join(s.home, ".config", "containers", "registries.conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	reg.Log()
	if out, err = try("create", "made.up.example/team/app:1", "c0"); err == nil || len(reg.Log()) > 0 {
		t.Errorf("create pulled without being told to: %s", out)
	}
	for _, args := range [][]string{
		{"create", "--pull=missing", "made.up.example/team/app:1", "c1"},
		{"create", "--pull=missing", "made.up.example/team/app:1", "c2"},
	} {
		if out, err = try(args...); err != nil || !strings.Contains(out, args[3]) {
			t.Errorf("plyfs %q: %v\n%s", args, err, out)
		}
		if log := reg.Log(); (args[3] == "c1") != (len(log) > 0) {
			t.Errorf("plyfs %q asked %v", args, log)
		}
	}
	if out, err = try("create", "--pull=always", "made.up.example/team/app@"+d, "c3"); err != nil || len(reg.Log()) == 0 {
		t.Errorf("%v\n%s", err, out)
	}
	end()
	if strings.Contains(log.String(), "geheim") || strings.Contains(log.String(), "bWU6") {
		t.Errorf("the daemon's log has the password:\n%s", log.String())
	}
	// Nor is it anywhere in the store.
	if out, err := exec.Command("grep", "-rl", "geheim", s.root).CombinedOutput(); err == nil {
		t.Errorf("the password is in the store: %s", out)
	}
}
