package layers

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// Sidecar is layer.json: enough to make the layer's rows anew.
type Sidecar struct {
	Version   int            `json:"version"`
	Cache     metadata.Cache `json:"cache"`
	Layer     metadata.Layer `json:"layer"` // the chain it was first unpacked for
	Displaced []int          `json:"displaced,omitempty"`
	// Incomplete: some attributes could not be applied to the files and are
	// only in the index and in the tar-split record.
	Incomplete bool `json:"incomplete,omitempty"`
}

func (c *Sidecar) displaced() map[int]bool {
	m := make(map[int]bool, len(c.Displaced))
	for _, d := range c.Displaced {
		m[d] = true
	}
	return m
}

// writeSidecar replaces the sidecar of a layer.
func writeSidecar(dir int, side Sidecar) error { return putSidecar(dir, side, true) }

// putSidecar writes a sidecar, and waits for the disk if sync is set.
func putSidecar(dir int, side Sidecar, sync bool) (err error) {
	raw, err := json.MarshalIndent(side, "", "\t")
	if err != nil {
		return err
	}
	const tmp = sidecarName + ".new"
	fd, err := fsat.OpenName(dir, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write %s: %w", sidecarName, err)
	}
	f := os.NewFile(uintptr(fd), tmp)
	_, err = f.Write(append(raw, '\n'))
	if err == nil && sync {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = fsat.Rename(dir, tmp, dir, sidecarName, 0)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", sidecarName, err)
	}
	return nil
}

func readSidecar(dir int) (side Sidecar, err error) {
	fd, err := fsat.OpenRegular(dir, sidecarName, unix.O_RDONLY)
	if err != nil {
		return side, fmt.Errorf("%s: %w", sidecarName, err)
	}
	f := os.NewFile(uintptr(fd), sidecarName)
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, 64<<20))
	if err != nil {
		return side, err
	}
	if err := json.Unmarshal(raw, &side); err != nil || side.Version != 1 {
		return side, fmt.Errorf("%w: %s: version %d: %w", ErrCorrupt, sidecarName, side.Version, errors.Join(err))
	}
	return side, nil
}
