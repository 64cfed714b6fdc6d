package integration

import (
	"fmt"
	"os/exec"
	"testing"

	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// TestUpperOfFuseOverlayfs: plyfs, called as fuse-overlayfs, shows what that has
// written to its upper.
func TestUpperOfFuseOverlayfs(t *testing.T) {
	needOracle(t)
	model, err := harness.NewMounter("fuse-overlayfs")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("fuse-overlayfs"); err != nil {
		harness.Skip(t, "fuse-overlayfs is not installed")
	}
	drop, err := harness.NewMounter("drop-in")
	if err != nil {
		t.Fatal(err)
	}
	for seed := range int64(12) {
		o := oracle.GenOptions{PlainNames: true, NoHardlinks: true, NoXWhiteouts: true, Ops: 200}
		tr := &oracle.Trial{Seed: seed, Where: fastDir(t), Model: model, Subject: drop}
		tr.Recipe = oracle.GenRecipe(seed, o)
		tr.Gen = oracle.NewGenerator(seed, o)
		diffs, err := tr.Reread()
		for _, d := range diffs {
			t.Errorf("seed %d: %v", seed, d)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestUpperWithMarkers: plyfs, called as fuse-overlayfs, on uppers whose whiteouts
// are files, as fuse-overlayfs writes them where it cannot make devices.
func TestUpperWithMarkers(t *testing.T) {
	needOracle(t)
	drop, err := harness.NewMounter("drop-in")
	if err != nil {
		t.Fatal(err)
	}
	for seed := range int64(12) {
		o := oracle.GenOptions{PlainNames: true, NoHardlinks: true, NoXWhiteouts: true, Ops: 150}
		tr := &oracle.Trial{Seed: seed, Where: fastDir(t), Subject: drop, ConvertUpper: "aufs"}
		tr.Recipe = oracle.GenRecipe(seed, o)
		tr.Gen = oracle.NewGenerator(seed, o)
		runTrial(t, tr, fmt.Sprintf("markers-%d", seed))
	}
}

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
