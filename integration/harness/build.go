package harness

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"
)

// binary is built at most once per test process.
var binary struct {
	once sync.Once
	path string
	dir  string
	err  error
}

// Binary returns the path of the plyfs binary: $PLYFS_BIN, or one built from
// the module that holds the working directory.
func Binary() (string, error) {
	binary.once.Do(func() {
		if p := os.Getenv("PLYFS_BIN"); p != "" {
			binary.path, binary.err = filepath.Abs(p)
			return
		}
		binary.dir, binary.err = os.MkdirTemp("", "plyfs-bin-")
		if binary.err != nil {
			return
		}
		// Normal users of a user namespace test must be able to run it.
		binary.err = os.Chmod(binary.dir, 0o755)
		if binary.err != nil {
			return
		}
		binary.path = filepath.Join(binary.dir, "plyfs")
		args := []string{"build", "-o", binary.path}
		env := append(os.Environ(), "CGO_ENABLED=0")
		if os.Getenv("PLYFS_RACE") == "1" {
			args = append(args, "-race")
			env = append(os.Environ(), "CGO_ENABLED=1")
		}
		cmd := exec.Command("go", append(args, "github.com/plyfs/plyfs/cmd/plyfs")...)
		cmd.Env = env
		if out, err := run(cmd, 5*time.Minute); err != nil {
			binary.err = fmt.Errorf("build plyfs: %w\n%s", err, out)
		}
	})
	return binary.path, binary.err
}

// DropIn returns the path of the plyfs binary under the name of fuse-overlayfs. Nothing else
// is in its directory but what Binary has built.
func DropIn() (string, error) {
	bin, err := Binary()
	if err != nil {
		return "", err
	}
	if binary.dir == "" {
		if binary.dir, err = os.MkdirTemp("", "plyfs-bin-"); err != nil {
			return "", err
		}
	}
	link := filepath.Join(binary.dir, "fuse-overlayfs")
	if err := os.Symlink(bin, link); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return link, nil
}

// RemoveBinary deletes what Binary built. TestMain calls it last.
func RemoveBinary() {
	if binary.dir != "" {
		_ = os.RemoveAll(binary.dir) // a leftover in $TMPDIR is harmless
	}
}

// run executes cmd with a time limit and returns its combined output.
func run(cmd *exec.Cmd, limit time.Duration) ([]byte, error) {
	timer := time.AfterFunc(limit, func() {
		if cmd.Process != nil {
			_ = cmd.Process.Kill() // it may have ended meanwhile
		}
	})
	defer timer.Stop()
	return cmd.CombinedOutput()
}
