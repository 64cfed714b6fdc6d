package mountd

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs"
	"github.com/plyfs/plyfs/unionfs/explain"
	"github.com/plyfs/plyfs/unionfs/trace"
)

// maxTree bounds the lines of one answer.
const maxTree = 100_000

// ExplainRequest asks about a path in an image or a container, or in a mount.
type ExplainRequest struct {
	// Name is of an image or a container.
	Name string `json:"name,omitempty"`
	// Target, Major and Minor are those of a mount of the store.
	Target Path `json:"target,omitempty"`
	Major  int  `json:"major,omitempty"`
	Minor  int  `json:"minor,omitempty"`
	// Path is one in it.
	Path Path `json:"path"`
	// Tree asks for the names below the directory Path: to a depth, and at most so many.
	Tree  bool `json:"tree,omitempty"`
	Depth int  `json:"depth,omitempty"` // 0: any
	Limit int  `json:"limit,omitempty"` // 0: as many as one answer may have
}

// Explanation is the answer.
type Explanation struct {
	Container string        `json:"container,omitempty"` // its name
	ImageID   digest.Digest `json:"imageID,omitempty"`
	ImageName string        `json:"imageName,omitempty"`
	// Target is the mount point, if a mount was asked for.
	Target   Path `json:"target,omitempty"`
	ReadOnly bool `json:"readOnly,omitempty"`
	// Copied says who has copied the object up first, if the container's history knows it.
	Copied *trace.Copied `json:"copied,omitempty"`
	// Live is what the mount itself shows, as far as whoever asks has looked.
	Live *LiveObject `json:"live,omitempty"`
	// Report explains one path; with Tree, Lines are what is below, and Layers the stack.
	Report *explain.Report     `json:"report,omitempty"`
	Layers []explain.LayerInfo `json:"layers,omitempty"`
	Lines  []explain.Line      `json:"lines,omitempty"`
	More   bool                `json:"more,omitempty"` // there are more lines
}

// Explain implements Service.
func (l *Local) Explain(ctx context.Context, r ExplainRequest) (Explanation, error) {
	x, sub, err := l.explained(ctx, r)
	if err != nil {
		return x, err
	}
	spec, err := l.specOf(MountRequest{}, "", sub)
	if err != nil {
		return x, err
	}
	x, err = explainSpec(ctx, x, spec, l.labels(ctx, sub), r)
	if err == nil && x.Report != nil && x.Report.Layer != nil && x.Report.Layers[*x.Report.Layer].Name == "upper" {
		x.Copied = copiedBy(sub.stack.History, string(x.Report.Path))
	}
	return x, err
}

// copiedBy returns what the history of a container says of a path; nil: nothing.
func copiedBy(history, path string) *trace.Copied {
	if history == "" {
		return nil
	}
	f, err := os.OpenFile(history, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil // it was never mounted, or by an older version
	}
	defer f.Close()
	if c, ok := trace.FindCopied(f, path); ok {
		return &c
	}
	return nil
}

// explained finds what is asked about.
func (l *Local) explained(ctx context.Context, r ExplainRequest) (x Explanation, sub subject, err error) {
	if r.Name != "" {
		c, cerr := l.store.Container(ctx, r.Name)
		if cerr == nil {
			return l.explainedContainer(ctx, x, c.ID, false)
		}
		img, err := l.store.ResolveImage(ctx, r.Name)
		if err != nil {
			return x, sub, notFoundEither(r.Name, cerr, err)
		}
		return l.explainedImage(ctx, x, img.ID)
	}
	alive, err := l.liveMounts(ctx)
	if err != nil {
		return x, sub, err
	}
	for _, a := range alive {
		here := a.row.Target == string(r.Target)
		if r.Minor != 0 && a.holder.Minor != 0 {
			here = a.holder.Major == r.Major && a.holder.Minor == r.Minor
		}
		if !here {
			continue
		}
		x.Target = r.Target
		if a.row.ContainerID != "" {
			return l.explainedContainer(ctx, x, a.row.ContainerID, a.row.ReadOnly)
		}
		return l.explainedImage(ctx, x, a.row.ImageID)
	}
	return x, sub, markedf(layers.ErrNotFound, "the mount on %q is none of the store %q", string(r.Target), l.store.Root())
}

