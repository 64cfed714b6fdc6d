package layers

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/plyfs/plyfs/metadata"
)

// Import makes a one-layer image of a flat root filesystem tar, which may be
// compressed.
func (s *Store) Import(ctx context.Context, r io.Reader, ref string, o ImportOptions) (_ Image, err error) {
	changes, err := parseChanges(o.Changes)
	if err != nil {
		return Image{}, err
	}
	refs, err := optionalRef(ref)
	if err != nil {
		return Image{}, err
	}
	if o.Platform, err = parsePlatform(cmp.Or(o.Platform, thisPlatform())); err != nil {
		return Image{}, err
	}
	plat := strings.SplitN(o.Platform, "/", 3)
	base := ocispec.Image{Platform: ocispec.Platform{OS: plat[0], Architecture: plat[1]}, RootFS: ocispec.RootFS{Type: "layers"}}
	if len(plat) == 3 {
		base.Variant = plat[2]
	}
	raw, err := json.Marshal(base)
	if err != nil {
		return Image{}, err
	}
	if _, err := childConfig(raw, ocispec.History{}, "", changes); err != nil { // before the work
		return Image{}, err
	}
	if err := s.sweep(ctx); err != nil {
		return Image{}, err
	}
	lease, err := s.newLease(ctx)
	if err != nil {
		return Image{}, err
	}
	defer s.dropLease(lease)
	p := &progress{fn: o.Progress}
	t := p.start("import", "unpacking", 0)
	defer t.done()
	diffID, err := s.importLayer(ctx, lease, t.reader(r))
	if err != nil {
		return Image{}, err
	}
	now := time.Now().UTC()
	comment := o.Message
	if comment == "" {
		comment = "Imported by plyfs"
	}
	config, err := childConfig(raw, ocispec.History{Created: &now, Comment: comment}, diffID, changes)
	if err != nil {
		return Image{}, err
	}
	return s.addMade(ctx, lease, config, refs, metadata.Image{Origin: "import"})
}

func (s *Store) importLayer(ctx context.Context, lease string, r io.Reader) (digest.Digest, error) {
	br := bufio.NewReaderSize(ctxReader{ctx, r}, 256<<10)
	if _, err := br.Peek(1); err != nil {
		return "", fmt.Errorf("%w: the input is empty: %w", ErrInvalid, err)
	}
	plain, form, err := decompress(br)
	if err != nil {
		return "", err
	}
	defer plain.Close()
	st, err := s.newStage(ctx, "import")
	if err != nil {
		return "", err
	}
	defer st.discard()
	if err := st.unpack(ctx, plain); err != nil {
		return "", decompressError(form, err)
	}
	if !st.u.stats.ended {
		// There is no digest that would tell.
		return "", fmt.Errorf("%w: the tar is truncated after %d entries: it has no end mark", ErrCorrupt, st.u.stats.entries)
	}
	if _, err := io.Copy(io.Discard, br); err != nil {
		return "", err
	}
	l, err := st.commit(ctx, target{origin: "import", lease: lease})
	return l.DiffID, err
}
