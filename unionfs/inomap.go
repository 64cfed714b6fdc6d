package unionfs

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// inoMap makes one space of inode numbers out of those of several file
// systems. The first device seen keeps its numbers; others get their index in
// the top 16 bits, or a hash where the number itself is that large.
type inoMap struct {
	mu   sync.RWMutex
	devs map[uint64]uint64 // guarded by mu
}

func newInoMap() *inoMap { return &inoMap{devs: make(map[uint64]uint64)} }

func (m *inoMap) shown(dev, ino uint64) uint64 {
	const shift = 48
	m.mu.RLock()
	idx, ok := m.devs[dev]
	m.mu.RUnlock()
	if !ok {
		m.mu.Lock()
		if idx, ok = m.devs[dev]; !ok {
			idx = uint64(len(m.devs))
			m.devs[dev] = idx
		}
		m.mu.Unlock()
	}
	if idx == 0 {
		return ino
	}
	if ino>>shift != 0 {
		ino = (ino * 0x9e3779b97f4a7c15) >> (64 - shift)
	}
	return ino | idx<<shift
}

// factsAt looks at a name in a directory, or at the directory itself.
func (m *inoMap) factsAt(dirfd int, name string) (f lowerFacts, err error) {
	attributes, err := fsat.StatAttributes(dirfd, name, &f.st)
	if err != nil {
		return f, err
	}
	f.id = realID{f.st.Dev, f.st.Ino}
	f.ino, f.prot = m.shown(f.id.dev, f.id.ino), protectionOf(attributes)
	if f.st.Mode&unix.S_IFMT != unix.S_IFDIR {
		f.links = uint32(f.st.Nlink)
	}
	return f, nil
}
