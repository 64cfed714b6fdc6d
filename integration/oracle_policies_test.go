package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// policies are the ways in which data reaches programs and requests reach the union,
// as mount options; "" is the default.
var policies = []string{"", "io=cache", "transport=gofuse", "io=noopen", written, complete}

// written is the policy under which owners, modes and types stand in an attribute.
const written = "xattr_permissions=2"

// complete is the policy under which the kernel keeps nothing.
const complete = "trace=complete"

// noOpen is the policy under which opening a file is not asked for. What opening does
// otherwise is done by the first write, so a writable union differs from the kernel in
// some cases; see noOpenDiffers.
const noOpen = "io=noopen"

// writtenDiffers are the cases that do not hold where attributes are written down.
var writtenDiffers = map[string]string{
	"xattrs-security": "the label that a security module gives a new file is the file's, not the object's",
}

// noOpenDiffers are the cases that do not hold in a writable union with io=noopen.
var noOpenDiffers = map[string]string{
	"atime":             "an open file is read from the page cache, and nobody hears of it",
	"atime-nodiratime":  "as atime",
	"atime-strictatime": "as atime",
	"flags":             "an immutable or append-only file refuses the write, not the open before it; also a descriptor that was opened before it got the flag",
	"flags-lower":       "as flags",
	"flags-upper":       "as flags",
	"links-copied-up":   "opening a name for writing does not make it a file of its own; writing does",
	"no-space":          "the copy-up, and so the error of a full disk, comes with the write",
	"no-space-metacopy": "as no-space",
	"quota":             "as no-space",
	"truncate-same-size": "the kernel turns O_TRUNC into a change of size, and leaves it out for an empty file, " +
		"whose mtime then stays",
}

// dataCases are the cases that have to do with how files are opened, read and written,
// with what is kept of them meanwhile, and with how requests are taken in. All others
// run under each policy in TestSoakCases.
var dataCases = []string{
	"append", "append-copy-up", "atime", "coherent-read", "create-flags", "descriptors-copy-up", "fsize-limit", "hard-links",
	"links-copied-up", "locks-across-copy-up", "metacopy-open", "metacopy-write", "mmap", "mmap-msync", "no-space", "no-space-truncate",
	"open-files-across-changes", "open-unlinked-lower", "permissions", "positions", "read-only", "read-only-flag", "readdir-changing",
	"sparse", "suid", "text-busy", "times", "truncate", "truncate-same-size", "xattrs",
}

func policySubject(t *testing.T, policy string) harness.Mounter {
	t.Helper()
	name := "plyfs"
	if policy != "" {
		name += "+" + policy
	}
	m, err := harness.NewMounter(name)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestOraclePolicies compares with the kernel under each policy but the default, which
// has tests of its own.
func TestOraclePolicies(t *testing.T) {
	needOracle(t)
	for _, policy := range policies[1:] {
		t.Run(policy, func(t *testing.T) {
			t.Run("cases", func(t *testing.T) { policyCases(t, policy, dataCases) })
			if testing.Short() {
				return
			}
			t.Run("random", func(t *testing.T) {
				seed := int64(1)
				for end := time.Now().Add(2 * time.Second); time.Now().Before(end) && !t.Failed(); seed++ {
					tr := policyTrial(t, seed, policy)
					if policy == noOpen && seed%2 == 0 {
						readOnly(tr)
					}
					runTrial(t, tr, policyRun(policy, fmt.Sprint(seed)))
				}
			})
		})
	}
}

// TestReadOnlyPassthrough compares unions without an upper whose files the kernel reads
// by itself.
func TestReadOnlyPassthrough(t *testing.T) {
	needOracle(t)
	for seed := range int64(12) {
		tr := policyTrial(t, seed, "io=passthrough")
		readOnly(tr)
		runTrial(t, tr, policyRun("read-only-passthrough", fmt.Sprint(seed)))
		if t.Failed() {
			return
		}
	}
}

// readOnly makes a trial one of a union without an upper, which takes io=noopen by
// itself.
func readOnly(tr *oracle.Trial) {
	tr.ReadOnly, tr.Options = true, nil
	if len(tr.Recipe.Lowers) == 1 { // the kernel wants two
		tr.Recipe.Lowers = append(tr.Recipe.Lowers, oracle.Layer{})
	}
}

// TestSoakCases runs all cases under each policy.
func TestSoakCases(t *testing.T) {
	if os.Getenv("SOAK_DURATION") == "" {
		t.Skip("SOAK_DURATION is not set")
	}
	needOracle(t)
	files, err := filepath.Glob("testdata/cases/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		names = append(names, strings.TrimSuffix(filepath.Base(f), ".txt"))
	}
	for _, policy := range policies[1:] {
		t.Run(policy, func(t *testing.T) { policyCases(t, policy, names) })
	}
}

func policyCases(t *testing.T, policy string, names []string) {
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			tr := loadCase(t, name)
			differs := map[string]map[string]string{noOpen: noOpenDiffers, written: writtenDiffers}
			if why, ok := differs[policy][name]; ok {
				t.Skipf("does not hold under %s: %s", policy, why)
			}
			tr.Subject = policySubject(t, policy)
			tr.OwnUpper = policy == written
			tr.Where = fastDir(t)
			runTrial(t, tr, policyRun(policy, "case-"+name))
		})
	}
}

// policyRun names a failing run for its file.
func policyRun(policy, name string) string {
	return strings.TrimPrefix(strings.ReplaceAll(policy, "=", "-")+"-"+name, "-")
}

func loadCase(t *testing.T, name string) *oracle.Trial {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", "cases", name+".txt"))
	if err != nil {
		t.Fatal(err)
	}
	tr, err := oracle.Parse(f)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	return tr
}

// policyTrial is the random trial of a seed, of operations in which the policy does not
// differ from the kernel.
func policyTrial(t *testing.T, seed int64, policy string) *oracle.Trial {
	tr := randomTrial(t, seed)
	if policy != "" { // else PLYFS_SUBJECT has the say
		tr.Subject = policySubject(t, policy)
		tr.OwnUpper = policy == written
	}
	if policy == written {
		tr.Recipe.Upper = oracle.Layer{} // its attributes are not in that form
	}
	if policy == noOpen {
		o := oracle.GenOptions{NoHardlinks: true, LateOpen: true}
		tr.Recipe, tr.Gen = oracle.GenRecipe(seed, o), oracle.NewGenerator(seed, o)
	}
	return tr
}
