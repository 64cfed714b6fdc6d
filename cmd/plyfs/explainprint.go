package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/plyfs/plyfs/mountd"
	"github.com/plyfs/plyfs/unionfs/explain"
)

// roleMarks stand before each entry.
var roleMarks = map[string]string{
	explain.RoleServes: "→", explain.RoleMerged: "+", explain.RoleData: "=", explain.RoleDeletes: "x", explain.RoleHidden: " ",
}

var roleWords = map[string]string{
	explain.RoleServes: "serves it", explain.RoleMerged: "is merged into it", explain.RoleData: "has its data",
	explain.RoleDeletes: "deletes it", explain.RoleHidden: "is hidden",
}

// printExplanation prints the answer first, then what each layer has.
func printExplanation(x mountd.Explanation) error {
	if x.Report == nil {
		return printTree(x)
	}
	r := x.Report
	fmt.Println(printable(r.Answer))
	printContradiction(x)
	for _, l := range r.Links {
		fmt.Printf("  on the way: %s is a symbolic link to %s, from %s%s\n", quoted(string(l.At)), quoted(string(l.Target)),
			printable(r.Layers[l.Layer].Name), hides(l.Hides))
	}
	width, nothing := 0, len(r.Layers)
	for i, e := range r.Entries {
		width = max(width, len([]rune(r.Layers[e.Layer].Name)))
		if i == 0 || r.Entries[i-1].Layer != e.Layer {
			nothing--
		}
	}
	if len(r.Entries) > 0 {
		fmt.Println()
	}
	for _, e := range r.Entries {
		l := r.Layers[e.Layer]
		fmt.Printf("%s %-*s  %s\n", roleMarks[e.Role], width, printable(l.Name), printable(entryText(e)))
		for _, line := range entryLines(r, e, l) {
			fmt.Printf("  %-*s  %s\n", width, "", printable(line))
		}
	}
	if len(r.Entries) > 0 && nothing > 0 {
		fmt.Printf("\n%s nothing there.\n", countOf(nothing, "other layer has", "other layers have"))
	}
	printCopied(x)
	printLive(x)
	return nil
}

// printCopied says who has copied the object up.
func printCopied(x mountd.Explanation) {
	c := x.Copied
	if c == nil {
		return
	}
	with := ""
	if c.Path != string(x.Report.Path) {
		with = " for " + quoted(c.Path)
	}
	fmt.Printf("\nCopied up%s at %s by %s (process %d, user %d): %s\n", with, c.Time.Local().Format(time.DateTime), printable(c.Command), c.Pid, c.UID,
		printable(strings.TrimSpace(c.Op+" "+c.Detail)))
}

// entryText is the first line of an entry: what it is, and what becomes of it.
func entryText(e explain.Entry) string {
	what := "whiteout (" + e.Whiteout + ")"
	if e.Attr != nil {
		what = attrText(e.Attr)
	}
	return what + ": " + roleWords[e.Role]
}

// attrText describes an object in a few words.
func attrText(a *explain.Attr) string {
	s := fmt.Sprintf("%s %s %d:%d", a.Kind, a.Mode, a.UID, a.GID)
	switch {
	case a.Target != "":
		s = fmt.Sprintf("%s to %s, %d:%d", a.Kind, quoted(string(a.Target)), a.UID, a.GID)
	case a.Kind == "file":
		s += fmt.Sprintf(", %s", size(a.Size))
	case a.Rdev != "":
		s += " " + a.Rdev
	}
	return s + ", " + a.MTime.Format(time.DateTime)
}

// entryLines are the further lines of an entry.
func entryLines(r *explain.Report, e explain.Entry, l explain.LayerInfo) (lines []string) {
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	if e.Role == explain.RoleHidden && e.Why != "" {
		add("because %s [%s]", e.Why, e.Rule)
	}
	if e.Problem != "" {
		add("problem: %s", e.Problem)
	}
	if e.Attr != nil && e.Whiteout != "" {
		add("and a whiteout (%s), which hides the name in all layers below", e.Whiteout)
	}
	if e.Opaque != "" {
		add("opaque (%s): hides all that layers below have in it", e.Opaque)
	}
	switch {
	case e.Metacopy && e.Redirect != "":
		add("attributes only: the data is that of %s in the layers below (metacopy)", quoted(string(e.Redirect)))
	case e.Metacopy:
		add("attributes only: the data is that of the layers below (metacopy)")
	case e.Redirect != "":
		add("renamed: what layers below have in it comes from %s (redirect)", quoted(string(e.Redirect)))
	}
	if o := e.Origin; o != nil && o.Layer != nil {
		add("copied up from %s of %s", quoted(string(o.In)), r.Layers[*o.Layer].Name)
	} else if o != nil {
		add("copied up from an object that is in no layer any more, or cannot be found without privileges")
	}
	if l.CreatedBy != "" || l.DiffID != "" {
		by := shorten(explain.Step(l.CreatedBy), 80)
		if l.DiffID != "" {
			by = strings.TrimSpace(by + "  (" + shortDiffID(l.DiffID) + ")")
		}
		add("%s", by)
	}
	place := fmt.Sprintf("inode %d on %s", e.Ino, e.Dev)
	if e.Links > 1 && e.Attr != nil && e.Attr.Kind != "directory" {
		place += fmt.Sprintf(", %d hard links", e.Links)
	}
	if l.DiffID == "" {
		place = quoted(string(l.Dir)+string(e.In)) + ", " + place
		if strings.HasPrefix(string(e.In), "(") {
			place = quoted(string(e.In)) + ", inode " + fmt.Sprint(e.Ino)
		}
	} else if string(e.In) != string(r.Path) {
		place = "there " + quoted(string(e.In)) + ", " + place
	}
	add("%s", place)
	for _, x := range e.Private {
		add("private: %s=%s", x.Name, quoted(shorten(string(x.Value), 60)))
	}
	return lines
}

