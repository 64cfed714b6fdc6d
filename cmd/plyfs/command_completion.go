package main

import (
	"io"
	"os"

	"github.com/spf13/cobra"
)

func newCompletionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print what makes a shell complete commands and names",
		Long: `Print a script that makes the shell complete commands, options, images, containers and
mount points. Packages install it where the shell looks for it; by hand, source it.`,
		Example: `  source <(plyfs completion bash)
  plyfs completion fish > ~/.config/fish/completions/plyfs.fish`,
		Args:              exactArgs(1, "the name of a shell: bash, zsh or fish"),
		ValidArgsFunction: completeArgs(completeWords("bash", "zsh", "fish")),
		RunE: func(cmd *cobra.Command, args []string) error {
			write := completionScripts(cmd.Root())[args[0]]
			if write == nil {
				return usagef("no completion for shell %q: expected bash, zsh or fish", args[0])
			}
			return write(os.Stdout)
		},
	}
}

// completionScripts makes the script of a shell, by its name.
func completionScripts(root *cobra.Command) map[string]func(io.Writer) error {
	return map[string]func(io.Writer) error{
		"bash": func(w io.Writer) error { return root.GenBashCompletionV2(w, true) },
		"zsh":  root.GenZshCompletion,
		"fish": func(w io.Writer) error { return root.GenFishCompletion(w, true) },
	}
}
