package crash

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/oracle"
)

// fileSize is the size of most files: many blocks, the last one not full.
const fileSize = 90000

func file(name string, seed int) oracle.Entry {
	return oracle.Entry{Path: oracle.Name(name), Kind: oracle.File, Size: fileSize, Seed: int64(seed), Xattrs: map[string]string{"user.k": name}}
}

func dir(name string) oracle.Entry { return oracle.Entry{Path: oracle.Name(name), Kind: oracle.Dir} }

func link(name, to string) oracle.Entry {
	return oracle.Entry{Path: oracle.Name(name), Kind: oracle.Hardlink, Target: oracle.Name(to)}
}

// Stories makes stories that hold through a loss of power; those of different
// instances do not meet.
func Stories(instance int) []*Story {
	seed := 100 * instance
	file := func(name string, n int) oracle.Entry { return file(name, seed+n) }
	sparse := file("a", 1)
	sparse.Size, sparse.Sparse = 500000, true
	a, b := file("a", 1), file("b", 2)
	blocks := a
	blocks.Size = 20 * block
	stories := []*Story{
		{Name: "chmod", Times: true, Lower: []oracle.Entry{a}, Steps: steps(chmod("a"), fsync("a"))},
		{Name: "write", Lower: []oracle.Entry{a}, Steps: steps(write("a", 50), fsync("a"), write("a", 70000), fsync("a"))},
		{Name: "datasync", Lower: []oracle.Entry{a}, Steps: steps(write("a", 50), fdatasync("a"))},
		{Name: "chmod-write", Lower: []oracle.Entry{a}, Steps: steps(chmod("a"), fsync("a"), write("a", 50), fsync("a"))},
		{Name: "chmod-write-unsynced", Lower: []oracle.Entry{a}, Steps: steps(chmod("a"), write("a", 50))},
		{Name: "chmod-truncate", Lower: []oracle.Entry{a}, Steps: steps(chmod("a"), truncate("a", 10*block), fsync("a"))},
		{Name: "sparse", Lower: []oracle.Entry{sparse}, Steps: steps(chmod("a"), write("a", 50), fsync("a"))},
		{Name: "truncate", Lower: []oracle.Entry{a}, Steps: steps(truncate("a", 10*block), fsync("a"), truncate("a", 12*block), fsync("a"))},
		{Name: "append", Lower: []oracle.Entry{blocks}, Steps: steps(appendTo("a"), fsync("a"))},
		{Name: "setxattr", Times: true, Lower: []oracle.Entry{a}, Steps: steps(setxattr("a"), fsync("a"))},
		{Name: "rename", Times: true, Lower: []oracle.Entry{a}, Steps: steps(rename("a", "b"), fsync("."))},
		{Name: "rename-over", Times: true, Lower: []oracle.Entry{a, b}, Steps: steps(rename("a", "b"), fsync("."))},
		{Name: "rename-write", Lower: []oracle.Entry{a}, Steps: steps(rename("a", "b"), fsync("."), write("b", 50), fsync("b"))},
		{Name: "move", Times: true, Lower: []oracle.Entry{dir("d"), dir("e"), file("d/a", 1)}, Steps: steps(rename("d/a", "e/b"), fsync("e"))},
		{Name: "replace", Lower: []oracle.Entry{a}, Steps: steps(
			create("t"), put("t", 1), fsync("t"), rename("t", "a"), fsync("."),
			create("t"), put("t", 2), fsync("t"), rename("t", "a"), fsync("."))},
		{Name: "unlink", Times: true, Lower: []oracle.Entry{a, b}, Steps: steps(unlink("a"), fsync("."))},
		{Name: "unlink-create", Lower: []oracle.Entry{a}, Steps: steps(unlink("a"), create("a"), put("a", 3), fsync("a"))},
		{Name: "chmod-unlink", Lower: []oracle.Entry{a}, Steps: steps(chmod("a"), unlink("a"), fsync("."))},
		{Name: "rmdir-mkdir", Lower: []oracle.Entry{dir("d"), file("d/a", 1)}, Steps: steps(
			unlink("d/a"), rmdir("d"), fsync("."), mkdir("d"), create("d/n"), put("d/n", 4), fsync("d/n"))},
		{Name: "replace-dir", Lower: []oracle.Entry{dir("d"), file("d/a", 1)}, Steps: steps(
			unlink("d/a"), mkdir("e"), create("e/n"), put("e/n", 5), fsync("e/n"), rename("e", "d"), fsync("."))},
		{Name: "links", Lower: []oracle.Entry{dir("d"), a, link("b", "a"), link("d/c", "a")}, Steps: steps(
			write("a", 50), fsync("a"), chmod("b"), fsync("b"), unlink("a"), fsync("."))},
		{Name: "links-unlink", Times: true, Lower: []oracle.Entry{a, link("b", "a")}, Steps: steps(unlink("a"), fsync("."), unlink("b"), fsync("."))},
		{Name: "links-rename", Times: true, Lower: []oracle.Entry{a, link("b", "a")}, Steps: steps(rename("a", "c"), fsync("."), chmod("b"), fsync("c"))},
		{Name: "link", Times: true, Lower: []oracle.Entry{a}, Steps: steps(hardlink("a", "b"), fsync("."))},
		{Name: "link-write", Lower: []oracle.Entry{a}, Steps: steps(hardlink("a", "b"), write("b", 50), fsync("a"))},
		{Name: "rename-dir", Lower: []oracle.Entry{dir("d"), dir("d/s"), file("d/a", 1), file("d/s/b", 2)}, Steps: steps(
			rename("d", "e"), fsync("."), write("e/a", 50), fsync("e/a"), rename("e/s", "s"), fsync("."))},
		{Name: "exchange", Times: true, Lower: []oracle.Entry{a, b}, Steps: steps(exchange("a", "b"), fsync("."))},
		{Name: "exchange-dirs", Times: true, Lower: []oracle.Entry{dir("d"), file("d/a", 1), dir("e"), file("e/b", 2)}, Steps: steps(exchange("d", "e"), fsync("."))},
		{Name: "chmod-dir", Times: true, Lower: []oracle.Entry{dir("d"), file("d/a", 1)}, Steps: steps(chmod("d"), fsync("d"), chmod("d/a"), fsync("d/a"))},
		{Name: "tmpfile", Lower: []oracle.Entry{a}, Steps: steps(tmpfile("b", 6), fsync("."))},
		{Name: "symlink", Lower: []oracle.Entry{{Path: "l", Kind: oracle.Symlink, Target: "x"}}, Steps: steps(rename("l", "m"), fsync("."))},
	}
	for _, s := range stories {
		s.Name = fmt.Sprintf("%s-%d", s.Name, instance)
	}
	return stories
}

