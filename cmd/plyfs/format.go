package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"text/template"
	"time"
)

// column is one fact that --format can name, by docker's word for it.
type column struct {
	name, title string
}

// formatFuncs are those that docker and podman have in templates.
var formatFuncs = template.FuncMap{
	"json": func(v any) (string, error) {
		var b bytes.Buffer
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		err := enc.Encode(v)
		return strings.TrimSpace(b.String()), err
	},
	"join":  func(s []string, by string) string { return strings.Join(s, by) },
	"split": strings.Split, "lower": strings.ToLower, "upper": strings.ToUpper,
	"println": fmt.Sprintln,
	"pad": func(s string, before, after int) string {
		if s == "" {
			return s
		}
		return strings.Repeat(" ", max(0, before)) + s + strings.Repeat(" ", max(0, after))
	},
	"truncate": func(s string, n int) string {
		if r := []rune(s); n >= 0 && n < len(r) {
			return string(r[:n])
		}
		return s
	},
}

// printFormat prints rows by a Go template, one a line: "json" is a whole row, and what
// begins with "table" has a line of titles and aligned columns.
func printFormat(format string, columns []column, rows []map[string]any) error {
	isTable := strings.HasPrefix(format, "table")
	if format == "table" {
		var all []string
		for _, c := range columns {
			all = append(all, "{{."+c.name+"}}")
		}
		format = "table " + strings.Join(all, `\t`)
	}
	text := strings.TrimSpace(strings.TrimPrefix(format, "table"))
	if !isTable {
		text = format
	}
	if text == "json" {
		text = "{{json .}}"
	}
	text = strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(text)
	tmpl, err := template.New("format").Funcs(formatFuncs).Option("missingkey=error").Parse(text)
	if err != nil {
		return usagef("--format: %v", err)
	}
	var out bytes.Buffer
	if isTable {
		titles := map[string]any{}
		for _, c := range columns {
			titles[c.name] = c.title
		}
		rows = append([]map[string]any{titles}, rows...)
	}
	for _, r := range rows {
		if err := tmpl.Execute(&out, r); err != nil {
			return usagef("--format: %v; there is %s", err, names(columns))
		}
		out.WriteByte('\n')
	}
	if !isTable {
		_, err = os.Stdout.Write(out.Bytes())
		return err
	}
	w := tabwriter.NewWriter(os.Stdout, 10, 1, 3, ' ', 0)
	if _, err := w.Write(out.Bytes()); err != nil {
		return err
	}
	return w.Flush()
}

func names(columns []column) string {
	var out []string
	for _, c := range columns {
		out = append(out, "."+c.name)
	}
	return strings.Join(out, ", ")
}

// wants reports whether a template names a column.
func wants(format, name string) bool { return strings.Contains(format, "."+name) }

// createdAt is a time as docker writes it.
func createdAt(t time.Time) string {
	if t.IsZero() {
		return "N/A"
	}
	return t.Local().Format("2006-01-02 15:04:05 -0700 MST")
}
