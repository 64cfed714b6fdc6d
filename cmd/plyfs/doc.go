// Command plyfs mounts container images without kernel overlayfs, and keeps
// the images, layers and containers such mounts are made of.
//
// It is one binary: commands, the daemon, and the two processes behind each
// mount (hidden verbs). This package holds flags, output and exit codes;
// package mountd does the work.
//
//	main.go dispatch.go root.go   how it was called; options of all commands
//	command_*.go                  one file per command or small group
//	output.go progress.go         tables, JSON, progress bars
//	complete.go                   what a shell offers when TAB is pressed
//	manpage.go                    manual pages, made of the texts of --help
//	printable.go                  names are hostile text: nothing reaches a terminal unescaped
//	exitcode.go                   the exit codes, which are part of the interface
//
// Standard output carries results only, standard error messages and progress;
// every message starts with "plyfs: ".
package main
