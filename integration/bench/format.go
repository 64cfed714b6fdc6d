package main

import (
	"fmt"
	"math"
	"time"
)

// unit says how a figure is shown.
type unit string

const (
	perSecond      unit = ""        // operations per second; what is kept are seconds
	perSecondBytes unit = "bytes/s" // likewise, operations are bytes
	duration       unit = "seconds" // seconds
	memory         unit = "bytes"   // kept as such
	factor         unit = "times"   // a ratio between two phases
)

// timed says whether values are seconds.
func (u unit) timed() bool { return u == perSecond || u == perSecondBytes || u == duration }

// rate formats seconds for ops operations, or a value.
func (u unit) rate(v float64, ops int64) string {
	switch {
	case u == perSecond && v > 0:
		return quantity(float64(ops)/v, 1000, []string{"", "k", "M", "G"}) + "/s"
	case u == perSecondBytes && v > 0:
		return quantity(float64(ops)/v, 1000, []string{" B", " kB", " MB", " GB"}) + "/s"
	}
	return u.value(v)
}

// value formats a value that is not a rate.
func (u unit) value(v float64) string {
	switch u {
	case memory:
		return quantity(v, 1024, []string{" B", " KiB", " MiB", " GiB"})
	case factor:
		return fmt.Sprintf("%.2f×", v)
	}
	return seconds(v)
}

// quantity writes three digits and a prefix.
func quantity(v, base float64, prefixes []string) string {
	i := 0
	for math.Abs(v) >= 0.9995*base && i < len(prefixes)-1 {
		v /= base
		i++
	}
	return digits(v) + prefixes[i]
}

// digits writes three significant digits, never with an exponent.
func digits(v float64) string {
	switch a := math.Abs(v); {
	case v == 0:
		return "0"
	case a >= 99.95:
		return fmt.Sprintf("%.0f", v)
	case a >= 9.995:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func seconds(v float64) string {
	switch {
	case v < 1e-3:
		return digits(v*1e6) + " µs"
	case v < 1:
		return digits(v*1e3) + " ms"
	case v < 600:
		return digits(v) + " s"
	}
	return time.Duration(v * float64(time.Second)).Round(time.Second).String()
}

// ratio formats a speed relative to another.
func ratio(v float64) string {
	if v == 0 || math.IsNaN(v) || math.IsInf(v, 0) {
		return "–"
	}
	switch {
	case v >= 9.995:
		return fmt.Sprintf("%.1f", v)
	case v < 0.0995:
		return fmt.Sprintf("%.3f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
