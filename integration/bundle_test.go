package integration

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/harness"
)

// TestBundle runs bundles with the runtimes that are here, as root and as a user.
func TestBundle(t *testing.T) {
	for _, runtime := range []string{"runc", "crun"} {
		t.Run(runtime, func(t *testing.T) {
			tool, err := exec.LookPath(runtime)
			if err != nil {
				harness.Skip(t, "%s is not installed", runtime)
			}
			if runtime == "crun" && exists("/sys/fs/cgroup/unified") {
				harness.Skip(t, "crun refuses a machine with both versions of cgroups")
			}
			as(t, func(t *testing.T, p *person) {
				if p.uid != 0 {
					if _, err := exec.LookPath("fusermount3"); err != nil {
						harness.Skip(t, "fusermount3 is not installed")
					}
				}
				testBundle(t, p, tool)
			})
		})
	}
}

func testBundle(t *testing.T, p *person, tool string) {
	p.load(shellImage(t, map[string]any{
		"WorkingDir": "/srv/made", "Env": []string{"FROM=image"}, "ExposedPorts": map[string]any{"80/tcp": map[string]any{}},
		"Labels": map[string]string{"label": "of the image"},
	}))
	p.run("create", "shell:1", "work")
	_, notes, status := p.try("bundle", "--json", "work", "b", "sh", "-c",
		"id -u; pwd; echo $FROM; cat /proc/sys/kernel/cap_last_cap > /dev/null && grep CapBnd /proc/self/status; echo new > /new; exit 3")
	if status != 0 || !strings.Contains(notes, "ports (80/tcp)") {
		t.Fatalf("status %d: %s", status, notes)
	}
	if st, err := os.Stat(p.path("b")); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("the bundle is open to others: %v, %v", st.Mode(), err)
	}
	var spec struct {
		Annotations map[string]string
	}
	b, err := os.ReadFile(p.path("b/config.json"))
	if err == nil {
		err = json.Unmarshal(b, &spec)
	}
	if err != nil || spec.Annotations["label"] != "of the image" || spec.Annotations["org.opencontainers.image.exposedPorts"] != "80/tcp" {
		t.Errorf("annotations %v, %v", spec.Annotations, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := p.cmd(ctx, tool, "--root", p.path("run/state"), "run", "-b", p.path("b"), "plyfs-test")
	out, err := cmd.Output()
	if code := cmd.ProcessState.ExitCode(); code != 3 {
		t.Errorf("%s: status %d, %v", tool, code, err)
	}
	if want := "0\n/srv/made\nimage\nCapBnd:\t00000000a80425fb\n"; string(out) != want {
		t.Errorf("%s: %q, want %q", tool, out, want)
	}
	if d := p.run("diff", "work"); !strings.Contains(d, "A /new\n") {
		t.Errorf("diff: %s", d)
	}
	if _, errs, status := p.try("bundle", "work", "b"); status != 4 || !strings.Contains(errs, "has a config.json already") {
		t.Errorf("a second time: status %d, %s", status, errs)
	}
	p.run("umount", p.path("b/rootfs"))
	if err := os.Mkdir(p.path("open"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(p.path("open"), p.uid, p.gid); err != nil {
		t.Fatal(err)
	}
	if _, errs, status := p.try("bundle", "work", "open"); status != 2 || !strings.Contains(errs, "chmod 700") {
		t.Errorf("a directory open to all: status %d, %s", status, errs)
	}
	// What fails leaves no mount and no new container.
	if _, errs, status := p.try("bundle", "-u", "nosuch", "shell:1", "c"); status == 0 || !strings.Contains(errs, `user "nosuch"`) {
		t.Errorf("a user that is not there: status %d, %s", status, errs)
	}
	if table, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(table), p.dir) {
		t.Errorf("still mounted: %v\n%s", err, table)
	}
}
