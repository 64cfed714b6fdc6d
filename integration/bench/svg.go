package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// The plot shows the speed of each phase relative to the reference as
// horizontal bars from 1, on a logarithmic scale: bars to the right are faster,
// to the left slower. Colours are readable on light and on dark ground.

// bar is one value of a group.
type bar struct {
	series int
	value  float64 // > 0
}

// group is a phase: a label and its bars.
type group struct {
	label string
	bars  []bar
	goal  float64 // the line that is to be reached by the first series; 0: none
}

// plot is what gets drawn. Groups without bars are headings.
type plot struct {
	title  string
	series []string
	groups []group
}

const (
	plotWidth  = 900
	labelWidth = 300
	barHeight  = 7
	groupGap   = 7
	headHeight = 24
	plotMargin = 16
)

// Text and lines are grey, so that both grounds do.
const (
	ink  = "#808080"
	rule = "#8080804d"
)

var palette = []string{"#1f77b4", "#17a2a2", "#6f9bd8", "#d9822b", "#8a8a8a"}

// scale maps values to x, between the powers of two or ten that enclose them.
type scale struct{ low, high float64 }

func (p *plot) scale() scale {
	s := scale{0.5, 2}
	for _, g := range p.groups {
		for _, b := range g.bars {
			s.low, s.high = min(s.low, b.value), max(s.high, b.value)
		}
	}
	s.low = max(0.01, s.low)
	s.high = min(50, s.high)
	return s
}

func (s scale) x(v float64) float64 {
	v = min(max(v, s.low), s.high)
	at := (math.Log(v) - math.Log(s.low)) / (math.Log(s.high) - math.Log(s.low))
	return labelWidth + at*(plotWidth-labelWidth-plotMargin-40)
}

var ticks = []float64{0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50}

// svg draws the plot.
func (p *plot) svg() string {
	s := p.scale()
	top := 64.0
	var b strings.Builder
	y := top
	for _, g := range p.groups {
		y = p.drawGroup(&b, g, s, y)
	}
	bottom := y
	var frame strings.Builder
	text(&frame, plotMargin, 22, "start", 15, p.title)
	x := float64(plotMargin)
	for i, name := range p.series {
		fmt.Fprintf(&frame, `<rect x="%.0f" y="34" width="10" height="10" fill="%s"/>`+"\n", x, colour(i))
		text(&frame, x+14, 43, "start", 12, name)
		x += 34 + 7*float64(len(name))
	}
	for _, t := range ticks {
		if t < s.low || t > s.high {
			continue
		}
		width := 1.0
		if t == 1 {
			width = 2
		}
		fmt.Fprintf(&frame, `<line x1="%.1f" y1="%.0f" x2="%.1f" y2="%.0f" stroke="%s" stroke-width="%.0f"/>`+"\n", s.x(t), top, s.x(t), bottom, rule, width)
		text(&frame, s.x(t), top-6, "middle", 11, fmt.Sprintf("%g×", t))
	}
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %.0f" width="%d" height="%.0f" font-family="sans-serif" role="img">`+"\n<title>%s</title>\n",
		plotWidth, bottom+plotMargin, plotWidth, bottom+plotMargin, html.EscapeString(p.title)) + frame.String() + b.String() + "</svg>\n"
}

// drawGroup draws at y and returns where the next one goes.
func (p *plot) drawGroup(b *strings.Builder, g group, s scale, y float64) float64 {
	if len(g.bars) == 0 {
		text(b, plotMargin, y+headHeight-8, "start", 12, g.label)
		return y + headHeight
	}
	height := float64(len(g.bars) * barHeight)
	text(b, labelWidth-8, y+height/2+4, "end", 11, g.label)
	for i, r := range g.bars {
		from, to := s.x(1), s.x(r.value)
		at := y + float64(i*barHeight)
		fmt.Fprintf(b, `<rect x="%.1f" y="%.1f" width="%.1f" height="%d" fill="%s"><title>%s: %s</title></rect>`+"\n",
			min(from, to), at, max(math.Abs(to-from), 1), barHeight-1, colour(r.series), html.EscapeString(p.series[r.series]), ratio(r.value))
		if r.value > s.high || r.value < s.low {
			text(b, to+4, at+barHeight-1, "start", 8, ratio(r.value))
		}
	}
	if g.goal > 0 {
		x := s.x(g.goal)
		fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="#c0392b" stroke-width="2"><title>goal: %s</title></line>`+"\n", x, y-2, x, y+barHeight+1, ratio(g.goal))
	}
	return y + height + groupGap
}

func colour(series int) string { return palette[series%len(palette)] }

func text(b *strings.Builder, x, y float64, anchor string, size int, s string) {
	fmt.Fprintf(b, `<text x="%.1f" y="%.1f" text-anchor="%s" font-size="%d" fill="%s">%s</text>`+"\n", x, y, anchor, size, ink, html.EscapeString(s))
}

// plotted are the systems that the plot shows.
var plotted = []string{"plyfs", "plyfs-noopen", "plyfs-ro", "fuse-overlayfs", "native"}

// plotOf arranges the timed phases of a place.
func (r *results) plotOf(place string, tables []table) *plot {
	p := &plot{title: "Speed relative to kernel overlayfs, on " + place + " (red: goal of plyfs C)"}
	for _, name := range plotted {
		s, _ := systemNamed(name)
		p.series = append(p.series, s.Column)
	}
	for _, t := range tables {
		var groups []group
		for _, sc := range t.scenes {
			for _, st := range sc.steps {
				for _, ph := range st.phases {
					if ph.Unit.timed() && ph.ref() == "kernel" {
						if g := r.groupOf(place, ph); len(g.bars) > 0 {
							groups = append(groups, g)
						}
					}
				}
			}
		}
		if len(groups) > 0 {
			p.groups = append(append(p.groups, group{label: t.Title}), groups...)
		}
	}
	return p
}

func (r *results) groupOf(place string, ph phase) group {
	g := group{label: ph.Title}
	for i, name := range plotted {
		if m := r.find(place, ph.Name, name); m != nil {
			if v := r.ratio(m, ph.ref()); v > 0 {
				g.bars = append(g.bars, bar{i, v})
			}
		}
	}
	for _, goal := range ph.goalsOn(place) {
		if goal.Column == "C" {
			g.goal = goal.Least
		}
	}
	return g
}
