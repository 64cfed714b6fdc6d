package engine

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Docker returns root with a docker daemon of its own, whose storage driver is called driver
// and finds its programs in path first. At the end the daemon is stopped.
func (w Person) Docker(t testing.TB, name, driver, path string) Person {
	t.Helper()
	dir := filepath.Join(w.Home, name)
	if err := os.Mkdir(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "daemon.json") // and not that of the machine
	if err := os.WriteFile(conf, []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{
		"DOCKER_HOST": "unix://" + filepath.Join(dir, "d.sock"), "DOCKER_CONFIG": filepath.Join(dir, "config"),
		"DOCKER_BUILDKIT": "0", // the builder without it needs no further component
	}
	if path != "" {
		env["PATH"] = path + ":" + w.path()
	}
	w = w.With(env)
	// In the background, as a service manager has it; the host inherits it.
	w.Run(t, "sh", "-c", `log=$1; shift; "$@" > "$log" 2>&1 < /dev/null &`, "start", filepath.Join(dir, "log"),
		"dockerd", "--data-root", filepath.Join(dir, "root"), "--exec-root", filepath.Join(dir, "exec"), "--pidfile", filepath.Join(dir, "pid"),
		"--host", w.Env["DOCKER_HOST"], "--storage-driver", driver, "--config-file", conf,
		"--iptables=false", "--ip6tables=false", "--bridge=none")
	t.Cleanup(func() { w.stopDocker(t, dir) })
	deadline := time.Now().Add(40 * time.Second)
	for {
		res := w.Do("", w.DockerCLI(), "version")
		if res.Code == 0 && res.Err == "" {
			return w
		}
		log, err := os.ReadFile(filepath.Join(dir, "log"))
		if time.Now().After(deadline) || strings.Contains(string(log), "failed to start daemon") || strings.Contains(string(log), "unable to") {
			t.Fatalf("dockerd does not start: %s%s %v\n%s", res.Err, res.Stderr, err, important(log))
		}
		<-time.After(100 * time.Millisecond) // polling: it tells nobody but a service manager
	}
}

// DockerCLI is the client that belongs to the daemon, if both are from the distribution.
func (w Person) DockerCLI() string {
	if _, err := os.Stat("/usr/bin/docker"); err == nil {
		return "/usr/bin/docker"
	}
	return "docker"
}

// stopDocker asks the daemon to end and waits for it.
func (w Person) stopDocker(t testing.TB, dir string) {
	t.Helper()
	res := w.Do("", "sh", "-c", `set -e; p=$(cat "$1"); kill "$p"; i=0; while kill -0 "$p" 2>/dev/null; do i=$((i+1)); test $i -lt 300; sleep 0.1; done`,
		"stop", filepath.Join(dir, "pid"))
	log, err := os.ReadFile(filepath.Join(dir, "log"))
	if res.Code != 0 || res.Err != "" {
		t.Errorf("dockerd does not stop: %s%s%v", res.Err, res.Stderr, err)
	}
	if t.Failed() {
		t.Logf("dockerd says:\n%s", important(log))
	}
}

// important leaves out of a log what is no more than information.
func important(log []byte) string {
	var b strings.Builder
	for line := range strings.Lines(string(log)) {
		if !strings.Contains(line, "level=info") {
			b.WriteString(line)
		}
	}
	return b.String()
}
