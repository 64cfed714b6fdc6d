package layers

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/plyfs/plyfs/metadata"
)

// Analyze says what each layer of an image does, and which of its bytes nobody sees.
func (s *Store) Analyze(ctx context.Context, nameOrID string, o AnalyzeOptions) (*Analysis, error) {
	lease, err := s.newLease(ctx)
	if err != nil {
		return nil, err
	}
	defer s.dropLease(lease)
	dirs, err := s.leasedStack(ctx, lease, nameOrID)
	if err != nil {
		return nil, err
	}
	var facts *Analysis
	err = s.view(ctx, func(tx *metadata.Tx) error {
		facts, err = s.analysisOf(tx, nameOrID)
		return err
	})
	if err != nil {
		return nil, err
	}
	if len(facts.Layers) != len(dirs) { // the name was given to another image in between
		return nil, fmt.Errorf("image %q: %w: it has changed while it was looked at; try again", nameOrID, ErrInUse)
	}
	if o.Layer < 0 || o.Layer > len(dirs) {
		return nil, fmt.Errorf("%w: image %q has no layer %d, it has %d", ErrInvalid, nameOrID, o.Layer, len(dirs))
	}
	var out *Analysis
	err = s.withSoundIndexes(ctx, dirs, func() error {
		a := *facts
		a.Layers = slices.Clone(facts.Layers)
		out = &a
		return s.analyze(ctx, out, dirs, o)
	})
	if err != nil {
		return nil, fmt.Errorf("image %q: %w", nameOrID, err)
	}
	return out, nil
}

// analysisOf is an analysis as far as the database has it.
func (s *Store) analysisOf(tx *metadata.Tx, nameOrID string) (*Analysis, error) {
	r, err := resolve(tx, nameOrID)
	if err != nil {
		return nil, err
	}
	img, _, row, err := image(tx, r.id)
	if err != nil {
		return nil, err
	}
	a := &Analysis{ID: img.ID, Refs: append([]string{}, img.Refs...), Layers: []LayerAnalysis{}, History: []HistoryStep{}}
	infos, err := s.layerInfos(tx, row.TopChain)
	if err != nil {
		return nil, err
	}
	users, err := layerImages(tx)
	if err != nil {
		return nil, err
	}
	numbers := map[digest.Digest]int{}
	for i, l := range infos {
		numbers[l.ChainID] = i + 1
		a.Layers = append(a.Layers, LayerAnalysis{Number: i + 1, LayerInfo: l, Images: users[l.ChainID]})
	}
	steps, err := history(tx, img)
	if err != nil {
		return nil, err
	}
	for _, e := range slices.Backward(steps) {
		step := HistoryStep{Layer: numbers[e.ChainID], Created: e.Created, CreatedBy: e.CreatedBy, Comment: e.Comment}
		a.History = append(a.History, step)
		if step.Layer > 0 {
			l := &a.Layers[step.Layer-1]
			l.CreatedBy, l.Comment = e.CreatedBy, e.Comment
		}
	}
	return a, nil
}

// layerImages counts the images that have each layer.
func layerImages(tx *metadata.Tx) (map[digest.Digest]int, error) {
	images, err := tx.Images()
	if err != nil {
		return nil, err
	}
	briefs := tx.Briefs()
	out := map[digest.Digest]int{}
	for _, i := range images {
		seen := 0
		for c := i.TopChain; c != "" && seen <= len(briefs); c = briefs[c].Parent {
			out[c]++
			seen++
		}
	}
	return out, nil
}

// analyze fills a by what the indexes of its layers say; dirs are topmost first.
func (s *Store) analyze(ctx context.Context, a *Analysis, dirs []LayerDir, o AnalyzeOptions) (err error) {
	dirs = slices.Clone(dirs)
	slices.Reverse(dirs)
	indexes, err := s.layerIndexes(ctx, dirs)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeIndexes(indexes)) }()
	w := newAnalyzer(ctx, a, o, indexes, dirs)
	defer w.files.Close()
	if err := w.run(); err != nil {
		return err
	}
	return w.finish()
}
