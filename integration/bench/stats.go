package main

import (
	"math"
	"slices"
)

// median of values; NaN of none.
func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	v := slices.Sorted(slices.Values(values))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// spread is the distance between the quartiles, relative to the median: how
// much a value changes from round to round. 0 with fewer than three values.
func spread(values []float64) float64 {
	m := median(values)
	if len(values) < 3 || m == 0 {
		return 0
	}
	v := slices.Sorted(slices.Values(values))
	return (quantile(v, 0.75) - quantile(v, 0.25)) / m
}

// quantile of sorted values, between them in proportion.
func quantile(v []float64, q float64) float64 {
	at := q * float64(len(v)-1)
	i := int(at)
	if i+1 >= len(v) {
		return v[len(v)-1]
	}
	return v[i] + (at-float64(i))*(v[i+1]-v[i])
}
