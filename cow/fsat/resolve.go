package fsat

import (
	"os"
	"path/filepath"
	"strings"
)

// Resolver finds the real paths of directories that an operator has named. It remembers
// the directories that they lie in: hundreds of layers lie side by side.
type Resolver struct{ dirs map[string]string }

// Resolve returns the absolute path of p without symbolic links.
func (r *Resolver) Resolve(p string) (string, error) {
	if !filepath.IsAbs(p) {
		wd, err := os.Getwd()
		if err != nil {
			return "", err
		}
		p = wd + "/" + p // cleaning would resolve "link/.." wrongly
	}
	dir, base := filepath.Split(strings.TrimRight(p, "/"))
	if base == "" || base == "." || base == ".." {
		return filepath.EvalSymlinks(p)
	}
	real, ok := r.dirs[dir]
	if !ok {
		var err error
		if real, err = filepath.EvalSymlinks(dir); err != nil {
			return "", err
		}
		if r.dirs == nil {
			r.dirs = make(map[string]string)
		}
		r.dirs[dir] = real
	}
	full := filepath.Join(real, base)
	st, err := os.Lstat(full)
	if err != nil {
		return "", err
	}
	if st.Mode()&os.ModeSymlink != 0 {
		return filepath.EvalSymlinks(p)
	}
	return full, nil
}
