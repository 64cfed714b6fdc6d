package layers

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/metadata"
)

// start takes in a layer in the background.
func (a *archive) start(ctx context.Context, m *member, br *bufio.Reader, size int64, done func()) (drained <-chan struct{}, err error) {
	select {
	case a.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	short := m.name
	if d, ok := namedDigest(m.name); ok {
		short = d.Encoded()[:12]
	}
	track := a.progress.start(short, "unpacking", size)
	raw := readAhead(ctx, track.reader(br), rawBlocks)
	m.ready = make(chan struct{})
	a.put(m)
	go func() {
		defer close(m.ready)
		defer func() { <-a.slots }()
		defer track.done()
		if done != nil {
			defer done()
		}
		err := a.addLayer(ctx, m, raw, track)
		d, rerr := raw.finish()
		m.size = raw.size
		switch {
		case rerr != nil:
			a.fail(rerr)
			return
		case err != nil:
			a.fail(fmt.Errorf("archive member %q: %w", m.name, err))
			return
		}
		if err := m.is(d, size); err != nil {
			a.fail(fmt.Errorf("archive member %q: %w", m.name, err))
			return
		}
		if m.layer != nil {
			m.layer.blob, m.layer.blobSize = m.digest, m.size
		}
	}()
	return raw.drained, nil
}

// fatal tells errors of this machine from those of the member.
func fatal(ctx context.Context, err error) bool {
	return ctx.Err() != nil || errors.Is(err, ErrLocked) ||
		errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EIO) || errors.Is(err, unix.EROFS) ||
		errors.Is(err, errFault)
}

// errFault ends the work at a fault point of a test.
var errFault = errors.New("fault point")

// addLayer unpacks a member, or only hashes it if the store has its content.
// What is wrong with it matters only if a manifest turns out to name it; an
// error that is returned ends the whole work.
func (a *archive) addLayer(ctx context.Context, m *member, raw *ahead, track *track) error {
	plain, form, err := decompress(bufio.NewReaderSize(raw, 64<<10))
	if err != nil {
		m.err = err
		return nil
	}
	defer plain.Close()
	// An uncompressed layer is its own tar: one digest is enough.
	sum, src := raw, io.Reader(plain)
	if form != "none" {
		sum = readAhead(ctx, plain, aheadBlocks)
		defer sum.stop()
		src = sum
	}
	known, err := a.haveContent(ctx, m.name)
	if err != nil {
		return err
	}
	var st *stage
	if known {
		track.action("verifying")
		_, err = io.Copy(io.Discard, &countReader{r: src, limit: a.s.limits.LayerBytes})
	} else {
		if st, err = a.s.newStage(ctx, "load"); err != nil {
			return err
		}
		a.mu.Lock()
		a.stages = append(a.stages, st)
		a.mu.Unlock()
		err = st.unpackFrom(ctx, src)
	}
	var diffID digest.Digest
	if err == nil {
		diffID, err = sum.finish()
	}
	if err != nil {
		if st != nil {
			st.discard()
		}
		if fatal(ctx, err) || known && form == "none" {
			return err
		}
		m.err = decompressError(form, err)
		return nil
	}
	m.layer = &layerData{name: m.name, diffID: diffID, stage: st}
	if known {
		return a.mustHave(ctx, m)
	}
	st.u.stats.diffID = diffID
	return nil
}

// haveContent asks whether the store has what a member's name promises, and
// keeps it from being removed meanwhile.
func (a *archive) haveContent(ctx context.Context, name string) (bool, error) {
	d, ok := namedDigest(name)
	if m := layerTarName.FindStringSubmatch(name); m != nil {
		d, ok = digest.NewDigestFromEncoded(digest.SHA256, m[1]), true
	}
	if !ok {
		return false, nil
	}
	find := func(tx *metadata.Tx) []digest.Digest {
		return append(tx.ChainsByDiff(d), tx.ChainsByBlob(d)...)
	}
	var chains []digest.Digest
	err := a.s.view(ctx, func(tx *metadata.Tx) error { chains = find(tx); return nil })
	if err != nil {
		return false, err
	}
	for len(chains) > 0 { // content of another store that is no more there is not had
		lost, err := a.s.lost(ctx, chains[0])
		if err != nil {
			return false, err
		}
		if !lost {
			break
		}
		chains = chains[1:]
	}
	have := len(chains) > 0
	if !have {
		return false, nil
	}
	err = a.s.update(ctx, func(tx *metadata.Tx) error {
		chains := find(tx)
		have = len(chains) > 0
		for _, c := range chains {
			if err := tx.LeaseLayer(a.lease, c); err != nil {
				return err
			}
		}
		return nil
	})
	return have, err
}

// mustHave makes sure that a member that was only hashed is what its name
// promised: if not, its content is nowhere.
func (a *archive) mustHave(ctx context.Context, m *member) error {
	return a.s.view(ctx, func(tx *metadata.Tx) error {
		if len(tx.ChainsByDiff(m.layer.diffID)) == 0 {
			return fmt.Errorf("%w: wrong digest: its name promises a layer of the store, its content has diffID %s", ErrCorrupt, m.layer.diffID)
		}
		return nil
	})
}
