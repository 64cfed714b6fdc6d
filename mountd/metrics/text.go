package metrics

import (
	"bufio"
	"io"
	"math"
	"strconv"
	"strings"
)

// ContentType is that of a document.
const ContentType = "text/plain; version=0.0.4; charset=utf-8"

// Types of families.
const (
	Counter = "counter"
	Gauge   = "gauge"
)

// Label is a name with its value. Names are the caller's own words, and not checked.
type Label struct{ Name, Value string }

// Writer writes one document.
type Writer struct {
	w    *bufio.Writer
	name string // of the family
	err  error
}

// NewWriter returns a writer of a document to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: bufio.NewWriterSize(w, 32<<10)} }

// Family begins a family of samples.
func (w *Writer) Family(name, kind, help string) {
	w.name = name
	w.put("# HELP ", name, " ", helpEscaper.Replace(help), "\n# TYPE ", name, " ", kind, "\n")
}

// Sample writes a value of the family.
func (w *Writer) Sample(value float64, labels ...Label) { w.sample("", value, labels) }

// Bucket is one of a histogram: how many were not above Bound, the smaller ones included.
type Bucket struct {
	Bound float64
	Count uint64
}

// Histogram writes a histogram as part of a family of that type, which [Writer.Histograms]
// has begun. The last bucket, of all, is added.
func (w *Writer) Histogram(buckets []Bucket, sum float64, count uint64, labels ...Label) {
	with := append(append(make([]Label, 0, len(labels)+1), labels...), Label{Name: "le"})
	le := &with[len(labels)].Value
	for _, b := range buckets {
		*le = number(b.Bound)
		w.sample("_bucket", float64(b.Count), with)
	}
	*le = "+Inf"
	w.sample("_bucket", float64(count), with)
	w.sample("_sum", sum, labels)
	w.sample("_count", float64(count), labels)
}

// Histograms begins a family of histograms.
func (w *Writer) Histograms(name, help string) { w.Family(name, "histogram", help) }

// Flush writes what is left and returns the first error.
func (w *Writer) Flush() error {
	if err := w.w.Flush(); w.err == nil {
		w.err = err
	}
	return w.err
}

func (w *Writer) sample(suffix string, value float64, labels []Label) {
	w.put(w.name, suffix)
	for i, l := range labels {
		sep := ","
		if i == 0 {
			sep = "{"
		}
		w.put(sep, l.Name, `="`, valueEscaper.Replace(strings.ToValidUTF8(l.Value, "\ufffd")), `"`)
	}
	if len(labels) > 0 {
		w.put("}")
	}
	w.put(" ", number(value), "\n")
}

func (w *Writer) put(parts ...string) {
	for _, p := range parts {
		if _, err := w.w.WriteString(p); err != nil && w.err == nil {
			w.err = err
		}
	}
}

var (
	helpEscaper  = strings.NewReplacer(`\`, `\\`, "\n", `\n`)
	valueEscaper = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)
)

func number(v float64) string {
	switch {
	case math.IsInf(v, 1):
		return "+Inf"
	case math.IsInf(v, -1):
		return "-Inf"
	case math.IsNaN(v):
		return "NaN"
	case v == math.Trunc(v) && math.Abs(v) < 1<<53: // counters are read by people too
		return strconv.FormatInt(int64(v), 10)
	}
	return strconv.FormatFloat(v, 'g', -1, 64)
}
