package main

import (
	"bufio"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/unionfs/explain"
)

// printAnalysis is the overview of an image.
func printAnalysis(a *layers.Analysis, full bool) error {
	t := newTable(os.Stdout, "LAYER", "DIFF ID", "SIZE", "ADDED", "CHANGED", "DELETED", "WASTED", "CREATED BY")
	for _, h := range a.History {
		by := stepText(h.CreatedBy, h.Comment, full)
		if h.Layer == 0 {
			t.row("-", "-", "-", "-", "-", "-", "-", by)
			continue
		}
		l := a.Layers[h.Layer-1]
		t.row(fmt.Sprint(l.Number), idText(l.DiffID, full), size(l.Size), countText(l.Added), countText(l.Changed), countText(l.Deleted), sizeOrNone(l.Wasted), by)
	}
	if err := t.flush(); err != nil {
		return err
	}
	w := bufio.NewWriter(os.Stdout)
	fmt.Fprintf(w, "\nSize:    %s in %s; %s of it shows in the image, as %s in %s.\n", size(a.Size), plural(len(a.Layers), "layer", "layers"),
		size(a.Visible), plural(a.Files, "file", "files"), plural(a.Directories, "directory", "directories"))
	wasted := "nothing"
	if a.Wasted > 0 {
		wasted = fmt.Sprintf("%s in %s: layers above delete %s of it and replace %s", size(a.Wasted), plural(a.WastedFiles, "file", "files"), size(a.Deleted), size(a.Wasted-a.Deleted))
	}
	fmt.Fprintf(w, "Wasted:  %s. Efficiency %s.\n", wasted, efficiencyText(a.Efficiency))
	if last, shared := sharedLayers(a); last > 0 {
		where := "layer 1"
		if last > 1 {
			where = fmt.Sprintf("layers 1 to %d", last)
		}
		fmt.Fprintf(w, "Shared:  %s in %s, which other images of this store have, too.\n", size(shared), where)
	}
	for _, part := range []struct {
		title string
		n     int
		print func(*bufio.Writer, *layers.Analysis)
	}{
		{"Largest directories", len(a.LargestDirectories), printLargestDirectories},
		{"Largest files", len(a.Largest), printLargest},
		{"Wasted most, directories", len(a.WastedDirectories), func(w *bufio.Writer, a *layers.Analysis) { printDirectories(w, a.WastedDirectories) }},
		{"Wasted most, files", len(a.WastedPaths), func(w *bufio.Writer, a *layers.Analysis) { printWasted(w, a, false) }},
	} {
		if part.n > 0 {
			fmt.Fprintf(w, "\n%s:\n", part.title)
			part.print(w, a)
		}
	}
	if len(a.Layers) > 0 {
		fmt.Fprintf(w, "\nMore with --files, --largest N, --wasted and --duplicates; see plyfs layers --help.\n")
	}
	return w.Flush()
}

// stepText is a step as its Dockerfile has it, without what all steps begin with. The comment of
// plyfs commit says more than the name of the container.
func stepText(by, comment string, full bool) string {
	if comment != "" && strings.HasPrefix(by, "plyfs ") {
		by += ": " + comment
	}
	return createdBy(layers.HistoryEntry{CreatedBy: explain.Step(by)}, full)
}

// printAnalysisLists are the lists that were asked for, with titles if they are several.
func printAnalysisLists(a *layers.Analysis, o layersOptions) error {
	w := bufio.NewWriter(os.Stdout)
	lists := []struct {
		wanted bool
		title  string
		print  func(*bufio.Writer, *layers.Analysis)
	}{
		{o.files, "Files of layers", printLayerFiles(o)},
		{o.largest > 0, "Largest directories", printLargestDirectories},
		{o.largest > 0, "Largest files", printLargest},
		{o.wasted, "Wasted", func(w *bufio.Writer, a *layers.Analysis) { printWasted(w, a, true); printWastedTotal(w, a) }},
		{o.duplicates, "Duplicates", printDuplicates},
	}
	titles := 0
	for _, l := range lists {
		if l.wanted {
			titles++
		}
	}
	first := true
	for _, l := range lists {
		if !l.wanted {
			continue
		}
		if !first {
			fmt.Fprintln(w)
		}
		if titles > 1 {
			fmt.Fprintf(w, "%s:\n", l.title)
		}
		l.print(w, a)
		first = false
	}
	return w.Flush()
}

// sizeColumn aligns sizes in lists.
const sizeColumn = len("1.23kB") + 2

func printLargest(w *bufio.Writer, a *layers.Analysis) {
	for _, f := range a.Largest {
		fmt.Fprintf(w, "%*s  layer %-3d %s\n", sizeColumn, size(f.Size), f.Layer, quoted(string(f.Path)))
	}
}

func printLargestDirectories(w *bufio.Writer, a *layers.Analysis) {
	printDirectories(w, a.LargestDirectories)
}

func printDirectories(w *bufio.Writer, list []layers.LargeDirectory) {
	for _, d := range list {
		fmt.Fprintf(w, "%*s  %s in %s\n", sizeColumn, size(d.Size), plural(d.Files, "file", "files"), quoted(string(d.Path)))
	}
}

