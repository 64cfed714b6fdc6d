package integration

import (
	"fmt"
	"testing"

	"github.com/plyfs/plyfs/integration/oracle"
)

// TestDialects builds random layers in another dialect for the subject than
// for the kernel (or, for userxattr, for both) and compares as ever.
func TestDialects(t *testing.T) {
	needOracle(t)
	for _, tc := range []struct {
		name             string
		dialect, convert string
	}{
		{"aufs", "", "aufs"},
		{"auto", "", "auto"},
		{"userxattr", "userxattr", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for seed := int64(1); seed <= 8; seed++ {
				o := oracle.GenOptions{PlainNames: true, NoHardlinks: true, Ops: 150}
				tr := &oracle.Trial{Seed: seed, Where: fastDir(t), Dialect: tc.dialect, Convert: tc.convert}
				tr.Recipe = oracle.GenRecipe(seed, o)
				tr.Gen = oracle.NewGenerator(seed, o)
				runTrial(t, tr, fmt.Sprintf("dialect-%s-%d", tc.name, seed))
				if t.Failed() {
					return
				}
			}
		})
	}
}
