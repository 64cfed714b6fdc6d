package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/snapshotter"
)

func newSnapshotterCommand() *cobra.Command {
	var root, address string
	cmd := &cobra.Command{
		Use:   "snapshotter [--address SOCKET] [--root DIR]",
		Short: "Serve snapshots to containerd, as a proxy plugin",
		Long: `Be a snapshotter of containerd: serve containerd.services.snapshots.v1.Snapshots on a unix
socket, in the foreground, until SIGTERM or Ctrl-C. containerd unpacks images into it and
gets the root file systems of containers from it, in place of kernel overlayfs. In its
config.toml:

  [proxy_plugins.plyfs]
    type = "snapshot"
    address = "/run/plyfs/snapshotter.sock"

The snapshots have a directory of their own and are not images of the store. Unions have
processes of their own: they stay when the snapshotter stops, and the next one finds
them again. containerd and the snapshotter must be in the same mount namespace. With
NOTIFY_SOCKET set, readiness is announced as systemd expects (Type=notify; also set
KillMode=process, which spares the mounts).`,
		Example: `  plyfs snapshotter
  plyfs snapshotter --address /run/snap.sock --root /srv/snapshots
  ctr image pull --snapshotter plyfs docker.io/library/debian:12`,
		Args: exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if root == "" {
				if root, err = snapshotter.DefaultRoot(); err != nil {
					return err
				}
			}
			if address == "" {
				address = snapshotter.DefaultAddress()
			}
			if os.Getenv(logLevelEnv) == "" {
				setLogLevel("info")
			}
			return snapshotter.Run(cmd.Context(), snapshotter.Options{Root: root, Address: address, Logger: newLogger()})
		},
	}
	cmd.Flags().StringVar(&root, "root", "", "directory of the snapshots (default /var/lib/plyfs/snapshotter, or $XDG_DATA_HOME/plyfs/snapshotter for users)")
	cmd.Flags().StringVar(&address, "address", "", "socket to serve on (default /run/plyfs/snapshotter.sock, or $XDG_RUNTIME_DIR/plyfs/snapshotter.sock for users)")
	return cmd
}
