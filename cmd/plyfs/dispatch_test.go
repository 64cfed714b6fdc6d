package main

import (
	"strings"
	"testing"
)

func TestByMountFuse(t *testing.T) {
	for line, want := range map[string]bool{
		"none /mnt -o rw,lowerdir=/l":    true,
		"/mnt -o lowerdir+=/l,rw":        true,
		"overlay /mnt -o lowerdir=/l,rw": false,
		"none /mnt -o @/etc/options":     true,
		"export c -o lowerdir.tar":       false,
		"save image -o lowerdir,1.tar":   false,
		"export c -o @c.tar":             false,
		"save image -o x.tar":            false,
		"none /mnt -o":                   false,
		"mount image -o lowerdir=/l x":   false,
	} {
		if got := byMountFuse(strings.Fields(line)); got != want {
			t.Errorf("%q: %v", line, got)
		}
	}
}
