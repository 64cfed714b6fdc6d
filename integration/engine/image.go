package engine

import (
	"debug/elf"
	"errors"
	"os"
	"os/exec"
	"slices"
	"testing"

	"github.com/plyfs/plyfs/integration/archive"
	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// BaseImage is the name of the image that Image makes.
const BaseImage = "localhost/base:1"

// applets are the programs that the image has, all of them busybox.
var applets = []string{
	"sh", "cat", "chgrp", "chmod", "chown", "cp", "df", "echo", "find", "grep", "head", "id", "ln", "ls", "mkdir", "mkfifo", "mknod", "mount", "mv", "rm",
	"rmdir", "sed", "sha256sum", "sleep", "sort", "stat", "sync", "tail", "tar", "test", "touch", "tr", "true", "truncate", "umount", "wc",
}

// Image writes an image with busybox and three layers, in which names are added, changed,
// deleted and hidden. Some names can be left out.
func Image(t testing.TB, file string, without ...oracle.Name) {
	t.Helper()
	busybox := busyboxBinary(t)
	base := []oracle.Entry{
		{Path: "bin", Kind: oracle.Dir},
		{Path: "bin/busybox", Kind: oracle.File, Mode: 0o755, Text: busybox},
	}
	for _, a := range applets {
		base = append(base, oracle.Entry{Path: oracle.Name("bin/" + a), Kind: oracle.Symlink, Target: "busybox"})
	}
	for _, d := range []oracle.Name{"dev", "proc", "sys", "run", "etc", "var", "data", "full", "full/sub", "kinds"} {
		base = append(base, oracle.Entry{Path: d, Kind: oracle.Dir})
	}
	base = append(base, []oracle.Entry{
		{Path: "tmp", Kind: oracle.Dir, Mode: 0o1777},
		{Path: "etc/passwd", Kind: oracle.File, Text: "root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n"},
		{Path: "etc/group", Kind: oracle.File, Text: "root:x:0:\nuser:x:1000:\n"},
		{Path: "data/keep", Kind: oracle.File, Text: "keep\n", UID: 5, GID: 6},
		{Path: "data/gone", Kind: oracle.File, Text: "gone\n"},
		{Path: "data/changed", Kind: oracle.File, Text: "old\n"},
		{Path: "data/suid", Kind: oracle.File, Mode: 0o4711, UID: 7, GID: 8, Text: "suid\n"},
		{Path: "data/hard", Kind: oracle.File, Text: "hard\n", UID: 1000, GID: 1000},
		{Path: "data/hard2", Kind: oracle.Hardlink, Target: "data/hard", UID: 1000, GID: 1000},
		{Path: "data/attr", Kind: oracle.File, Text: "attr\n", Xattrs: map[string]string{"user.sample": "value"}},
		{Path: "full/hidden", Kind: oracle.File, Text: "hidden\n"},
		{Path: "full/sub/hidden", Kind: oracle.File, Text: "hidden\n"},
		{Path: "kinds/file", Kind: oracle.File, Text: "file\n"},
		{Path: "kinds/dir", Kind: oracle.Dir},
		{Path: "kinds/dir/below", Kind: oracle.File, Text: "below\n"},
		{Path: "kinds/link", Kind: oracle.Symlink, Target: "file"},
		{Path: "kinds/fifo", Kind: oracle.Fifo},
	}...)
	second := []oracle.Entry{
		{Path: "data", Kind: oracle.Dir},
		{Path: "data/gone", Kind: oracle.Whiteout},
		{Path: "data/added", Kind: oracle.File, Text: "added\n", Mode: 0o600, UID: 1000, GID: 5},
		{Path: "full", Kind: oracle.Opaque, Mode: 0o750, UID: 2, GID: 3},
		{Path: "full/new", Kind: oracle.File, Text: "new\n"},
		{Path: "kinds", Kind: oracle.Dir},
		{Path: "kinds/dir", Kind: oracle.File, Text: "was a directory\n"},
		{Path: "kinds/file", Kind: oracle.Dir},
		{Path: "kinds/file/in", Kind: oracle.File, Text: "in\n"},
	}
	third := []oracle.Entry{
		{Path: "data", Kind: oracle.Dir},
		{Path: "data/changed", Kind: oracle.File, Text: "new\n", Mode: 0o640},
	}
	im := archive.Image{Ref: BaseImage}
	for _, entries := range [][]oracle.Entry{base, second, third} {
		entries = slices.DeleteFunc(entries, func(e oracle.Entry) bool { return slices.Contains(without, e.Path) })
		b, err := oracle.Layer{Entries: entries}.Tar()
		if err != nil {
			t.Fatal(err)
		}
		im.Layers = append(im.Layers, b)
	}
	if err := im.Write(file, archive.Options{}); err != nil {
		t.Fatal(err)
	}
}

// busyboxBinary returns a busybox that needs no libraries.
func busyboxBinary(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		harness.Skip(t, "busybox is not installed")
	}
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	libs, err := f.ImportedLibraries()
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	if len(libs) > 0 {
		harness.Skip(t, "busybox-static is not installed: %s needs %v", path, libs)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// Look is a shell script for a container: it describes all files below the directories
// given, with content. The sizes and link counts of directories depend on the file system.
const Look = `find "$@" -xdev | sort | while read -r f; do
	case "$(stat -c %F "$f")" in
	directory) stat -c '%n %F %a %u:%g' "$f" ;;
	"symbolic link") stat -c '%N %u:%g' "$f" ;;
	fifo) stat -c '%n %F %a %u:%g' "$f" ;;
	*) echo "$(stat -c '%n %F %a %u:%g %h %s' "$f") $(sha256sum < "$f" | head -c 8)" ;;
	esac
done`
