package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// certDirs are the places where certificates of a registry may lie, each with one
// directory for a HOST[:PORT]. The first that has one for it counts.
func certDirs(env Env) []string {
	return []string{
		inHome(env.config(), "containers", "certs.d"),
		inHome(env.config(), "docker", "certs.d"),
		filepath.Join(env.Etc, "containers", "certs.d"),
		filepath.Join(env.Etc, "docker", "certs.d"),
	}
}

// readCerts takes NAME.crt for the certificate of an authority, NAME.cert and
// NAME.key for one of a client.
func (e *Endpoint) readCerts(env Env, notes *[]string) error {
	if strings.Contains(e.Host, "..") {
		return nil
	}
	for _, d := range certDirs(env) {
		if d == "" {
			continue
		}
		dir := filepath.Join(d, e.Host)
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			*notes = append(*notes, fmt.Sprintf("certificates of %s: %v", e.Host, err))
			continue
		}
		for _, entry := range entries {
			if err := e.readCert(dir, entry.Name()); errors.Is(err, fs.ErrPermission) {
				*notes = append(*notes, fmt.Sprintf("certificates of %s: %v", e.Host, err))
			} else if err != nil {
				return fmt.Errorf("certificates of %s: %w", e.Host, err)
			}
		}
		return nil
	}
	return nil
}

func (e *Endpoint) readCert(dir, name string) error {
	path := filepath.Join(dir, name)
	switch filepath.Ext(name) {
	case ".crt":
		raw, err := readFile(path)
		if err == nil && raw != nil {
			e.CAs = append(e.CAs, raw)
		}
		return err
	case ".cert":
		keyPath := strings.TrimSuffix(path, ".cert") + ".key"
		cert, err := readFile(path)
		if err != nil {
			return err
		}
		key, err := readFile(keyPath)
		if err == nil && key == nil {
			err = fmt.Errorf("%w: %s has no key: %s is missing", ErrInvalid, path, keyPath)
		}
		if err == nil {
			e.Certs = append(e.Certs, KeyPair{Cert: cert, Key: key})
		}
		return err
	}
	return nil
}