func (l *Local) explainedContainer(ctx context.Context, x Explanation, id string, readOnly bool) (Explanation, subject, error) {
	c, err := l.store.Container(ctx, id)
	if err != nil {
		return x, subject{}, err
	}
	x.Container, x.ImageID, x.ImageName, x.ReadOnly = c.Name, c.ImageID, c.ImageName, readOnly
	sub, err := l.containerSubject(ctx, c, readOnly, nil)
	return x, sub, err
}

func (l *Local) explainedImage(ctx context.Context, x Explanation, id digest.Digest) (Explanation, subject, error) {
	x.ImageID, x.ReadOnly = id, true
	x.ImageName = l.imageStatus(ctx, id).ImageName
	st, err := l.store.ImageStack(ctx, id.String())
	return x, subject{image: layers.Image{ID: id}, stack: st}, err
}

// labels names the lowers of a stack as people know them, with what has made them.
func (l *Local) labels(ctx context.Context, sub subject) []explain.Label {
	image := sub.image.ID
	if sub.container != nil {
		image = sub.container.ImageID
	}
	var steps []layers.HistoryEntry // of those that have made layers, the newest first
	if h, err := l.store.History(ctx, image.String()); err == nil {
		steps = slices.DeleteFunc(h, func(e layers.HistoryEntry) bool { return e.DiffID == "" })
	}
	lowers := sub.stack.Lowers
	labels := make([]explain.Label, len(lowers))
	seen := 0
	for i, name := range layerNames(lowers) {
		d := lowers[i]
		labels[i].Name = name
		switch {
		case isUpper(d): // of a container that is mounted read-only
			labels[i].CreatedBy = "what the container has written"
		case d.DiffID == "":
			labels[i].CreatedBy = "mount points that every container has"
		default:
			labels[i].DiffID = d.DiffID.String()
			// A commit may have been made of an image whose history says less.
			if seen < len(steps) && steps[seen].DiffID == d.DiffID {
				labels[i].CreatedBy = step(steps[seen])
			}
			seen++
		}
	}
	return labels
}

// layerNames are what people call the lowers of a stack: those of the image are counted from
// the bottom, as `plyfs layers` does.
func layerNames(lowers []layers.LayerDir) []string {
	total := 0
	for _, d := range lowers {
		if d.DiffID != "" {
			total++
		}
	}
	names := make([]string, len(lowers))
	seen := 0
	for i, d := range lowers {
		switch {
		case isUpper(d):
			names[i] = "upper"
		case d.DiffID == "":
			names[i] = "init layer"
		default:
			names[i] = fmt.Sprintf("layer %d of %d", total-seen, total)
			seen++
		}
	}
	return names
}

// step says what has made a layer. The comment of others is the name of a tool.
func step(e layers.HistoryEntry) string {
	switch {
	case e.CreatedBy == "":
		return e.Comment
	case e.Comment != "" && strings.HasPrefix(e.CreatedBy, "plyfs "):
		return e.CreatedBy + ": " + e.Comment
	}
	return e.CreatedBy
}

// rawLabels names the lowers of a stack of directories.
func rawLabels(lowers []unionfs.Layer) []explain.Label {
	labels := make([]explain.Label, len(lowers))
	for i := range lowers {
		labels[i].Name = fmt.Sprintf("lower %d of %d", i+1, len(lowers))
	}
	return labels
}

// explainSpec explains a path of a union.
func explainSpec(ctx context.Context, x Explanation, spec holder.Spec, labels []explain.Label, r ExplainRequest) (Explanation, error) {
	o := explain.Options{
		Work: spec.Work, Redirect: spec.Redirect, Metacopy: spec.Metacopy, NoIndex: spec.NoIndex, Owners: spec.Owners,
	}
	if spec.Upper.Path != "" {
		o.Upper = &explain.Layer{Layer: spec.Upper, Label: explain.Label{Name: "upper"}}
	}
	for i, lower := range spec.Lowers {
		o.Lowers = append(o.Lowers, explain.Layer{Layer: lower, Label: labels[i]})
	}
	s, err := explain.Open(o)
	if err != nil {
		return x, err
	}
	defer s.Close()
	if !r.Tree {
		x.Report, err = s.Explain(string(r.Path))
		return x, err
	}
	x.Layers, x.Lines = s.Layers(), []explain.Line{}
	limit := r.Limit
	if limit <= 0 || limit > maxTree {
		limit = maxTree
	}
	x.More, err = s.Tree(ctx, string(r.Path), explain.TreeOptions{Depth: r.Depth, Limit: limit}, func(line explain.Line) error {
		x.Lines = append(x.Lines, line)
		return nil
	})
	return x, err
}
