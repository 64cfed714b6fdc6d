package metadata

import (
	"errors"
	"path/filepath"
	"testing"
)

// TestWanted: targets may have any bytes, and what is wanted outlives a rebuild of the
// database, but is not taken from an older copy.
func TestWanted(t *testing.T) {
	db := newDB(t)
	const odd = "/mnt/\xff"
	err := db.Update(t.Context(), func(tx *Tx) error {
		return errors.Join(tx.PutWanted(Wanted{Target: odd, ImageID: d("i"), Request: []byte(`{"source":"i"}`)}),
			tx.PutWanted(Wanted{Target: "/gone", ContainerID: "c", Request: []byte(`{}`)}), tx.DeleteWanted("/gone"), tx.DeleteWanted("/never"))
	})
	if err != nil {
		t.Fatal(err)
	}
	targets := func(db *DB) (out []string) {
		t.Helper()
		err := db.View(t.Context(), func(tx *Tx) error {
			all, err := tx.Wanted()
			for _, w := range all {
				out = append(out, w.Target)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if got := targets(db); len(got) != 1 || got[0] != odd {
		t.Errorf("wanted: %q", got)
	}
	if p := check(t, db); len(p) != 0 {
		t.Error(p)
	}
	s, err := Salvage(db.path)
	if err != nil {
		t.Fatal(err)
	}
	for same, want := range map[bool]int{true: 1, false: 0} {
		other := New(filepath.Join(t.TempDir(), "x.db"), Options{})
		if _, err := other.Rebuild(t.Context(), func(tx *Tx) error { return s.Rest(tx, same) }); err != nil {
			t.Fatal(err)
		}
		if got := targets(other); len(got) != want {
			t.Errorf("after a rebuild (identity %t): %q", same, got)
		}
	}
}
