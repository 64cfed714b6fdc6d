package crash

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Recording is a disk's past.
type Recording struct {
	FS  FileSystem
	Log Log
	dir string
}

// Loss says which of the writes that were not flushed are on the disk.
type Loss int

// The ways to lose power.
const (
	LoseAll    Loss = iota // none of them
	LoseNone               // all
	LoseSome               // some
	LoseBlocks             // some, and of each only some blocks
	losses
)

var lossNames = [...]string{"no write after the last flush", "all writes", "some writes", "some blocks"}

func (l Loss) String() string { return lossNames[l] }

// Cut is one loss of power.
type Cut struct {
	At   int // entries of the log before this one have happened
	Loss Loss
	Seed uint64
}

func (c Cut) String() string { return fmt.Sprintf("cut at %d, %s, seed %d", c.At, c.Loss, c.Seed) }

// Cuts chooses n cuts from place from of the log on, every other one right
// behind a mark, where something has just been promised.
func (l Log) Cuts(rng *rand.Rand, from, n int) []Cut {
	marks := l.Marks(from)
	var cuts []Cut
	for i := range n {
		at := from + rng.IntN(len(l)-from) + 1
		if i%2 == 0 && len(marks) > 0 {
			at = min(marks[rng.IntN(len(marks))]+1+rng.IntN(3), len(l))
		}
		cuts = append(cuts, Cut{At: at, Loss: Loss(rng.IntN(int(losses))), Seed: rng.Uint64()})
	}
	return cuts
}

// block is what a disk writes whole.
const block = 4096

// Build writes the disk as the cut leaves it to a new file.
func (r *Recording) Build(c Cut) (path string, err error) {
	path = filepath.Join(r.dir, fmt.Sprintf("cut-%d-%d", c.At, c.Seed))
	if err := copySparse(path, filepath.Join(r.dir, baseName)); err != nil {
		return "", err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return "", fmt.Errorf("build disk: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	flushed := 0
	for i, e := range r.Log[:c.At] {
		if e.Kind == Flush {
			flushed = i
		}
	}
	rng := rand.New(rand.NewPCG(c.Seed, 0))
	for i, e := range r.Log[:c.At] {
		if i > flushed && !c.survives(rng, &e) {
			continue
		}
		if i > flushed && c.Loss == LoseBlocks && e.Kind == Write {
			if err := applyTorn(f, e, rng); err != nil {
				return "", err
			}
			continue
		}
		if err := apply(f, e); err != nil {
			return "", err
		}
	}
	return path, nil
}

// survives decides about one write that was not flushed.
func (c Cut) survives(rng *rand.Rand, e *Entry) bool {
	switch c.Loss {
	case LoseAll:
		return false
	case LoseNone:
		return true
	}
	return rng.IntN(2) == 0
}

// applyTorn applies some of the blocks of a write.
func applyTorn(f *os.File, e Entry, rng *rand.Rand) error {
	for off := int64(0); off < e.Len; {
		n := min(e.Len-off, block-(e.Off+off)%block)
		if rng.IntN(4) > 0 {
			if err := apply(f, Entry{Kind: Write, Off: e.Off + off, Len: n, Data: e.Data[off : off+n]}); err != nil {
				return err
			}
		}
		off += n
	}
	return nil
}

// Attach mounts the disk at path, which the file system repairs from its
// journal, and calls fn with its root. The disk is removed.
func (r *Recording) Attach(path string, fn func(root string) error) (err error) {
	defer func() { err = errors.Join(err, os.Remove(path)) }()
	root := filepath.Join(r.dir, mountName)
	dev, err := attach(path)
	if err != nil {
		return err
	}
	merr := unix.Mount(dev.Name(), root, r.FS.Name, 0, r.FS.opts)
	if err := dev.Close(); err != nil {
		return err
	}
	if merr != nil {
		return fmt.Errorf("mount what a loss of power left: %w", merr)
	}
	err = fn(root)
	if e := unmount(root); e != nil {
		err = errors.Join(err, e, unix.Unmount(root, unix.MNT_DETACH))
	}
	return err
}

// copySparse copies a file and leaves holes where it has them.
func copySparse(dst, src string) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return fmt.Errorf("copy image: %w", err)
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return fmt.Errorf("copy image: %w", err)
	}
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("copy image: %w", err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if err := out.Truncate(st.Size()); err != nil {
		return fmt.Errorf("copy image: %w", err)
	}
	for off := int64(0); ; {
		data, err := unix.Seek(int(in.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("copy image: %w", err)
		}
		if off, err = unix.Seek(int(in.Fd()), data, unix.SEEK_HOLE); err != nil {
			return fmt.Errorf("copy image: %w", err)
		}
		if _, err := io.Copy(io.NewOffsetWriter(out, data), io.NewSectionReader(in, data, off-data)); err != nil {
			return fmt.Errorf("copy image: %w", err)
		}
	}
}
