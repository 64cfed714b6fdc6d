package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/mountd"
)

func newOverlayCommand() *cobra.Command {
	var opts []string
	var foreground bool
	cmd := &cobra.Command{
		Use:   "overlay [-f] -o lowerdir=A:B[,upperdir=U,workdir=W] DIR",
		Short: "Mount a union of plain directories, without a store",
		Long: `Mount a union of plain directories on DIR. Options are those of kernel overlayfs.

  lowerdir=A:B:C    read-only layers, the topmost first
  lowerdir+=D       one more layer below all given so far; may be repeated
  upperdir=U        where changes go; without it the mount is read-only
  workdir=W         an empty directory on the same file system as U
  dialect=NAME      how the lowers write whiteouts: overlay (default), userxattr,
                    aufs (.wh. files) or auto (all of them)
  userxattr         user.overlay.* instead of trusted.overlay.* everywhere
  volatile          no sync ever reaches the disk
  redirect_dir=on|follow|nofollow|off metacopy=on|off index=on|off
  uidmapping=C:H:N gidmapping=C:H:N squash_to_root squash_to_uid=N squash_to_gid=N
                    other ids than the layers have: those from C on are shown from H on
  xattr_permissions=2
                    owners, modes and types stand in an attribute of the upper
  timeout=SECONDS   how long the kernel keeps names and attributes (default: for ever)
  trace=complete    the kernel keeps nothing, so that plyfs trace shows everything
  layer_xattrs      attributes user.plyfs.layer and user.plyfs.explain say where a file is
  static_nlink ino32_t noacl noxattrs=1
  ro nosuid nodev noexec noatime nodiratime strictatime allow_other fsname=NAME debug
  @FILE             more options, one on each line of a file

All of them are explained in mount.plyfs(8).

A backslash takes the special meaning from a comma, colon or backslash in a path.
The command returns once the mount is live. With -f it stays, and unmounts on Ctrl-C.`,
		Example: `  plyfs overlay -o lowerdir=/layers/2:/layers/1,upperdir=/rw/upper,workdir=/rw/work /mnt
  plyfs overlay -o lowerdir=/layers/3 -o lowerdir+=/layers/2 -o lowerdir+=/layers/1 /mnt
  plyfs umount /mnt`,
		Args:              exactArgs(1, "DIR"),
		ValidArgsFunction: completeArgs(completeDirs),
		RunE: func(cmd *cobra.Command, args []string) error {
			return rawMount(cmd.Context(), mountd.OverlayStyle, opts, args[0], foreground)
		},
	}
	cmd.Flags().StringArrayVarP(&opts, "option", "o", nil, "mount options, comma separated; may be repeated")
	cmd.Flags().BoolVarP(&foreground, "foreground", "f", false, "stay in the foreground until unmounted")
	return cmd
}

// rawMount is `plyfs overlay` and every mount helper name.
func rawMount(ctx context.Context, style mountd.RawStyle, opts []string, target string, foreground bool) error {
	o, err := mountd.ParseRawOptions(style, opts)
	if err != nil {
		return usage(err)
	}
	o.LookAtUpper()
	for _, w := range o.Warnings {
		fmt.Fprintln(os.Stderr, "plyfs: warning: "+printable(w))
	}
	if o.Debug {
		setLogLevel("debug")
	}
	if foreground {
		// Signals go to the holder, which is this process and counts them.
		return mountd.RawServe(context.WithoutCancel(ctx), o, target, newCommandLogger())
	}
	return mountd.RawMount(ctx, o, target)
}
