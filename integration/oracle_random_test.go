package integration

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/oracle"
)

// TestOracleRandom compares random stacks and operations for -oracle.duration.
// Its seeds are always the same, so that who sees it fail has changed something;
// new ones are for TestSoak to find.
func TestOracleRandom(t *testing.T) {
	needOracle(t)
	if testing.Short() {
		t.Skip("short run")
	}
	randomRuns(t, cmp.Or(*flagSeed, 1), *flagDuration, policies[:1], 0)
}

// TestOracleKills compares random operations while the mount server is killed again and
// again: another one goes on, and nobody notices.
func TestOracleKills(t *testing.T) {
	needOracle(t)
	if testing.Short() {
		t.Skip("short run")
	}
	randomRuns(t, cmp.Or(*flagSeed, 1), *flagDuration/2, []string{"", "io=cache"}, 8)
}

// TestSoak is TestOracleRandom for as long as SOAK_DURATION says, under each policy in
// turn. A seed always has the same policy.
func TestSoak(t *testing.T) {
	s := os.Getenv("SOAK_DURATION")
	if s == "" {
		t.Skip("SOAK_DURATION is not set")
	}
	needOracle(t)
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatal(err)
	}
	randomRuns(t, cmp.Or(*flagSeed, time.Now().UnixNano()%1e9), d/2, policies, 0)
	randomRuns(t, cmp.Or(*flagSeed, time.Now().UnixNano()%1e9), d/2, []string{"", "io=cache"}, 8)
}

// randomRuns compares for a while. kills is how often the server of each mount is killed.
func randomRuns(t *testing.T, seed int64, d time.Duration, policies []string, kills int) {
	t.Logf("first seed %d", seed)
	runs, operations, failures := 0, 0, 0
	stats := make(map[string]map[string]int)
	for end := time.Now().Add(d); time.Now().Before(end) && failures < 5; seed++ {
		// Mount options change with every seed, policies with every round of those.
		policy := policies[int(seed)/len(mountOptions)%len(policies)]
		ok := t.Run(strings.TrimSuffix(fmt.Sprintf("seed=%d,%s", seed, policy), ","), func(t *testing.T) {
			tr := policyTrial(t, seed, policy)
			tr.Stats, tr.Kills = stats, kills
			runTrial(t, tr, policyRun(policy, fmt.Sprint(seed)))
			runs, operations = runs+1, operations+len(tr.Ops)
		})
		if !ok {
			failures++
		}
	}
	t.Logf("%d runs, %d operations, %d failed", runs, operations, failures)
	for _, op := range slices.Sorted(maps.Keys(stats)) {
		t.Logf("%-12s %v", op, stats[op])
	}
}

// mountOptions are what random runs are mounted with, in turn.
var mountOptions = [][]string{
	nil,
	{"index=on"},
	{"redirect_dir=on"},
	{"index=on", "redirect_dir=on", "metacopy=on"},
}

func randomTrial(t *testing.T, seed int64) *oracle.Trial {
	// Links in lowers behave in their own ways, and would hide other things.
	o := oracle.GenOptions{NoHardlinks: seed%3 != 0}
	tr := &oracle.Trial{Seed: seed, Where: fastDir(t), Options: mountOptions[seed%int64(len(mountOptions))], Agents: 1 + int(seed%2)}
	if seed%5 == 0 {
		tr.Where = base // a file system on disk
	}
	tr.Recipe = oracle.GenRecipe(seed, o)
	tr.Gen = oracle.NewGenerator(seed, o)
	return tr
}

// TestReplay executes the run that -oracle.replay names.
func TestReplay(t *testing.T) {
	if *flagReplay == "" {
		t.Skip("no -oracle.replay")
	}
	needOracle(t)
	tr, err := oracle.Load(*flagReplay)
	if err != nil {
		t.Fatal(err)
	}
	tr.Where = fastDir(t)
	runTrial(t, tr, "replay")
}
