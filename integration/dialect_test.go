package integration

import (
	"fmt"
	"os/exec"
	"strings"
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

// TestMarkersOnRequest: with fuse-overlayfs' variable plyfs makes no devices but markers,
// and fuse-overlayfs shows what that has left.
func TestMarkersOnRequest(t *testing.T) {
	needOracle(t)
	m, err := harness.NewMounter("drop-in")
	if err != nil {
		t.Fatal(err)
	}
	drop := m.(harness.FUSE)
	drop.Env = []string{"FUSE_OVERLAYFS_DISABLE_OVL_WHITEOUT=1"}
	for seed := range int64(8) {
		o := oracle.GenOptions{PlainNames: true, NoHardlinks: true, NoXWhiteouts: true, Ops: 150}
		tr := &oracle.Trial{Seed: seed, Where: fastDir(t), Subject: drop, OwnUpper: true}
		tr.Recipe = oracle.GenRecipe(seed, o)
		tr.Gen = oracle.NewGenerator(seed, o)
		runTrial(t, tr, fmt.Sprintf("markers-on-request-%d", seed))
		if t.Failed() {
			return
		}
	}
	if _, err := exec.LookPath("fuse-overlayfs"); err != nil {
		harness.Skip(t, "fuse-overlayfs is not installed")
	}
	peer, err := harness.NewMounter("fuse-overlayfs")
	if err != nil {
		t.Fatal(err)
	}
	stack, target := tempStack(t, fastTempDir(t), oracle.Layer{Entries: []oracle.Entry{
		{Path: "gone", Kind: oracle.File},
		{Path: "moved", Kind: oracle.File},
		{Path: "new", Kind: oracle.Dir},
		{Path: "new/old", Kind: oracle.File},
		{Path: "other", Kind: oracle.File},
	}})
	show := func(m harness.Mounter, script string) string {
		return inMountBy(t, m, stack, target, script+"; find . | sort")
	}
	want := show(drop, "rm gone; mv moved to; rm -r new; mkdir new; touch new/n; mv -T other gone")
	if got := show(peer, ":"); got != want || !strings.Contains(want, "./new/n") || strings.Contains(want, "old") {
		t.Errorf("plyfs: %q, fuse-overlayfs on the same upper: %q", want, got)
	}
	if got := shellIn(t, stack.Upper, "find . -type c"); got != "" {
		t.Errorf("devices in the upper: %s", got)
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
