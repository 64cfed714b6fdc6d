package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// The fixtures here are for phases that run programs.

// goMod is the go.mod of the program that is built.
const goMod = "module bench.example/program\n\ngo 1.26\n"

// makeSource makes a layer with a git work tree, tree/, whose content is this
// module; args[0] is a tar archive of the same.
func (f *fixture) makeSource(ctx context.Context) error {
	module, err := moduleDir(ctx)
	if err != nil {
		return err
	}
	archive := filepath.Join(f.dir, "source.tar")
	layer := filepath.Join(f.dir, "0")
	tree := filepath.Join(layer, "tree")
	if err := os.MkdirAll(tree, 0o755); err != nil {
		return err
	}
	git := func(dir string, args ...string) error {
		// The clone may belong to somebody else, and nobody's configuration counts.
		argv := []string{"env", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null", "git", "-C", dir, "-c", "safe.directory=*", "-c", "user.name=bench", "-c", "user.email=bench@localhost"}
		_, err := run(ctx, append(argv, args...)...)
		return err
	}
	if err := git(module, "archive", "-o", archive, "HEAD"); err != nil {
		// Not a clone: take the sources as they lie there.
		if _, terr := run(ctx, "tar", "-C", module, "--exclude=./bin", "--exclude=./.git", "--exclude=./.cache", "-cf", archive, "."); terr != nil {
			return errors.Join(err, terr)
		}
	}
	if _, err := run(ctx, "tar", "-C", tree, "-xf", archive); err != nil {
		return err
	}
	err = errors.Join(git(tree, "init", "-q"), git(tree, "add", "-A"), git(tree, "commit", "-q", "-m", "all"))
	f.lowers, f.args = []string{layer}, []string{archive}
	return err
}

// moduleDir is where the sources of this program are.
func moduleDir(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("find the module (run inside of it): %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// buildPackages is how many packages the program has that is built.
const buildPackages = 30

// makeBuild makes a layer with a Go module, src/, that needs the standard
// library only, and a build cache, cache/, that holds that library but not the
// module.
func (f *fixture) makeBuild(ctx context.Context) error {
	layer := filepath.Join(f.dir, "0")
	src := filepath.Join(layer, "src")
	files := map[string]string{"go.mod": goMod}
	var imports, calls strings.Builder
	for i := range buildPackages {
		name := fmt.Sprintf("p%d", i)
		fmt.Fprintf(&imports, "\t\"bench.example/program/%s\"\n", name)
		fmt.Fprintf(&calls, "\tsum += len(%s.Text(sum))\n", name)
		for j := range 6 {
			files[fmt.Sprintf("%s/f%d.go", name, j)] = fmt.Sprintf("package %s\n\nimport \"fmt\"\n\nfunc text%d(n int) string { return fmt.Sprintf(\"%%d %%s\", n, %q) }\n", name, j, name)
		}
		files[name+"/text.go"] = fmt.Sprintf("package %s\n\nimport \"strings\"\n\n// Text returns something.\nfunc Text(n int) string { return strings.Repeat(text0(n), n%%7) + text5(n) }\n", name)
	}
	files["main.go"] = "package main\n\nimport (\n\t\"fmt\"\n\n" + imports.String() + ")\n\nfunc main() {\n\tsum := 1\n" + calls.String() + "\tfmt.Println(sum)\n}\n"
	for name, text := range files {
		p := filepath.Join(src, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			return err
		}
	}
	f.lowers = []string{layer}
	cache := filepath.Join(layer, "cache")
	_, err := run(ctx, append([]string{"env", "-C", src, "GOCACHE=" + cache}, append(goEnv, "go", "build", "fmt", "strings")...)...)
	return err
}

// goEnv keeps the network and the user's settings out of a build.
var goEnv = []string{"GOFLAGS=-buildvcs=false", "GOPROXY=off", "GOTOOLCHAIN=local", "CGO_ENABLED=0", "GOWORK=off"}

// makeDeb makes a layer with the data base of a package manager that has
// nothing installed; args[0] is a package with n files and no scripts.
func (f *fixture) makeDeb(ctx context.Context, n int) error {
	layer := filepath.Join(f.dir, "0")
	admin := filepath.Join(layer, "var/lib/dpkg")
	for _, d := range []string{"info", "updates", "triggers", "parts"} {
		if err := os.MkdirAll(filepath.Join(admin, d), 0o755); err != nil {
			return err
		}
	}
	for _, name := range []string{"status", "available", "info/format", "triggers/File", "triggers/Unincorp"} {
		text := ""
		if name == "info/format" {
			text = "1\n"
		}
		if err := os.WriteFile(filepath.Join(admin, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	b := newBuilder()
	for i := range n {
		b.file(fmt.Sprintf("usr/share/plyfs-bench/d%d/file-%d", i/30, i), int64(500+i*37%9000))
	}
	build := filepath.Join(f.dir, "build")
	if err := b.spec.write(build); err != nil {
		return err
	}
	control := "Package: plyfs-bench\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\nDescription: files to install\n"
	if err := os.MkdirAll(filepath.Join(build, "DEBIAN"), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(build, "DEBIAN/control"), []byte(control), 0o644); err != nil {
		return err
	}
	deb := filepath.Join(f.dir, "bench.deb")
	f.lowers, f.args = []string{layer}, []string{deb}
	_, err := run(ctx, "dpkg-deb", "--root-owner-group", "--build", build, deb)
	return err
}