// NameStories makes stories about names only, which need no disk to fail.
func NameStories() []*Story {
	a, b := file("a", 1), file("b", 2)
	open := dir("d")
	open.Mode = 0o777
	return []*Story{
		{Name: "rename-to-whiteout", Times: true, Lower: []oracle.Entry{a, b}, Steps: steps(unlink("b"), rename("a", "b"))},
		{Name: "rename-new-to-whiteout", Times: true, Lower: []oracle.Entry{a}, Steps: steps(create("n"), unlink("a"), rename("n", "a"))},
		{Name: "rename-to-file-whiteout", Times: true, Lower: []oracle.Entry{a, b}, Upper: []oracle.Entry{{Path: "b", Kind: oracle.XWhiteout}}, Steps: steps(rename("a", "b"))},
		{Name: "link-to-whiteout", Times: true, Lower: []oracle.Entry{a, b}, Steps: steps(unlink("b"), hardlink("a", "b"))},
		{Name: "create-at-whiteout", Times: true, Lower: []oracle.Entry{a}, Steps: steps(unlink("a"), create("a"))},
		{Name: "symlink-at-whiteout", Times: true, Lower: []oracle.Entry{a}, Steps: steps(unlink("a"), symlink("a"))},
		{Name: "mkdir-at-whiteout", Lower: []oracle.Entry{a}, Steps: steps(unlink("a"), mkdir("a"), create("a/n"))},
		{Name: "rmdir-moved", Lower: []oracle.Entry{dir("d"), file("d/a", 1)}, Steps: steps(rename("d", "e"), unlink("e/a"), rmdir("e"))},
		{Name: "rmdir-created", Steps: steps(mkdir("d"), rmdir("d"))},
		{Name: "deep", Times: true, Lower: []oracle.Entry{dir("d"), dir("d/e"), dir("d/e/f"), file("d/e/f/a", 1)}, Steps: steps(chmod("d/e/f/a"))},
		{Name: "open-trunc", Lower: []oracle.Entry{a}, Steps: steps(openTrunc("a"))},
		{Name: "chmod-open-trunc", Lower: []oracle.Entry{a}, Steps: steps(chmod("a"), openTrunc("a"))},
		{Name: "other-owner", Times: true, Lower: []oracle.Entry{open}, Steps: steps(asUser(create("d/n")), asUser(mkdir("d/m")), asUser(symlink("d/l")))},
		{Name: "links-of-new", Times: true, Steps: steps(create("a"), hardlink("a", "b"), unlink("a"), rename("b", "c"))},
		{Name: "links-over", Times: true, Lower: []oracle.Entry{a, link("b", "a"), file("c", 3)}, Steps: steps(rename("c", "a"), hardlink("b", "d"), unlink("b"), unlink("d"))},
		{Name: "links-dirs", Times: true, Lower: []oracle.Entry{dir("d"), dir("e"), file("d/a", 1), link("e/b", "d/a")}, Steps: steps(
			chmod("d/a"), rename("e/b", "d/c"), unlink("d/a"), unlink("d/c"))},
		{Name: "exchange-mixed", Times: true, Lower: []oracle.Entry{a, dir("d"), file("d/b", 2)}, Steps: steps(exchange("a", "d"), exchange("a", "d"))},
	}
}

