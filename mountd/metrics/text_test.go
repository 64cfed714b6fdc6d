package metrics

import (
	"bytes"
	"errors"
	"math"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"pgregory.net/rapid"
)

func parse(t interface{ Fatal(...any) }, text string) map[string]*dto.MetricFamily {
	p := expfmt.NewTextParser(model.UTF8Validation)
	all, err := p.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatal(err, "\n", text)
	}
	return all
}

// What is written is what a parser reads, whatever the values.
func TestSamplesAreRead(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		help := rapid.StringN(1, 50, -1).Draw(t, "help")
		label := string(rapid.SliceOfN(rapid.Byte(), 0, 30).Draw(t, "label"))
		value := rapid.Float64().Draw(t, "value")
		var b bytes.Buffer
		w := NewWriter(&b)
		w.Family("plyfs_x_total", Counter, strings.TrimSpace(help)+".")
		w.Sample(value, Label{"a", label}, Label{"b", "2"})
		w.Sample(1)
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		ms := parse(t, b.String())["plyfs_x_total"].GetMetric()
		if len(ms) != 2 {
			t.Fatalf("%d samples in\n%s", len(ms), b.String())
		}
		got := ms[0]
		if v := got.GetCounter().GetValue(); v != value && !(math.IsNaN(v) && math.IsNaN(value)) {
			t.Errorf("%v, want %v", v, value)
		}
		if l := got.GetLabel(); l[0].GetValue() != strings.ToValidUTF8(label, "\ufffd") || l[1].GetValue() != "2" {
			t.Errorf("labels %v, want %q", l, label)
		}
	})
}

func TestHistogramIsRead(t *testing.T) {
	var b bytes.Buffer
	w := NewWriter(&b)
	w.Histograms("plyfs_h_seconds", "Time.")
	w.Histogram([]Bucket{{1e-6, 2}, {0.5, 5}}, 1.25, 6, Label{"op", "lookup"})
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	f := parse(t, b.String())["plyfs_h_seconds"]
	h := f.GetMetric()[0].GetHistogram()
	if f.GetType() != dto.MetricType_HISTOGRAM || h.GetSampleCount() != 6 || h.GetSampleSum() != 1.25 || len(h.GetBucket()) != 3 {
		t.Fatalf("%v in\n%s", f, b.String())
	}
	if first := h.GetBucket()[0]; first.GetUpperBound() != 1e-6 || first.GetCumulativeCount() != 2 {
		t.Errorf("%v", first)
	}
	if last := h.GetBucket()[2]; !math.IsInf(last.GetUpperBound(), 1) || last.GetCumulativeCount() != 6 {
		t.Errorf("%v", last)
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("full") }

func TestErrorIsKept(t *testing.T) {
	w := NewWriter(full{})
	w.Family("x", Gauge, strings.Repeat("long ", 20000))
	w.Sample(1)
	if err := w.Flush(); err == nil {
		t.Error("no error")
	}
}
