package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/mountd"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/mountd/sandbox"
)

func main() { os.Exit(run(os.Args)) }

func run(args []string) int {
	if len(args) > 1 {
		switch args[1] { // started by ourselves: no options, no parsing
		case holder.VerbHolder:
			return holder.HolderMain(newLogger())
		case holder.VerbServer:
			return holder.ServerMain(newLogger())
		case mountd.VerbPurge:
			return mountd.PurgeMain(localOptions())
		case sandbox.VerbKeeper:
			o := localOptions()
			o.MaxMounts, _ = mountd.MaxMounts() // the command that has started us has said what is wrong
			return shellStatus(mountd.KeeperMain(args[2:], o, tell))
		case sandbox.VerbInit:
			return shellStatus(sandbox.InitMain(tell))
		}
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		// What a load has in memory grows with the number of names in a layer, to this
		// with three quarters of a million. Garbage need not come on top.
		debug.SetMemoryLimit(200 << 20)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends us at once
	err := dispatch(ctx, args)
	if err != nil && !silent(err) {
		if ctx.Err() != nil { // whatever it broke is no news
			err = errors.New("interrupted")
		}
		tell(sentence(err))
	}
	return exitCode(err)
}

// tell prints a message.
func tell(text string) { fmt.Fprintln(os.Stderr, "plyfs: "+printable(text)) }

// sentence is an error on one line: joined errors come with line ends.
func sentence(err error) string {
	return printable(strings.ReplaceAll(err.Error(), "\n", "; "))
}
