package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/plyfs/plyfs/integration/engine"
	"github.com/plyfs/plyfs/integration/harness"
)

var places atomic.Int32

// enginePlace makes a place for engines. Its path is short: engines make sockets in it.
func enginePlace(t *testing.T, o engine.Options) *engine.Place {
	t.Helper()
	harness.NeedFUSE(t)
	return engine.New(t, filepath.Join(base, fmt.Sprintf("e%d", places.Add(1))), o)
}

// eachPerson runs a test of engines as root and as a user, at the same time.
func eachPerson(t *testing.T, test func(t *testing.T, w engine.Person)) {
	t.Helper()
	people(t, func(p *engine.Place) string {
		if _, err := exec.LookPath("newuidmap"); err != nil {
			return "newuidmap is not installed"
		}
		return p.NeedSubIDs()
	}, test)
}

// people runs a test as root and as a user, at the same time. why says what the user lacks.
func people(t *testing.T, why func(*engine.Place) string, test func(t *testing.T, w engine.Person)) {
	t.Helper()
	t.Run("root", func(t *testing.T) {
		t.Parallel()
		harness.NeedRoot(t)
		test(t, enginePlace(t, engine.Options{}).Root)
	})
	t.Run("user", func(t *testing.T) {
		t.Parallel()
		p := enginePlace(t, engine.Options{})
		if lacks := why(p); lacks != "" {
			harness.Skip(t, "%s", lacks)
		}
		test(t, p.User)
	})
}

// program returns the binary under one of its names.
func program(t testing.TB, name string) string {
	t.Helper()
	find := harness.DropIn
	if name == "plyfs" {
		find = harness.Binary
	}
	bin, err := find()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// baseImage returns an archive with the image that engines work with.
func baseImage(t testing.TB, w engine.Person) string {
	t.Helper()
	file := filepath.Join(w.Home, "base.tar")
	if _, err := os.Stat(file); err != nil {
		engine.Image(t, file)
	}
	return file
}

// imageTree is what engine.Look says of the image: its layers, put together by hand.
const imageTree = `/data directory 755 0:0
/data/added regular file 600 1000:5 1 6 3428719b
/data/attr regular file 644 0:0 1 5 b6545831
/data/changed regular file 640 0:0 1 4 7aa7a535
/data/hard regular file 644 1000:1000 2 5 87e434e0
/data/hard2 regular file 644 1000:1000 2 5 87e434e0
/data/keep regular file 644 5:6 1 5 f660a799
/data/suid regular file 4711 7:8 1 5 3efa6038
/full directory 750 2:3
/full/new regular file 644 0:0 1 4 7aa7a535
/kinds directory 755 0:0
/kinds/dir regular file 644 0:0 1 16 374e9b83
/kinds/fifo fifo 644 0:0
/kinds/file directory 755 0:0
/kinds/file/in regular file 644 0:0 1 3 ab508036
'/kinds/link' -> 'file' 0:0
`

// sameText compares what a program prints with what is expected.
func sameText(t testing.TB, what, want, got string) {
	t.Helper()
	if d := cmp.Diff(strings.Split(want, "\n"), strings.Split(got, "\n")); d != "" {
		t.Errorf("%s (- expected, + found):\n%s", what, d)
	}
}
