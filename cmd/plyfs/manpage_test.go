package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRoff(t *testing.T) {
	for in, want := range map[string]string{
		"plain":       "plain",
		".SH not one": `\&.SH not one`,
		"'quoted'":    `\(aqquoted\(aq`,
		`back\slash`:  `back\eslash`,
		"-f NAME…":    `\-f NAME...`,
	} {
		if got := roff(in); got != want {
			t.Errorf("roff(%q) = %s, want %s", in, got, want)
		}
	}
}

// Every command that --help shows has a page, and plyfs(1) refers to it.
func TestGenDocs(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "86400")
	dir := t.TempDir()
	root := newRootCommand()
	if err := genDocs(root, dir); err != nil {
		t.Fatal(err)
	}
	page := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, "man", "man1", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	main := page("plyfs.1")
	if !strings.HasPrefix(main, `.TH PLYFS 1 "1970-01-02" `) {
		t.Errorf("plyfs.1 begins with %q: not the date of SOURCE_DATE_EPOCH", main[:40])
	}
	for _, cmd := range root.Commands() {
		if !cmd.IsAvailableCommand() {
			continue
		}
		name := manName(cmd)
		text := page(name + ".1")
		for _, want := range []string{".SH SYNOPSIS", ".SH OPTIONS", ".SH EXAMPLES", `\fB\-\-help\fR`} {
			if !strings.Contains(text, want) {
				t.Errorf("%s.1: no %s", name, want)
			}
		}
		if ref := ".BR " + roff(name) + " (1)\n"; !strings.Contains(main, ref) {
			t.Errorf("plyfs.1 does not list %s(1): give the command a group", name)
		}
	}
	t.Setenv("SOURCE_DATE_EPOCH", "yesterday")
	if err := genDocs(root, dir); exitCode(err) != exitUsage {
		t.Errorf("SOURCE_DATE_EPOCH=yesterday: %v", err)
	}
}
