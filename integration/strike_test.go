package integration

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/crash"
	"github.com/plyfs/plyfs/integration/harness"
)

var flagStrikes = flag.Int("strike.most", 6, "how many system calls of a story are struck in each way; 0: all")

func init() {
	if name := os.Getenv(crash.PlayEnv); name != "" {
		if err := crash.RunPlay(name); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// TestMountFaults kills the mount server at the system calls by which it changes the upper,
// lets these calls fail, and fills the disk, while a program works in the mount. Killed, it is
// followed by another one, and the program does not notice; an error reaches the program,
// the operation has happened or not, and can be repeated.
func TestMountFaults(t *testing.T) {
	needOracle(t)
	sub, ok := subject(t).(harness.FUSE)
	if !ok || sub.Name() != "plyfs" {
		harness.Skip(t, "is about the server of plyfs")
	}
	fastDir(t) // made here, not by several stories at once
	full := []string{"index=on", "redirect_dir=on", "metacopy=on"}
	for _, s := range append(crash.Stories(0), crash.NameStories()...) {
		t.Run(s.Name, func(t *testing.T) {
			t.Parallel()
			tr := &crash.Trial{Story: s, Subject: sub, Dir: fastTempDir(t), Options: full}
			calls, err := tr.Calls()
			must(t, err)
			n := 0
			for _, b := range blows {
				for _, c := range chooseCalls(calls, b) {
					n++
					if err := tr.Strike(c.N, b.fate, b.on, func(c crash.Call) bool { return grows.MatchString(c.Name) }, harness.Kernel{}); err != nil {
						t.Errorf("%s: %v", b.name, err)
					}
				}
			}
			t.Logf("%d calls, struck %d times", len(calls), n)
		})
	}
}

// chooseCalls takes some of each kind.
func chooseCalls(calls []crash.Call, b blow) (some []crash.Call) {
	kinds := map[string]bool{}
	for _, i := range rand.Perm(len(calls)) {
		c := calls[i]
		top, _, _ := strings.Cut(c.Path, "/")
		kind := c.Name + " " + top + " " + path.Ext(c.Path)
		if b.fate == crash.Fate(unix.ENOSPC) && !grows.MatchString(c.Name) || *flagStrikes > 0 && (kinds[kind] || len(some) >= *flagStrikes) {
			continue
		}
		kinds[kind] = true
		some = append(some, c)
	}
	return some
}
