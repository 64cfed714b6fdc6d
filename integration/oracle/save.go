package oracle

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Save writes a trial to dir/name: the trial without its operations as one
// JSON line, then one line per operation, then the differences as comments.
func (t *Trial) Save(dir, name string, diffs []Diff, failure error) (string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("save trial: %w", err)
	}
	path := filepath.Join(dir, name)
	f, err := os.Create(path)
	if err != nil {
		return "", fmt.Errorf("save trial: %w", err)
	}
	w := bufio.NewWriter(f)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	err = enc.Encode(t)
	for _, op := range t.Ops {
		err = errors.Join(err, enc.Encode(op))
	}
	type comment struct {
		Diff  *Diff  `json:"diff,omitempty"`
		Error string `json:"error,omitempty"`
	}
	for _, d := range diffs {
		err = errors.Join(err, enc.Encode(comment{Diff: &d}))
	}
	if failure != nil {
		err = errors.Join(err, enc.Encode(comment{Error: failure.Error()}))
	}
	return path, errors.Join(err, w.Flush(), f.Close())
}

// Load reads what Save wrote.
func Load(path string) (*Trial, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("load trial: %w", err)
	}
	defer f.Close()
	dec := json.NewDecoder(bufio.NewReader(f))
	t := &Trial{}
	if err := dec.Decode(t); err != nil {
		return nil, fmt.Errorf("load trial %s: %w", path, err)
	}
	for dec.More() {
		var op Op
		if err := dec.Decode(&op); err != nil {
			return nil, fmt.Errorf("load trial %s, operation %d: %w", path, len(t.Ops), err)
		}
		if op.Op != "" { // not a comment
			t.Ops = append(t.Ops, op)
		}
	}
	return t, nil
}
