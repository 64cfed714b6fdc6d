package main

import (
	"math"
	"testing"
)

func TestMedian(t *testing.T) {
	for _, tc := range []struct {
		values []float64
		want   float64
	}{
		{[]float64{3}, 3},
		{[]float64{3, 1}, 2},
		{[]float64{5, 1, 3}, 3},
		{[]float64{4, 1, 3, 2}, 2.5},
	} {
		if got := median(tc.values); got != tc.want {
			t.Errorf("median(%v) = %v, want %v", tc.values, got, tc.want)
		}
	}
	if got := median(nil); !math.IsNaN(got) {
		t.Errorf("median of nothing is %v", got)
	}
}

func TestSpread(t *testing.T) {
	for _, tc := range []struct {
		values []float64
		want   float64
	}{
		{nil, 0},
		{[]float64{1, 2}, 0},
		{[]float64{2, 2, 2}, 0},
		{[]float64{1, 2, 3, 4, 5}, 2.0 / 3},
		{[]float64{5, 1, 4, 2, 3}, 2.0 / 3},
	} {
		if got := spread(tc.values); math.Abs(got-tc.want) > 1e-9 {
			t.Errorf("spread(%v) = %v, want %v", tc.values, got, tc.want)
		}
	}
}

func TestUnits(t *testing.T) {
	for _, tc := range []struct {
		unit unit
		v    float64
		ops  int64
		want string
	}{
		{perSecond, 0.5, 61_200, "122k/s"},
		{perSecond, 2, 3, "1.50/s"},
		{perSecond, 1, 999_960, "1.00M/s"},
		{perSecondBytes, 0.25, 512 << 20, "2.15 GB/s"},
		{duration, 0.0000123, 1, "12.3 µs"},
		{duration, 0.0835, 1, "83.5 ms"},
		{duration, 75, 1, "75.0 s"},
		{duration, 754, 1, "12m34s"},
		{memory, 400, 1, "400 B"},
		{memory, 25 << 20, 1, "25.0 MiB"},
		{factor, 1.049, 1, "1.05×"},
	} {
		if got := tc.unit.rate(tc.v, tc.ops); got != tc.want {
			t.Errorf("%q: %v for %d operations is %q, want %q", tc.unit, tc.v, tc.ops, got, tc.want)
		}
	}
}

func TestGoals(t *testing.T) {
	for _, tc := range []struct {
		goal         goal
		ratio, value float64
		want         bool
	}{
		{goal{Least: 0.9}, 0.896, 0, true}, // shown as 0.90
		{goal{Least: 0.9}, 0.89, 0, false},
		{goal{AtMost: 400}, 0, 400, true},
		{goal{AtMost: 400}, 9, 401, false},
	} {
		if got := tc.goal.met(tc.ratio, tc.value); got != tc.want {
			t.Errorf("%+v with ratio %v, value %v: %v", tc.goal, tc.ratio, tc.value, got)
		}
	}
	ph := phase{Goals: leastOn(0.85, 0.4)}
	for place, want := range map[string]float64{"ext4": 0.85, "xfs": 0.85, "tmpfs": 0.4} {
		if g := ph.goalsOn(place); len(g) != 1 || g[0].Least != want {
			t.Errorf("goals on %s: %+v, want %v", place, g, want)
		}
	}
}
