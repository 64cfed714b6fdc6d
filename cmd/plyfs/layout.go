package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// writeLayout gives f a writer for an OCI archive and makes a directory of it. It
// appears under its name when it is complete.
func writeLayout(name string, f func(io.Writer) error) (err error) {
	if name == "" || name == "-" {
		return usagef("a layout is a directory: name it with -o DIR")
	}
	name = filepath.Clean(name)
	switch list, err := os.ReadDir(name); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case len(list) > 0:
		return usagef("%q is not empty: -o takes a new directory", name)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(name), ".plyfs-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.RemoveAll(tmp) // the first error counts
		}
	}()
	pr, pw := io.Pipe()
	go func() { pw.CloseWithError(f(pw)) }()
	err = unpackLayout(tmp, pr)
	_ = pr.CloseWithError(err) // never fails; f ends, if it has not
	if err != nil {
		return fmt.Errorf("write %q: %w", name, err)
	}
	if err := os.Chmod(tmp, 0o777&^umask()); err != nil {
		return err
	}
	return os.Rename(tmp, name)
}

// unpackLayout writes the members of an archive, files and directories, into a
// directory, and waits for the disk.
func unpackLayout(dir string, r io.Reader) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			_, err = io.Copy(io.Discard, r) // what f says at its end
			return err
		}
		if err != nil {
			return err
		}
		if h.Typeflag == tar.TypeDir {
			if err := root.Mkdir(strings.TrimSuffix(h.Name, "/"), 0o777); err != nil {
				return err
			}
			continue
		}
		f, err := root.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, tr)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			return err
		}
	}
}
