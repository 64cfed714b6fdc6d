package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs/counters"
	"github.com/plyfs/plyfs/unionfs/inject"
	"github.com/plyfs/plyfs/unionfs/trace"
)

// maxRules bounds what is read of a file of rules.
const maxRules = 1 << 20

func newInjectCommand(a *app) *cobra.Command {
	var r inject.Rule
	var pid uint32
	var file, path, command string
	var list bool
	var clearIDs []string
	cmd := &cobra.Command{
		Use:   "inject DIR|NAME (--op OP (--errno NAME | --latency TIME | --short BYTES) | --file RULES | --list | --clear ID|all)",
		Short: "Make operations on a live mount fail, wait or fall short, to test programs",
		Long: `Add a rule to a live mount: operations that match it are answered with an error and not
carried out, wait first, or move fewer bytes than they were asked for. Conditions come together: the
operation, a pattern of its path, the process, a probability, the number of the match. A rule ends
by itself (--for, 10 minutes if nothing is said) or with --clear, and with the mount's server.
Only the owner of the mount and root can do that.

Rules about read and write act on files that are opened from then on: what is open already may be
read and written by the kernel alone. A file that such a rule names is opened without any
cache for as long as there is the rule. ENOSYS is refused: the kernel would remember it.

--file reads rules from a file, - for standard input: JSON, one after the other, as --list --json
prints them.`,
		Example: `  plyfs inject /mnt --op fsync --path '/var/lib/postgresql/**' --errno EIO --nth 3
  plyfs inject work --op write --errno ENOSPC --prob 0.01 --for 1m
  plyfs inject /mnt --op attr,name --latency 5ms --pid 4711
  plyfs inject /mnt --op write --path '*.log' --short 100
  plyfs inject /mnt --list
  plyfs inject /mnt --clear all`,
		Args:              exactArgs(1, "DIR or NAME"),
		ValidArgsFunction: completeEach(a.mounted()),
		RunE: func(cmd *cobra.Command, args []string) error {
			var req holder.InjectRequest
			var err error
			adds := cmd.Flags().Changed("op") || cmd.Flags().Changed("errno") || cmd.Flags().Changed("latency") || cmd.Flags().Changed("short")
			given := 0
			for _, on := range []bool{adds, file != "", list, len(clearIDs) > 0} {
				if on {
					given++
				}
			}
			if given != 1 {
				return usagef("say one thing: a rule (--op …), --file, --list or --clear")
			}
			switch {
			case adds:
				r.Pid, r.Path, r.Command = pid, trace.Text(path), trace.Text(command)
				for _, name := range []string{"prob", "nth", "from", "for", "pid"} { // 0 stands for nothing said
					if f := cmd.Flags().Lookup(name); f.Changed && strings.Trim(f.Value.String(), "0.s") == "" {
						return usagef("--%s: expected more than 0", name)
					}
				}
				if err := r.Validate(counters.OpNames()); err != nil {
					return usagef("%v", err)
				}
				req.Add = []inject.Rule{r}
			case file != "":
				req.Add, err = readRules(file)
			default:
				req.ClearAll, req.Clear, err = parseClear(clearIDs)
			}
			if err != nil {
				return err
			}
			m, err := a.live(cmd, args[0])
			if err != nil {
				return err
			}
			ans, err := control(cmd.Context(), m, holder.Control{Inject: &req})
			if err != nil {
				return err
			}
			return errors.Join(a.printRules(ans, adds || file != "", len(clearIDs) > 0), notCleared(req.Clear, ans.Cleared))
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&r.Ops, "op", nil, "operations, or groups: name, attr, data, dir, sync, change")
	f.StringVar(&path, "path", "", "paths: /etc/*, /var/lib/**, or a name as *.conf (default: all)")
	f.Uint32Var(&pid, "pid", 0, "process or thread (default: all)")
	f.StringVar(&command, "command", "", "name of the program (default: all)")
	f.StringVar(&r.Errno, "errno", "", "answer with this error, as EIO or ENOSPC")
	f.DurationVar(&r.Latency, "latency", 0, "wait so long first")
	f.Int64Var(&r.Short, "short", 0, "read or write no more than so many bytes")
	f.Float64Var(&r.Prob, "prob", 0, "probability, 0 to 1 (default 1)")
	f.Uint64Var(&r.Nth, "nth", 0, "only the Nth operation that matches")
	f.Uint64Var(&r.From, "from", 0, "only the Nth operation that matches and all after it: a disk that is full stays full")
	f.DurationVar(&r.For, "for", inject.Default, "how long the rule lasts")
	f.StringVar(&file, "file", "", "read rules from this file")
	f.BoolVar(&list, "list", false, "list the rules")
	f.StringSliceVar(&clearIDs, "clear", nil, "remove rules by their numbers, or all")
	return cmd
}

// notCleared tells of rules that were to be removed and that there are not.
func notCleared(asked []int, cleared []inject.Rule) error {
	var missing []string
	for _, id := range asked {
		if !slices.ContainsFunc(cleared, func(r inject.Rule) bool { return r.ID == id }) {
			missing = append(missing, strconv.Itoa(id))
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("no rule %s: it has ended, or never was: %w", strings.Join(missing, ", "), layers.ErrNotFound)
}

// parseClear reads numbers of rules, or all.
func parseClear(ids []string) (all bool, list []int, err error) {
	for _, id := range ids {
		if id == "all" {
			all = true
			continue
		}
		n, err := strconv.Atoi(id)
		if err != nil || n < 1 {
			return false, nil, usagef("--clear %q: expected the number of a rule, see --list, or all", id)
		}
		list = append(list, n)
	}
	if all && len(list) > 0 {
		return false, nil, usagef("--clear: all, or numbers")
	}
	return all, list, nil
}

// readRules reads rules in JSON: one after the other, or lists of them.
func readRules(path string) (rules []inject.Rule, err error) {
	in := io.Reader(os.Stdin)
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("rules: %w", err)
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxRules+1))
	if err != nil || len(b) > maxRules {
		return nil, fmt.Errorf("rules in %q: more than %d bytes, or not readable: %w", path, maxRules, err)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	for {
		var raw json.RawMessage
		if err := dec.Decode(&raw); err == io.EOF {
			break
		} else if err != nil {
			return nil, usagef("rules in %q: %v", path, err)
		}
		one := json.NewDecoder(bytes.NewReader(raw))
		one.DisallowUnknownFields()
		if bytes.HasPrefix(bytes.TrimSpace(raw), []byte("[")) {
			var some []inject.Rule
			if err := one.Decode(&some); err != nil {
				return nil, usagef("rules in %q: %v", path, err)
			}
			rules = append(rules, some...)
			continue
		}
		var r inject.Rule
		if err := one.Decode(&r); err != nil {
			return nil, usagef("rules in %q: %v", path, err)
		}
		rules = append(rules, r)
	}
	if len(rules) == 0 {
		return nil, usagef("no rules in %q", path)
	}
	for i, r := range rules {
		if err := r.Validate(counters.OpNames()); err != nil {
			return nil, usagef("rules in %q: rule %d: %v", path, i+1, err)
		}
	}
	return rules, nil
}

// printRules prints what was added or cleared, or all rules.
func (a *app) printRules(ans holder.Answer, added, cleared bool) error {
	rules := ans.Rules
	switch {
	case added:
		rules = ans.Added
	case cleared:
		rules = ans.Cleared
	}
	if a.json {
		return printJSON(list(rules))
	}
	if cleared {
		fmt.Printf("%d cleared\n", len(rules))
		return nil
	}
	t := newTable(os.Stdout, "ID", "OPERATIONS", "PATH", "FAULT", "WHEN", "MATCHED", "HIT", "ENDS")
	for _, r := range rules {
		path := "any"
		if r.Path != "" {
			path = quoted(string(r.Path))
		}
		t.row(fmt.Sprint(r.ID), strings.Join(r.Ops, ","), path, faultText(r), whenText(r), fmt.Sprint(r.Matched), fmt.Sprint(r.Hit), "in "+time.Until(r.Expires).Round(time.Second).String())
	}
	if err := t.flush(); err != nil {
		return err
	}
	if added {
		for _, r := range rules {
			if r.Data() {
				tell("reads and writes of files that are open already meet no faults: the rule acts from the next open on")
				break
			}
		}
		if ans.Unseen {
			tell("warning: this mount opens files without asking (io=noopen): reads that the page cache answers meet no faults; mount it with --io cache")
		}
	}
	return nil
}

func faultText(r inject.Rule) string {
	var out []string
	if r.Latency > 0 {
		out = append(out, "wait "+r.Latency.String())
	}
	if r.Errno != "" {
		out = append(out, strings.ToUpper(r.Errno))
	}
	if r.Short > 0 {
		out = append(out, fmt.Sprintf("%d bytes at most", r.Short))
	}
	return strings.Join(out, ", ")
}

func whenText(r inject.Rule) string {
	var out []string
	if r.Pid != 0 {
		out = append(out, fmt.Sprintf("process %d", r.Pid))
	}
	if r.Command != "" {
		out = append(out, printable(string(r.Command)))
	}
	if r.Nth > 0 {
		out = append(out, fmt.Sprintf("match %d", r.Nth))
	}
	if r.From > 0 {
		out = append(out, fmt.Sprintf("from match %d on", r.From))
	}
	if r.Prob > 0 {
		out = append(out, fmt.Sprintf("%g %%", 100*r.Prob))
	}
	if len(out) == 0 {
		return "always"
	}
	return strings.Join(out, ", ")
}