// shortDiffID keeps the algorithm, so that nobody takes it for an image.
func shortDiffID(id string) string {
	alg, _, ok := strings.Cut(id, ":")
	if !ok {
		return shortID(id)
	}
	return alg + ":" + shortID(id)
}

// printLive says what the mount itself shows, and whether that is another thing.
func printLive(x mountd.Explanation) {
	o := x.Live
	if o == nil {
		return
	}
	where := ""
	if x.Container != "" {
		where = " (container " + x.Container + ")"
	}
	fmt.Printf("\nThe mount on %s%s shows ", quoted(string(x.Target)), printable(where))
	if o.Errno != "" {
		fmt.Printf("nothing: %s.\n", o.Errno)
	} else {
		fmt.Printf("a %s, inode %d on %s", o.Kind, o.Ino, o.Dev)
		if o.Kind != "directory" {
			fmt.Printf(", %s", countOf(int(o.Links), "link", "links"))
		}
		fmt.Println(".")
	}
}

// printContradiction says that the mount shows something else than its layers, if it does:
// mostly somebody has changed a layer, and wonders why nothing of it is to be seen.
func printContradiction(x mountd.Explanation) {
	o, r := x.Live, x.Report
	if o == nil || (o.Errno == "") == r.Exists && (!r.Exists || r.Attr.Kind == o.Kind && (o.Kind != "file" || int64(o.Size) == r.Attr.Size)) {
		return
	}
	fmt.Println("But that is not what the mount shows (see below). Either it changes at this moment, or a lower layer was changed\n" +
		"while it is mounted: what a mount has seen of its lower layers it keeps. Unmount it and mount it again to see the change.")
}

func hides(n int) string {
	if n == 0 {
		return ""
	}
	return ", which hides " + countOf(n, "entry", "entries") + " below"
}

func countOf(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// treeRule says why a name is not there, though there is something of the name.
func treeRule(l explain.Line) string {
	switch l.Rule {
	case "parent-" + explain.RuleOpaque:
		return "not there: the directory is opaque"
	case "parent-" + explain.RuleRedirected:
		return "not there: the directory was renamed"
	case explain.RuleRefused, explain.RuleDataMissing, explain.RuleOwnDirectory:
		return "error " + l.Errno + ": " + l.Rule
	}
	return "not there: " + l.Rule
}

// printTree prints a line for each name.
func printTree(x mountd.Explanation) error {
	t := newTable(os.Stdout, "  PATH", "LAYER", "NOTES")
	for _, l := range x.Lines {
		mark := " "
		layer := ""
		if l.Layer != nil {
			layer = x.Layers[*l.Layer].Name
		}
		path := quoted(string(l.At))
		var notes []string
		switch {
		case l.Exists:
			if l.Attr.Kind == "directory" {
				path += "/"
			} else if l.Attr.Kind != "file" {
				notes = append(notes, l.Attr.Kind)
			}
			if len(l.Merged) > 0 {
				layer += fmt.Sprintf(" + %d", len(l.Merged))
			}
			if l.Data != nil {
				notes = append(notes, "data from "+x.Layers[*l.Data].Name)
			}
			if l.Opaque {
				notes = append(notes, "opaque")
			}
		case l.Rule == explain.RuleWhiteout:
			mark = roleMarks[explain.RoleDeletes]
			notes = append(notes, "deleted")
		default:
			mark = "-"
			notes = append(notes, treeRule(l))
		}
		if l.Hidden > 0 {
			notes = append(notes, fmt.Sprintf("%d hidden", l.Hidden))
		}
		t.row(mark+" "+path, layer, strings.Join(notes, ", "))
	}
	if err := t.flush(); err != nil {
		return err
	}
	if x.More {
		fmt.Println("… and more: --limit N for more lines, --depth N for fewer levels")
	}
	return nil
}