// LameStories makes stories for an upper that has no RENAME_WHITEOUT.
func LameStories() []*Story {
	a := file("a", 1)
	return []*Story{
		{Name: "lame-rename", Times: true, Lower: []oracle.Entry{a}, Steps: steps(rename("a", "b")), Also: steps(clone("a", "b"))},
		{Name: "lame-rename-dir", Times: true, Lower: []oracle.Entry{dir("d"), file("d/a", 1)}, Steps: steps(rename("d", "e")), Also: steps(clone("d", "e"))},
		{Name: "lame-unlink", Times: true, Lower: []oracle.Entry{a}, Steps: steps(chmod("a"), unlink("a"), create("a"), unlink("a"))},
		{Name: "lame-rmdir", Times: true, Lower: []oracle.Entry{dir("d")}, Steps: steps(chmod("d"), rmdir("d"), mkdir("d"))},
	}
}

func steps(s ...Step) []Step { return s }

func chmod(name string) Step {
	return Step{What: "chmod " + name, do: func(dir string) error { return os.Chmod(dir+"/"+name, 0o700) }}
}

// write changes a few bytes inside one block.
func write(name string, off int64) Step {
	return Step{What: fmt.Sprintf("write %s at %d", name, off), do: func(dir string) error {
		return withFile(dir+"/"+name, os.O_WRONLY, func(f *os.File) error {
			_, err := f.WriteAt([]byte("<written>"), off)
			return err
		})
	}}
}

// appendTo adds a few bytes to a file whose last block is full.
func appendTo(name string) Step {
	return Step{What: "append to " + name, fills: name, do: func(dir string) error {
		return withFile(dir+"/"+name, os.O_WRONLY|os.O_APPEND, func(f *os.File) error {
			_, err := f.WriteString("<appended>")
			return err
		})
	}}
}

// put fills an empty file with less than a block.
func put(name string, seed int64) Step {
	return Step{What: "write " + name, fills: name, do: func(dir string) error {
		return withFile(dir+"/"+name, os.O_WRONLY, func(f *os.File) error {
			_, err := f.Write(oracle.Pattern(seed, 3000))
			return err
		})
	}}
}

func create(name string) Step {
	return Step{What: "create " + name, do: func(dir string) error {
		return withFile(dir+"/"+name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, func(*os.File) error { return nil })
	}}
}

