package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// usernsEnv marks the test process inside the user namespace; its value is
// the directory to work in.
const usernsEnv = "PLYFS_TEST_USERNS"

// TestUserNamespace compares random runs inside a user namespace, where both
// sides write user.overlay.* attributes. It needs no privileges but a readable
// /dev/fuse, and runs as root too.
func TestUserNamespace(t *testing.T) {
	harness.NeedFUSE(t)
	bin, err := harness.Binary()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(base, "userns")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestInUserNamespace$", "-test.v", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), usernsEnv+"="+dir, "PLYFS_BIN="+bin, "PLYFS_TEST_DIR="+dir, "TMPDIR="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	kill := time.AfterFunc(150*time.Second, func() { _ = cmd.Process.Kill() }) // it may have ended
	out, err := cmd.CombinedOutput()
	kill.Stop()
	switch {
	case err != nil && len(out) == 0:
		harness.Skip(t, "needs user namespaces: %v", err)
	case err != nil:
		t.Errorf("%v\n%s", err, out)
	case strings.Contains(string(out), "--- SKIP"):
		_, why, _ := strings.Cut(string(out), "userns_test.go:")
		harness.Skip(t, "in a user namespace: %s", strings.TrimSpace(strings.SplitN(why, "\n", 2)[0]))
	}
}

// TestInUserNamespace is the inner part of TestUserNamespace.
func TestInUserNamespace(t *testing.T) {
	dir := os.Getenv(usernsEnv)
	if dir == "" {
		t.Skip("started by TestUserNamespace")
	}
	harness.NeedFUSE(t)
	harness.NeedKernelOverlay(t)
	for _, policy := range []string{"", written} {
		for seed := int64(1); seed <= 6; seed++ {
			o := oracle.GenOptions{Unprivileged: true, PlainNames: true, NoHardlinks: true, Ops: 150}
			tr := &oracle.Trial{Seed: seed, Where: dir, Dialect: "userxattr", Users: 1}
			tr.Recipe = oracle.GenRecipe(seed, o)
			tr.Gen = oracle.NewGenerator(seed, o)
			if policy != "" {
				tr.Subject, tr.OwnUpper, tr.Recipe.Upper = policySubject(t, policy), true, oracle.Layer{}
			}
			runTrial(t, tr, policyRun(policy, fmt.Sprintf("userns-%d", seed)))
			if t.Failed() {
				return
			}
		}
	}
}
