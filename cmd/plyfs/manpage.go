package main

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Manual pages are made of the same texts as --help, in the man(7) macros that
// both groff and mandoc know. Cobra's own generator goes through Markdown,
// which takes our indented tables for flowing text, and brings three modules.

// manSections are what plyfs(1) says beyond --help, and no other page does.
const manSections = `.SH ENVIRONMENT
.TP
.B PLYFS_ROOT
the store, as \fB\-\-root\fR
.TP
.B PLYFS_SOCKET
the socket of a daemon, or \fBnone\fR, as \fB\-\-socket\fR
.TP
.B PLYFS_LOG_LEVEL
as \fB\-\-log\-level\fR
.TP
.B PLYFS_RUN_DIR
where run directories go instead of \fI/run/plyfs\fR or \fI$XDG_RUNTIME_DIR/plyfs\fR
.SH FILES
.TP
.I /var/lib/plyfs
the store of root: database, layers, writable layers
.TP
.I $XDG_DATA_HOME/plyfs
that of a user; without the variable, \fI~/.local/share/plyfs\fR
.TP
.I /run/plyfs, $XDG_RUNTIME_DIR/plyfs
sockets, and the logs of mounts
`

// manPage is the page of one command. date is the second column of its
// footer, and may be empty.
func manPage(cmd *cobra.Command, date string) []byte {
	var b bytes.Buffer
	name := manName(cmd)
	fmt.Fprintf(&b, ".TH %s 1 %q %q \"plyfs\"\n", roff(strings.ToUpper(name)), date, "plyfs "+versionString())
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", roff(name), roff(cmd.Short))

	path := cmd.CommandPath()
	b.WriteString(".SH SYNOPSIS\n")
	if cmd.HasAvailableSubCommands() {
		fmt.Fprintf(&b, "\\fB%s\\fR [\\fIOPTION\\fR]... \\fICOMMAND\\fR ...\n", roff(path))
	} else {
		use := strings.TrimPrefix(cmd.Use, cmd.Name())
		fmt.Fprintf(&b, "\\fB%s\\fR [\\fIOPTION\\fR]...%s\n", roff(path), roff(use))
	}

	b.WriteString(".SH DESCRIPTION\n")
	if cmd.Long != "" {
		manText(&b, cmd.Long)
	} else {
		b.WriteString(roff(cmd.Short) + ".\n")
	}
	manCommands(&b, cmd)
	manOptions(&b, cmd)
	if cmd.Example != "" {
		b.WriteString(".SH EXAMPLES\n.EX\n")
		for line := range strings.Lines(cmd.Example) {
			b.WriteString(roff(strings.TrimSuffix(line, "\n")) + "\n")
		}
		b.WriteString(".EE\n")
	}
	if !cmd.HasParent() {
		b.WriteString(manSections)
	}
	b.WriteString(".SH \"SEE ALSO\"\n")
	if cmd.HasParent() {
		b.WriteString(".BR plyfs (1),\n")
	}
	b.WriteString(".BR mount.plyfs (8)\n")
	return b.Bytes()
}

// manName is the name of a command's page.
func manName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

// manText writes paragraphs; what is indented is a table, and stays as it is.
func manText(b *bytes.Buffer, text string) {
	for i, par := range strings.Split(text, "\n\n") {
		if i > 0 {
			b.WriteString(".PP\n")
		}
		table := strings.HasPrefix(par, " ")
		if table {
			b.WriteString(".EX\n")
		}
		for line := range strings.Lines(par) {
			b.WriteString(roff(strings.TrimSuffix(line, "\n")) + "\n")
		}
		if table {
			b.WriteString(".EE\n")
		}
	}
}

// manCommands lists subcommands by group, each with a reference to its page.
func manCommands(b *bytes.Buffer, cmd *cobra.Command) {
	if !cmd.HasAvailableSubCommands() {
		return
	}
	b.WriteString(".SH COMMANDS\n")
	for _, g := range cmd.Groups() {
		fmt.Fprintf(b, ".SS %q\n", roff(strings.TrimSuffix(g.Title, ":")))
		for _, sub := range cmd.Commands() {
			if sub.IsAvailableCommand() && sub.GroupID == g.ID {
				fmt.Fprintf(b, ".TP\n.BR %s (1)\n%s\n", roff(manName(sub)), roff(sub.Short))
			}
		}
	}
}

// manOptions lists the options of a command, and names those of all commands.
func manOptions(b *bytes.Buffer, cmd *cobra.Command) {
	b.WriteString(".SH OPTIONS\n")
	cmd.InitDefaultHelpFlag()
	cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		kind, usage := pflag.UnquoteUsage(f)
		b.WriteString(".TP\n")
		if f.Shorthand != "" {
			fmt.Fprintf(b, "\\fB\\-%s\\fR, ", roff(f.Shorthand))
		}
		fmt.Fprintf(b, "\\fB\\-\\-%s\\fR", roff(f.Name))
		if kind != "" {
			fmt.Fprintf(b, " \\fI%s\\fR", roff(strings.TrimSuffix(kind, "Array")))
		}
		b.WriteString("\n" + roff(usage) + "\n")
	})
	var common []string
	cmd.InheritedFlags().VisitAll(func(f *pflag.Flag) {
		common = append(common, "\\fB\\-\\-"+roff(f.Name)+"\\fR")
	})
	if len(common) > 0 {
		fmt.Fprintf(b, ".PP\nThe options of all commands, %s, are described in\n.BR plyfs (1).\n", strings.Join(common, ", "))
	}
}

// roff escapes text. A hyphen would be typeset as one, which no shell takes
// for a minus sign; characters beyond ASCII are not on every terminal.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`, "…", "...", "→", `\(->`, "'", `\(aq`, "`", `\(ga`, "^", `\(ha`, "~", `\(ti`, `"`, `\(dq`).Replace(s)
	if strings.HasPrefix(s, ".") {
		s = `\&` + s
	}
	return s
}
