package layers

import (
	"context"
	"fmt"
	"io"
	"sort"
	"strings"

	"github.com/plyfs/plyfs/metadata"
)

// settle copies what was adopted from the store by reference before, containers' layers
// among it, so that nothing here needs the store any more.
func (a *adopter) settle(ctx context.Context) error {
	type adopted struct {
		layer metadata.Layer
		cache metadata.Cache
	}
	var todo []adopted
	err := a.s.update(ctx, func(tx *metadata.Tx) error {
		todo = nil
		rows, err := tx.Layers()
		if err != nil {
			return err
		}
		for _, l := range rows {
			c, err := tx.Cache(l.CacheID)
			if err != nil {
				return err
			}
			if c.Adopted == nil || !strings.HasPrefix(c.Adopted.Path, a.src.Path+"/") {
				continue
			}
			todo = append(todo, adopted{l, c})
			if err := tx.LeaseLayer(a.lease, l.ChainID); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil || len(todo) == 0 {
		return err
	}
	sort.Slice(todo, func(i, j int) bool { return todo[i].layer.Depth < todo[j].layer.Depth })
	for _, t := range todo {
		if err := a.settleOne(ctx, t.layer, t.cache); err != nil {
			if err := a.skip(ctx, "layer", ShortID(t.layer.ChainID), err); err != nil {
				return fmt.Errorf("layer %s: %w", ShortID(t.layer.ChainID), err)
			}
			continue
		}
		a.rep.Copied++
		if a.rep.Present > 0 && a.met[t.layer.ChainID] {
			a.rep.Present-- // it was counted when it was met
		}
	}
	// They are of the directories that there were.
	_, err = a.s.DropChains(ctx)
	return err
}

func (a *adopter) settleOne(ctx context.Context, l metadata.Layer, c metadata.Cache) error {
	files, side, err := a.s.openLayer(c.CacheID)
	if err != nil {
		return err
	}
	defer files.Close()
	t := a.progress.start(ShortID(l.DiffID), "copying", c.TarSize)
	defer t.done()
	st, err := a.s.stageFrom(ctx, "adopt", func(w io.Writer) error {
		_, err := files.assemble(ctx, io.MultiWriter(w, t), l.DiffID, side.displaced())
		return err
	})
	if err != nil {
		return err
	}
	defer st.discard()
	stack, err := a.s.stackOf(ctx, l.Parent)
	if err != nil {
		return err
	}
	b, err := st.bind(ctx, target{parent: l.Parent, origin: l.Origin, lease: a.lease}, stack)
	if err != nil {
		return err
	}
	b.replace = true
	return a.s.publish(ctx, []*bound{b})
}
