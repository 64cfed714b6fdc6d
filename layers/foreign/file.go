package foreign

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sort"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/layers/boundedjson"
)

// smallMax is the size of files that hold a name or a number.
const smallMax = 4 << 10

// readFile reads a file of at most limit bytes.
func (s *Store) readFile(name string, limit int64) ([]byte, error) {
	f, err := s.OpenFile(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if int64(len(raw)) > limit {
		return nil, fmt.Errorf("%s: %w: more than %d bytes", name, ErrUnsupported, limit)
	}
	if s.total += int64(len(raw)); s.total > s.limits.Total {
		return nil, fmt.Errorf("%s: %w: more than %d bytes that are no layers", name, ErrUnsupported, s.limits.Total)
	}
	return raw, nil
}

// readWord reads a file with one word in it.
func (s *Store) readWord(name string) (string, error) {
	raw, err := s.readFile(name, smallMax)
	return strings.TrimSpace(string(raw)), err
}

// readJSON reads a JSON document.
func (s *Store) readJSON(name string, limit int64, v any) error {
	raw, err := s.readFile(name, limit)
	if err != nil {
		return err
	}
	if err := decodeJSON(raw, s.limits.JSONDepth, v); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// decodeJSON decodes one JSON value of bounded depth.
func decodeJSON(raw []byte, depth int, v any) error {
	switch err := boundedjson.Decode(raw, depth, v); {
	case errors.Is(err, boundedjson.ErrDepth):
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	case err != nil:
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return nil
}

// list returns the names in a directory, sorted; none if there is no such directory.
func (s *Store) list(dir string) ([]string, error) {
	fd, err := fsat.OpenNoLinks(s.fd, dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if fsat.IsAbsent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	defer fsat.Close(fd)
	var names []string
	err = fsat.ReadDir(fd, func(e fsat.Dirent) error {
		if len(names) >= s.limits.Objects {
			return fmt.Errorf("%w: more than %d names", ErrUnsupported, s.limits.Objects)
		}
		names = append(names, strings.Clone(e.Name))
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	sort.Strings(names)
	return names, nil
}

func (s *Store) typeOf(name string) uint32 {
	fd, err := fsat.OpenNoLinks(s.fd, name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return 0
	}
	defer fsat.Close(fd)
	var st unix.Stat_t
	if fsat.Fstat(fd, &st) != nil {
		return 0
	}
	return st.Mode & unix.S_IFMT
}

func (s *Store) isDir(name string) bool  { return s.typeOf(name) == unix.S_IFDIR }
func (s *Store) isFile(name string) bool { return s.typeOf(name) == unix.S_IFREG }

func isAbsent(err error) bool { return errors.Is(err, fs.ErrNotExist) || fsat.IsAbsent(err) }

// isHex reports whether s is n hexadecimal digits in lower case.
func isHex(s string, n int) bool {
	if len(s) != n {
		return false
	}
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// isName reports whether s can be one component of a path of the store: what
// engines name directories by.
func isName(s string) bool {
	if s == "" || len(s) > 128 || s[0] == '.' {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '-', c == '.', c == '+':
		default:
			return false
		}
	}
	return true
}

// parseDigest checks a digest.
func parseDigest(text string) (digest.Digest, error) {
	d := digest.Digest(text)
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("%w: digest %q: %w", ErrDamaged, text, err)
	}
	if d.Algorithm() != digest.SHA256 {
		return "", fmt.Errorf("%w: digest %q: only sha256 is supported", ErrUnsupported, text)
	}
	return d, nil
}

// imageConfig is what has to be known of a config.
type imageConfig struct {
	RootFS struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
}

// diffIDs reads the layers out of a config.
func (s *Store) diffIDs(config []byte) ([]digest.Digest, error) {
	var c imageConfig
	if err := decodeJSON(config, s.limits.JSONDepth, &c); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if c.RootFS.Type != "" && c.RootFS.Type != "layers" {
		return nil, fmt.Errorf("config: %w: rootfs type %q, expected \"layers\"", ErrUnsupported, c.RootFS.Type)
	}
	if len(c.RootFS.DiffIDs) > s.limits.Layers {
		return nil, fmt.Errorf("config: %w: %d layers, the limit is %d", ErrUnsupported, len(c.RootFS.DiffIDs), s.limits.Layers)
	}
	out := make([]digest.Digest, 0, len(c.RootFS.DiffIDs))
	for i, text := range c.RootFS.DiffIDs {
		d, err := parseDigest(text)
		if err != nil {
			return nil, fmt.Errorf("config: diffID of layer %d: %w", i+1, err)
		}
		out = append(out, d)
	}
	return out, nil
}

// chainID is the identity of a layer on top of a parent.
func chainID(parent, diffID digest.Digest) digest.Digest {
	if parent == "" {
		return diffID
	}
	return digest.FromString(parent.String() + " " + diffID.String())
}
