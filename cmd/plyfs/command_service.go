package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/mountd"
)

func newDaemonCommand(a *app) *cobra.Command {
	var metricsAddress string
	var maxMounts int
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Serve the store to other commands over a socket",
		Long: `Serve the store on a unix socket, in the foreground, until SIGTERM or Ctrl-C. Commands
with the same store find it by themselves. Mounts have processes of their own: they
stay when the daemon stops. With NOTIFY_SOCKET set, readiness is announced as systemd
expects (Type=notify; also set KillMode=process, which spares the mounts). At its start
mounts made with plyfs mount --restart that have ended are made again (plyfs restore).

Metrics for Prometheus are at GET /metrics on the socket, and with --metrics-address also
at that address, for all users of this machine.`,
		Example: `  plyfs daemon
  plyfs daemon --metrics-address 127.0.0.1:9834
  plyfs --root /srv/images --socket /run/images.sock daemon`,
		Args: exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			root, _, err := a.storeRoot()
			if err != nil {
				return err
			}
			socket := a.socketPath()
			if socket == mountd.NoSocket {
				return usagef("a daemon needs a socket: --socket none is for other commands")
			}
			if !cmd.Flags().Changed("max-mounts") {
				if maxMounts, err = mountd.MaxMounts(); err != nil {
					return err
				}
			}
			if maxMounts < 0 {
				return usagef("--max-mounts cannot be negative")
			}
			if os.Getenv(logLevelEnv) == "" {
				setLogLevel("info")
			}
			return mountd.RunDaemon(cmd.Context(), root, mountd.DaemonOptions{
				Socket: socket, Logger: newLogger(), Version: versionString(), MetricsAddress: metricsAddress,
				MaxMounts: maxMounts,
			})
		},
	}
	cmd.Flags().StringVar(&metricsAddress, "metrics-address", "", "serve metrics over HTTP at this address of the loopback interface, as 127.0.0.1:PORT")
	cmd.Flags().IntVar(&maxMounts, "max-mounts", 0, "how many mounts of the store there may be, those made without the daemon included; 0: any number (PLYFS_MAX_MOUNTS)")
	return cmd
}

func newDoctorCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "doctor",
		Short:   "Show what this machine allows, and what follows from it",
		Example: "  plyfs doctor",
		Args:    exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			root, _, err := a.storeRoot()
			if err != nil {
				return err
			}
			found := mountd.Doctor(cmd.Context(), root)
			if a.json {
				return printJSON(found)
			}
			t := newTable(os.Stdout, "WHAT", "FOUND", "WHAT FOLLOWS")
			for _, f := range found {
				mark := "ok  "
				if !f.OK {
					mark = "!!  "
				}
				t.row(mark+f.What, f.Found, f.Follows)
			}
			return t.flush()
		},
	}
}

func newVersionCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Show the version of this binary, and of the daemon if one answers",
		Example: "  plyfs version --json",
		Args:    exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := struct {
				Version string       `json:"version"`
				Daemon  *mountd.Info `json:"daemon,omitempty"`
			}{Version: versionString()}
			if root, given, err := a.storeRoot(); err == nil {
				v.Daemon = mountd.FindDaemon(cmd.Context(), mountd.OpenOptions{Root: root, RootGiven: given, Socket: a.socketPath()})
			}
			if a.json {
				return printJSON(v)
			}
			fmt.Println("plyfs " + v.Version)
			if v.Daemon != nil {
				fmt.Printf("daemon %s, process %d, store %s\n", printable(v.Daemon.Version), v.Daemon.Pid, quoted(v.Daemon.Root))
			}
			return nil
		},
	}
}