// tmpfile gives a file its name when it is complete and synced.
func tmpfile(name string, seed int64) Step {
	return Step{What: "O_TMPFILE and link to " + name, do: func(dir string) error {
		return withFile(dir, os.O_WRONLY|unix.O_TMPFILE, func(f *os.File) error {
			if _, err := f.Write(oracle.Pattern(seed, 3000)); err != nil {
				return err
			}
			if err := f.Sync(); err != nil {
				return err
			}
			return unix.Linkat(int(f.Fd()), "", unix.AT_FDCWD, dir+"/"+name, unix.AT_EMPTY_PATH)
		})
	}}
}

// fsync is fsync(2) of a file or directory.
func fsync(name string) Step {
	return Step{What: "fsync " + name, Sync: true, do: func(dir string) error {
		return withFile(dir+"/"+name, os.O_RDONLY, (*os.File).Sync)
	}}
}

// fdatasync is fdatasync(2).
func fdatasync(name string) Step {
	return Step{What: "fdatasync " + name, Sync: true, do: func(dir string) error {
		return withFile(dir+"/"+name, os.O_RDONLY, func(f *os.File) error { return unix.Fdatasync(int(f.Fd())) })
	}}
}

func withFile(path string, flags int, fn func(*os.File) error) error {
	f, err := os.OpenFile(path, flags, 0o644)
	if err != nil {
		return err
	}
	err = fn(f)
	if e := f.Close(); err == nil {
		err = e
	}
	return err
}

// truncate sets the size to whole blocks. (Of the last one, ext4 may zero the end
// and keep the size.)
func truncate(name string, size int64) Step {
	return Step{What: fmt.Sprintf("truncate %s to %d", name, size), do: func(dir string) error { return os.Truncate(dir+"/"+name, size) }}
}

func setxattr(name string) Step {
	return Step{What: "setxattr " + name, do: func(dir string) error { return unix.Setxattr(dir+"/"+name, "user.new", []byte("v"), 0) }}
}

func rename(name, to string) Step {
	return Step{What: "rename " + name + " to " + to, do: func(dir string) error {
		return unix.Rename(dir+"/"+name, dir+"/"+to)
	}}
}

func exchange(name, with string) Step {
	return Step{What: "exchange " + name + " and " + with, do: func(dir string) error {
		return unix.Renameat2(unix.AT_FDCWD, dir+"/"+name, unix.AT_FDCWD, dir+"/"+with, unix.RENAME_EXCHANGE)
	}}
}

func hardlink(name, to string) Step {
	return Step{What: "link " + name + " to " + to, do: func(dir string) error { return unix.Link(dir+"/"+name, dir+"/"+to) }}
}

func unlink(name string) Step {
	return Step{What: "unlink " + name, do: func(dir string) error { return unix.Unlink(dir + "/" + name) }}
}

func mkdir(name string) Step {
	return Step{What: "mkdir " + name, do: func(dir string) error { return os.Mkdir(dir+"/"+name, 0o755) }}
}

func rmdir(name string) Step {
	return Step{What: "rmdir " + name, do: func(dir string) error { return unix.Rmdir(dir + "/" + name) }}
}

func symlink(name string) Step {
	return Step{What: "symlink " + name, do: func(dir string) error { return os.Symlink("target", dir+"/"+name) }}
}

// openTrunc is open(2) with O_TRUNC.
func openTrunc(name string) Step {
	return Step{What: "truncate by open " + name, do: func(dir string) error {
		return withFile(dir+"/"+name, os.O_WRONLY|os.O_TRUNC, func(*os.File) error { return nil })
	}}
}

// clone copies a tree with all attributes.
func clone(name, to string) Step {
	return Step{What: "copy " + name + " to " + to, do: func(dir string) error {
		out, err := exec.Command("cp", "-a", dir+"/"+name, dir+"/"+to).CombinedOutput()
		if err != nil {
			return fmt.Errorf("cp: %w: %s", err, out)
		}
		return nil
	}}
}

// user is somebody who is not root.
const user = 1000

// asUser carries out a step as user, on a thread that ends with it.
func asUser(s Step) Step {
	do := s.do
	s.What += " as a user"
	s.do = func(dir string) error {
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // and never unlocked
			for _, call := range []uintptr{unix.SYS_SETFSGID, unix.SYS_SETFSUID} {
				_, _, _ = unix.RawSyscall(call, user, 0, 0) // they have no way to fail
			}
			done <- do(dir)
		}()
		return <-done
	}
	return s
}
