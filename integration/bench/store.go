package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"time"

	"github.com/plyfs/plyfs/integration/archive"
)

// tarball is the layer as it lies in an image.
func (l layerSpec) tarball() ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range l {
		h := &tar.Header{Name: e.path, Mode: int64(e.mode), ModTime: time.Unix(stamp[1].Sec, 0), Format: tar.FormatPAX}
		switch e.kind {
		case aFile:
			h.Typeflag, h.Size = tar.TypeReg, e.size
		case aDir, anOpaqueDir:
			h.Typeflag, h.Name = tar.TypeDir, e.path+"/"
		case aSymlink:
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, e.target, 0o777
		case aHardlink:
			h.Typeflag, h.Linkname, h.Mode = tar.TypeLink, e.target, 0o644
		case aWhiteout:
			h.Typeflag, h.Name = tar.TypeReg, path.Dir(e.path)+"/.wh."+path.Base(e.path)
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("write %s: %w", e.path, err)
		}
		if e.kind == aFile {
			if err := e.content(w.Write); err != nil {
				return nil, fmt.Errorf("write %s: %w", e.path, err)
			}
		}
		if e.kind == anOpaqueDir {
			h := &tar.Header{Name: e.path + "/.wh..wh..opq", Mode: 0o644, Typeflag: tar.TypeReg, ModTime: h.ModTime, Format: tar.FormatPAX}
			if err := w.WriteHeader(h); err != nil {
				return nil, fmt.Errorf("write %s: %w", h.Name, err)
			}
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("end of layer: %w", err)
	}
	return b.Bytes(), nil
}

// imageName is how a fixture is called as an image.
func (f *fixture) imageName() string { return "localhost/bench-" + f.name + ":1" }

// imageArchive writes the fixture as an archive, as docker save does, once.
func (f *fixture) imageArchive() (string, error) {
	file := filepath.Join(f.dir, "image.tar")
	if f.archived {
		return file, nil
	}
	im := archive.Image{Ref: f.imageName()}
	for _, l := range f.spec {
		b, err := l.tarball()
		if err != nil {
			return "", err
		}
		im.Layers = append(im.Layers, b)
	}
	if err := im.Write(file, archive.Options{Format: "docker"}); err != nil {
		return "", fmt.Errorf("write image %s: %w", file, err)
	}
	f.archived = true
	return file, nil
}

// storeDir is the store of plyfs on a place.
func (p *place) storeDir() string { return filepath.Join(p.dir, "store") }

// verb runs a verb of plyfs on the store of the place.
func (e *env) verb(ctx context.Context, args ...string) error {
	_, err := run(ctx, append([]string{e.r.bin, "--root", e.p.storeDir()}, args...)...)
	return err
}

// makeContainer makes a container of the fixture for the room, and loads the
// image before if it is the first.
func (e *env) makeContainer(ctx context.Context) error {
	if !e.f.loaded {
		file, err := e.f.imageArchive()
		if err != nil {
			return err
		}
		if err := e.verb(ctx, "load", "-q", "-i", file); err != nil {
			return err
		}
		e.f.loaded = true
	}
	e.container = "room" + filepath.Base(e.rm.dir)
	if err := e.verb(ctx, "create", e.f.imageName(), e.container); err != nil {
		return err
	}
	e.undo = append(e.undo, func() error {
		// Also when the run has been interrupted.
		ctx, cancel := context.WithTimeout(context.Background(), unmountLimit)
		defer cancel()
		return e.verb(ctx, "rm", e.container)
	})
	return nil
}

// mountStored mounts a container.
func (e *env) mountStored(ctx context.Context) (*mounted, error) {
	if e.container == "" {
		if err := e.makeContainer(ctx); err != nil {
			return nil, err
		}
	}
	m := &mounted{system: e.s, target: e.rm.target}
	m.umount = func() error {
		ctx, cancel := context.WithTimeout(context.Background(), unmountLimit)
		defer cancel()
		return e.verb(ctx, "umount", m.target)
	}
	m.born()
	ctx, cancel := context.WithTimeout(ctx, mountLimit)
	defer cancel()
	if err := e.verb(ctx, "mount", e.container, m.target); err != nil {
		m.gone()
		return nil, err
	}
	if err := m.connection(); err != nil {
		return nil, errors.Join(err, m.unmount())
	}
	return m, nil
}
