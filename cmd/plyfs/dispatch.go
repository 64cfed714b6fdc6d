package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/plyfs/plyfs/mountd"
)

// dispatch obeys the name the binary was called by: engines call a "mount
// program" by the name of fuse-overlayfs, mount(8) calls helpers by type.
func dispatch(ctx context.Context, args []string) error {
	switch name := filepath.Base(args[0]); name {
	case "fuse-overlayfs":
		return dropIn(ctx, name, mountd.FuseOverlayfsStyle, args[1:])
	case "mount.plyfs", "mount.fuse.plyfs", "mount.fuse3.plyfs":
		return dropIn(ctx, name, mountd.OverlayStyle, args[1:])
	}
	cmd := newRootCommand()
	cmd.SetArgs(args[1:])
	return cmd.ExecuteContext(ctx)
}

// dropIn is the command line of a mount helper:
//
//	NAME [-f] [-d] [-o OPTIONS]… [SOURCE] MOUNTPOINT [-o OPTIONS]…
//	NAME --version
//
// Flags of mount(8) and libfuse that have no meaning here are accepted.
func dropIn(ctx context.Context, name string, style mountd.RawStyle, args []string) error {
	var opts, dirs []string
	foreground := false
	for i := 0; i < len(args); i++ {
		a := args[i]
		switch {
		case a == "--version" || a == "-V":
			printDropInVersion(os.Stdout, name)
			return nil
		case a == "--help" || a == "-h":
			fmt.Printf("usage: %s [-f] -o lowerdir=A:B[,upperdir=U,workdir=W] MOUNTPOINT\n", name)
			return nil
		case a == "-o" || a == "-t":
			if i++; i == len(args) {
				return usagef("%s: option %s needs a value", name, a)
			}
			if a == "-o" {
				opts = append(opts, args[i])
			}
		case a == "-f":
			foreground = true
		case a == "-d" || a == "--debug":
			foreground = true
			opts = append(opts, "debug")
		case a == "--":
			dirs = append(dirs, args[i+1:]...)
			i = len(args)
		case strings.HasPrefix(a, "-o"):
			opts = append(opts, a[2:])
		case strings.HasPrefix(a, "-") && len(a) > 1:
			// -n, -s, -v, -w, -r of mount(8); -s of libfuse
			if a == "-r" {
				opts = append(opts, "ro")
			}
		default:
			dirs = append(dirs, a)
		}
	}
	switch len(dirs) {
	case 1:
	case 2: // the first is the source column of fstab
		if style == mountd.OverlayStyle {
			// Shown in the mount table, as for every file system.
			style.FSName = dirs[0]
		}
		dirs = dirs[1:]
	default:
		return usagef("%s: one mount point expected, got %d", name, len(dirs))
	}
	return rawMount(ctx, style, opts, dirs[0], foreground)
}

// printDropInVersion prints what podman info shows; the first words of the
// second line are what callers of fuse-overlayfs look for.
func printDropInVersion(w io.Writer, name string) {
	fmt.Fprintf(w, "plyfs: version %s\n", versionString())
	fmt.Fprintf(w, "%s: version 1.14 (compatible)\n", name)
}