// printWasted says also in what a file differs from the one that replaced it, if they were
// compared.
func printWasted(w *bufio.Writer, a *layers.Analysis, compared bool) {
	for _, p := range a.WastedPaths {
		var all []string
		for _, v := range p.Versions {
			all = append(all, wastedText(v, len(p.Versions) > 1, compared))
		}
		fmt.Fprintf(w, "%*s  %s  (%s)\n", sizeColumn, size(p.Wasted), quoted(string(p.Path)), strings.Join(all, "; "))
	}
}

func wastedText(v layers.WastedFile, several, compared bool) string {
	of := ""
	if several {
		of = size(v.Size) + " "
	}
	how := "deleted"
	if v.Kind == "C" {
		how = "replaced"
	}
	text := fmt.Sprintf("%sin layer %d, %s by layer %d", of, v.Layer, how, v.By)
	switch {
	case !compared || v.Kind == "D":
	case sameContentAgain(v) && len(v.Why) == 0:
		text += ": same content, nothing new"
	case sameContentAgain(v):
		text += ": same content, other " + strings.Join(v.Why, ", ")
	default:
		text += ": other " + strings.Join(v.Why, ", ")
	}
	return text
}

// sameContentAgain: what has replaced the file has the same content. Precondition: the
// two were compared.
func sameContentAgain(v layers.WastedFile) bool {
	return v.Kind == "C" && !slices.Contains(v.Why, layers.WhyContent) && !slices.Contains(v.Why, layers.WhyType)
}

func printWastedTotal(w *bufio.Writer, a *layers.Analysis) {
	var again, replaced, deleted int64
	for _, p := range a.WastedPaths {
		for _, v := range p.Versions {
			switch {
			case v.Kind == "D":
				deleted += v.Size
			case sameContentAgain(v):
				again += v.Size
			default:
				replaced += v.Size
			}
		}
	}
	fmt.Fprintf(w, "%s wasted: %s deleted, %s replaced by something else, %s replaced by the same content.\n", size(a.Wasted), size(deleted), size(replaced), size(again))
}

func printDuplicates(w *bufio.Writer, a *layers.Analysis) {
	var shows int64
	for _, d := range a.Duplicates {
		fmt.Fprintf(w, "%*s  extra: %d files of %s, content %s\n", sizeColumn, size(d.Extra), len(d.Files), size(d.Size), idText(d.Digest, false))
		visible := 0
		for _, f := range d.Files {
			hidden := ""
			if !f.Visible {
				hidden = "  (not visible)"
			} else if visible++; visible > 1 {
				shows += d.Size
			}
			fmt.Fprintf(w, "%*s  layer %-3d %s%s\n", sizeColumn, "", f.Layer, quoted(string(f.Path)), hidden)
		}
	}
	fmt.Fprintf(w, "%s extra: %s of it shows in the image, the rest is wasted.\n", size(a.Duplicated), size(shows))
}

func printLayerFiles(o layersOptions) func(*bufio.Writer, *layers.Analysis) {
	return func(w *bufio.Writer, a *layers.Analysis) {
		for _, l := range a.Layers {
			if o.layer != 0 && o.layer != l.Number {
				continue
			}
			fmt.Fprintf(w, "Layer %d, %s, %s: %s\n", l.Number, idText(l.DiffID, o.full), size(l.Size), printable(stepText(l.CreatedBy, l.Comment, o.full)))
			for _, f := range l.Files {
				printLayerFile(w, f)
			}
		}
	}
}

func printLayerFile(w *bufio.Writer, f layers.LayerChange) {
	bytes := "-"
	switch {
	case f.Kind == "D" && f.Type == layers.TypeFile:
		bytes = size(f.OldSize)
	case f.Type == layers.TypeFile:
		bytes = size(f.Size)
	}
	name := quoted(string(f.Path))
	if f.Type == layers.TypeDirectory && !strings.HasSuffix(name, `"`) && name != "/" {
		name += "/"
	}
	fmt.Fprintf(w, "%s %*s  %s", f.Kind, sizeColumn, bytes, name)
	if f.LinkTo != "" {
		fmt.Fprintf(w, " = %s", quoted(string(f.LinkTo)))
	}
	if f.Kind == "C" {
		why := "nothing new"
		if len(f.Why) > 0 {
			why = strings.Join(f.Why, ", ")
		}
		fmt.Fprintf(w, "  (%s)", why)
	}
	_, _ = w.WriteString("\n") // Flush tells
}

// sharedLayers is the topmost layer that another image has, too, and the bytes up to it.
func sharedLayers(a *layers.Analysis) (last int, bytes int64) {
	var sum int64
	for _, l := range a.Layers {
		if sum += l.Size; l.Images > 1 {
			last, bytes = l.Number, sum
		}
	}
	return last, bytes
}

func sizeOrNone(n int64) string {
	if n == 0 {
		return "-"
	}
	return size(n)
}

// efficiencyText rounds down: what is not all is never 100%.
func efficiencyText(f float64) string { return fmt.Sprintf("%.1f%%", math.Floor(f*1000+1e-6)/10) }
