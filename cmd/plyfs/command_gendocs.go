package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"
)

// newGenDocsCommand makes what goes into a package beside the binary. It is
// hidden: only the Makefile calls it.
func newGenDocsCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "gen-docs DIR",
		Short:   "Write the manual pages and shell completions below DIR",
		Hidden:  true,
		Example: `  plyfs gen-docs share`,
		Args:    exactArgs(1, "DIR"),
		RunE:    func(cmd *cobra.Command, args []string) error { return genDocs(cmd.Root(), args[0]) },
	}
}

// genDocs writes
//
//	DIR/man/man1/plyfs*.1
//	DIR/completions/{bash,zsh,fish}
//
// The pages carry the time of $SOURCE_DATE_EPOCH, or none: two builds of the
// same sources are equal.
func genDocs(root *cobra.Command, dir string) error {
	date := ""
	if s := os.Getenv("SOURCE_DATE_EPOCH"); s != "" {
		sec, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return usagef("SOURCE_DATE_EPOCH=%q: expected seconds", s)
		}
		date = time.Unix(sec, 0).UTC().Format(time.DateOnly)
	}
	man, completions := filepath.Join(dir, "man", "man1"), filepath.Join(dir, "completions")
	for _, d := range []string{man, completions} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	for _, cmd := range append(root.Commands(), root) {
		if cmd != root && !cmd.IsAvailableCommand() {
			continue
		}
		if err := os.WriteFile(filepath.Join(man, manName(cmd)+".1"), manPage(cmd, date), 0o644); err != nil {
			return fmt.Errorf("manual page: %w", err)
		}
	}
	for name, write := range completionScripts(root) {
		f, err := os.Create(filepath.Join(completions, name))
		if err != nil {
			return err
		}
		err = write(f)
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return fmt.Errorf("completion for %s: %w", name, err)
		}
	}
	return nil
}
