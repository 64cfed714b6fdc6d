package main

import "testing"

func TestEfficiencyText(t *testing.T) {
	for f, want := range map[float64]string{1: "100.0%", 0.99999: "99.9%", 0.29: "29.0%", 0.5454545: "54.5%", 0: "0.0%"} {
		if got := efficiencyText(f); got != want {
			t.Errorf("%v: %s, expected %s", f, got, want)
		}
	}
}

func TestStepText(t *testing.T) {
	for _, c := range []struct{ by, comment, want string }{
		{"/bin/sh -c #(nop) CMD [\"sh\"]", "", "CMD [\"sh\"]"},
		{"/bin/sh -c apt-get  update", "buildkit", "RUN apt-get update"},
		{"plyfs commit work", "add curl", "plyfs commit work: add curl"},
		{"plyfs commit work", "", "plyfs commit work"},
		{"", "imported", ""},
	} {
		if got := stepText(c.by, c.comment, true); got != c.want {
			t.Errorf("%q, %q: %q", c.by, c.comment, got)
		}
	}
}
