package main

import (
	"context"
	"errors"
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
		return peerError(dropIn(ctx, name, mountd.FuseOverlayfsStyle, args[1:]))
	case "mount.plyfs", "mount.fuse.plyfs", "mount.fuse3.plyfs":
		return helperError(dropIn(ctx, name, mountd.OverlayStyle, args[1:]))
	default:
		switch {
		case byMountFuse(args[1:]):
			return helperError(dropIn(ctx, name, mountd.OverlayStyle, args[1:]))
		case byEngine(args[1:]):
			return peerError(dropIn(ctx, name, mountd.MountProgramStyle, args[1:]))
		}
	}
	cmd := newRootCommand()
	cmd.SetArgs(args[1:])
	return cmd.ExecuteContext(ctx)
}

// byMountFuse reports whether the arguments are those that mount.fuse(8), called for the
// type fuse.plyfs, hands to the program with the name of the type: SOURCE MOUNTPOINT -o
// OPTIONS. The source is left out if it is empty, and may be the name of a command; but
// `plyfs overlay DIR -o …` is the command, which does the same, and the options may look
// like a file of `plyfs save NAME -o FILE`.
func byMountFuse(args []string) bool {
	n := len(args)
	if n != 3 && n != 4 || args[0] == "overlay" || args[n-2] != "-o" || strings.HasPrefix(args[0], "-") || strings.HasPrefix(args[n-3], "-") {
		return false
	}
	for opt := range strings.SplitSeq(args[n-1], ",") {
		switch key, _, hasVal := strings.Cut(opt, "="); {
		case hasVal && (key == "lowerdir" || key == "lowerdir+"):
			return true
		case n == 4 && strings.HasPrefix(opt, "@") && args[0] != "save" && args[0] != "export":
			return true
		}
	}
	return false
}

// byEngine reports whether the arguments are those of fuse-overlayfs, which begin with
// mount options: so an engine calls its mount_program, whatever its name is. No command
// begins with one of these flags.
func byEngine(args []string) bool {
	for _, a := range args {
		switch {
		case a == "-f" || a == "-d" || a == "--debug": // options must follow
		default:
			return strings.HasPrefix(a, "-o")
		}
	}
	return false
}

// peerError gives an error the exit code of fuse-overlayfs: 1, whatever it was.
func peerError(err error) error { return withCode(err, exitFailure) }

// helperError gives an error the exit code that mount(8) expects of its helpers.
func helperError(err error) error {
	if errors.Is(err, mountd.ErrUsage) {
		return withCode(err, exitHelperUsage)
	}
	return withCode(err, exitHelperMount)
}

// dropIn is the command line of a mount helper:
//
//	NAME [-f] [-d] [-o OPTIONS]… [SOURCE] MOUNTPOINT [-o OPTIONS]…
//	NAME --version
//
// Flags of mount(8) and libfuse that have no meaning here are accepted. From mount(8),
// which calls helpers mount.TYPE, -f means that nothing is to be mounted.
func dropIn(ctx context.Context, name string, style mountd.RawStyle, args []string) error {
	var opts, dirs []string
	foreground, fake := false, false
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
		case a == "-f" && strings.HasPrefix(name, "mount."):
			fake = true
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
			switch a {
			case "-r":
				opts = append(opts, "ro")
			case "-n", "-s", "-v", "-w": // of mount(8) and libfuse
			default:
				fmt.Fprintf(os.Stderr, "%s: unknown argument ignored: %s\n", name, printable(a))
			}
		default:
			dirs = append(dirs, a)
		}
	}
	switch {
	case len(dirs) == 0:
		return usagef("%s: no mount point given", name)
	case len(dirs) == 2 && style == mountd.OverlayStyle: // the first is the source column of fstab
		style.FSName = dirs[0] // shown in the mount table, as for every file system
	case len(dirs) > 1 && style == mountd.OverlayStyle:
		return usagef("%s: one mount point expected, got %d", name, len(dirs)-1)
	}
	if fake {
		if _, err := mountd.ParseRawOptions(style, opts); err != nil {
			return usage(err)
		}
		return nil
	}
	// fuse-overlayfs takes the last of any number.
	return rawMount(ctx, style, opts, dirs[len(dirs)-1], foreground)
}

// printDropInVersion prints what podman info shows; the first words of the
// second line are what callers of fuse-overlayfs look for.
func printDropInVersion(w io.Writer, name string) {
	fmt.Fprintf(w, "plyfs: version %s\n", versionString())
	fmt.Fprintf(w, "%s: version 1.14 (compatible)\n", name)
}
