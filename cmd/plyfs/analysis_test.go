package main

import "testing"

func TestEfficiencyText(t *testing.T) {
	for f, want := range map[float64]string{1: "100.0%", 0.99999: "99.9%", 0.29: "29.0%", 0.5454545: "54.5%", 0: "0.0%"} {
		if got := efficiencyText(f); got != want {
			t.Errorf("%v: %s, expected %s", f, got, want)
		}
	}
}
