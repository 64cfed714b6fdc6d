package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
)

// TestServerIsConfined looks at the mount server of root's as the kernel shows it.
func TestServerIsConfined(t *testing.T) {
	harness.NeedRoot(t)
	m := newReadOnlyMount(t, imageRecipe(3))
	_, server := m.pids()
	proc := fmt.Sprintf("/proc/%d", server)
	b, err := os.ReadFile(proc + "/status")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
		switch key {
		case "Seccomp":
			if value != "2" {
				t.Errorf("seccomp is %s, expected a filter", value)
			}
		case "NoNewPrivs":
			if value != "1" {
				t.Errorf("no_new_privs is %s", value)
			}
		case "CapEff", "CapPrm":
			const gone = 1<<unix.CAP_SYS_CHROOT | 1<<unix.CAP_SYS_PTRACE | 1<<unix.CAP_SETUID | 1<<unix.CAP_SYS_MODULE | 1<<unix.CAP_KILL
			if has, err := strconv.ParseUint(value, 16, 64); err != nil || has&gone != 0 || has&(1<<unix.CAP_CHOWN) == 0 {
				t.Errorf("%s is %s", key, value)
			}
		}
	}
	// Its root is procfs, which is read-only.
	if _, err := os.Stat(proc + "/root/etc"); err == nil {
		t.Error("it sees /etc")
	}
	if _, err := os.Stat(proc + "/root/self/fd"); err != nil {
		t.Error("it does not see what it needs:", err)
	}
	f, err := os.OpenFile(proc+"/root/sys/kernel/core_pattern", os.O_WRONLY, 0)
	if err == nil {
		must(t, f.Close())
		t.Error("it could name the program that is given core dumps")
	}
	// No descriptor leads out: ".." ends where the private copy of the mount does.
	fds, err := os.ReadDir(proc + "/fd")
	must(t, err)
	for _, fd := range fds {
		path := filepath.Join(proc, "fd", fd.Name())
		if st, err := os.Stat(path); err != nil || !st.IsDir() {
			continue
		}
		if _, err := os.Stat(path + strings.Repeat("/..", 40) + "/etc/passwd"); err == nil {
			to, _ := os.Readlink(path) // for the message only
			t.Errorf("descriptor %s (%s) leads to /etc", fd.Name(), to)
		}
	}
}

// TestServerWithoutConfinement: an operator has a way out.
func TestServerWithoutConfinement(t *testing.T) {
	harness.NeedRoot(t)
	t.Setenv("PLYFS_NO_SECCOMP", "1")
	t.Setenv("PLYFS_NO_CHROOT", "1")
	m := newReadOnlyMount(t, imageRecipe(3))
	_, server := m.pids()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", server))
	must(t, err)
	if !strings.Contains(string(b), "\nSeccomp:\t0\n") {
		t.Error("its calls are filtered")
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/root/etc", server)); err != nil {
		t.Error(err)
	}
}
