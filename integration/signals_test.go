package integration

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/oracle"
)

const (
	killRounds  = 12
	killLarge   = 6        // large lower files
	killSize    = 24 << 20 // of each
	killClients = 6
)

// killedOp is what a client does until it dies.
func killedOp(r *rand.Rand, client, round, i int) oracle.Op {
	large := oracle.Name(fmt.Sprintf("large/%d", r.IntN(killLarge)))
	own := oracle.Name(fmt.Sprintf("new/c%d-%d-%d", client, round, i))
	switch client {
	case 0, 1: // copy-ups; nothing is written
		return oracle.Op{Op: "open", Path: large, Flags: "RDWR", FD: r.IntN(4)}
	case 2:
		return oracle.Op{Op: "cat", Path: large}
	case 3:
		return oracle.Op{Op: "put", Path: own, Len: 300000, Seed: 1, Flags: "CREAT|EXCL"}
	case 4:
		return []oracle.Op{
			{Op: "mkdir", Path: own, Mode: 0o755},
			{Op: "symlink", Path: own, To: "x"},
			{Op: "rename", Path: "small/here", To: "small/there", Flags: "EXCHANGE"},
			{Op: "chmod", Path: large, Mode: 0o644},
		}[r.IntN(4)]
	}
	return []oracle.Op{{Op: "count", Path: "large"}, {Op: "readdir", Path: "small"}, {Op: "utimens", Path: large, Atime: "5.5", Mtime: "6.5"}}[r.IntN(3)]
}

// TestKilledClients kills clients with SIGINT and SIGKILL in the middle of
// copy-ups, reads and creations. The mount goes on, no file is lost or half
// there, and nothing of what was cut off shows or stays in the workdir.
func TestKilledClients(t *testing.T) {
	needOracle(t)
	for _, options := range [][]string{nil, {"index=on", "redirect_dir=on", "metacopy=on"}} {
		t.Run(strings.Join(options, ","), func(t *testing.T) { killClientsOf(t, options) })
	}
}

func killClientsOf(t *testing.T, options []string) {
	var lower oracle.Layer
	for _, d := range []oracle.Name{"large", "new", "small"} {
		lower.Entries = append(lower.Entries, oracle.Entry{Path: d, Kind: oracle.Dir})
	}
	for i := range killLarge {
		lower.Entries = append(lower.Entries, oracle.Entry{Path: oracle.Name(fmt.Sprintf("large/%d", i)), Kind: oracle.File, Size: killSize, Seed: int64(i), Mtime: "6.000000005"})
	}
	for _, n := range []oracle.Name{"small/here", "small/there"} {
		lower.Entries = append(lower.Entries, oracle.Entry{Path: n, Kind: oracle.File, Text: "small"})
	}
	stack, target := tempStack(t, filepath.Join(base, "killed"+fmt.Sprint(len(options))), lower)
	stack.Options = options
	m, err := subject(t).Mount(stack, target)
	if err != nil {
		t.Fatal(err)
	}
	before := large(snapshotOf(t, target).Out)
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(uint64(seed), 0))
	for round := range killRounds {
		var wg sync.WaitGroup
		for client := range killClients {
			c, err := oracle.StartAgent(target, 1, *flagLimit)
			if err != nil {
				t.Fatal(err)
			}
			cr := rand.New(rand.NewPCG(r.Uint64(), uint64(client)))
			sig := []syscall.Signal{syscall.SIGINT, syscall.SIGKILL}[cr.IntN(2)]
			timer := time.AfterFunc(time.Duration(1+cr.IntN(80))*time.Millisecond, func() {
				if err := c.Signal(sig); err != nil {
					t.Errorf("%v\nserver: %s", err, m.Abort())
				}
			})
			wg.Go(func() {
				defer timer.Stop()
				for i := 0; ; i++ {
					op := killedOp(cr, client, round, i)
					res, err := c.Do(op)
					if err != nil {
						return // it is dead
					}
					if res.Err != "" && res.Err != "EEXIST" {
						t.Errorf("%s: %s", op, res)
					}
				}
			})
		}
		wg.Wait()
		if t.Failed() {
			return
		}
	}
	after := snapshotOf(t, target)
	if d := oracle.DiffLines(before, large(after.Out)); len(d) > 0 {
		t.Errorf("large files (- before, + after):\n%s", strings.Join(d, "\n"))
	}
	for line := range strings.SplitSeq(after.Out, "\n") {
		name, _, _ := strings.Cut(line, " ")
		if dir, base, _ := strings.Cut(name, "/"); dir == "new" && base != "" && !strings.HasPrefix(base, "c3-") && !strings.HasPrefix(base, "c4-") {
			t.Errorf("nobody made %s", line)
		}
	}
	if after.Ghosts != "" {
		t.Errorf("names that do not exist: %s", after.Ghosts)
	}
	mountAgain(t, m, stack, sameTree(t, after.Out))
}

// large picks the lines of the large files from a snapshot.
func large(snapshot string) string {
	var lines []string
	for line := range strings.SplitSeq(snapshot, "\n") {
		if strings.HasPrefix(line, "large/") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}
