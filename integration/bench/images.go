package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
)

// imagesTable compares with the tools that move images: the same archive, a
// fresh store each time. The first figure is when the command returns; plyfs has
// synced by then, the others have not, so there is one with sync as well.
func imagesTable() table {
	tools := func(s system) bool { return s.kind == program || s.Name == "plyfs" || s.base }
	return table{"images", "Images", []scene{
		{name: "archive", fixture: "image", once: true, unmounted: true, only: tools, steps: []step{
			{phases: []phase{
				{Name: "load", Title: "load an archive", Unit: duration, Ref: "podman", Goals: least(1.5, 0, 0)},
				{Name: "load-sync", Title: "the same, and sync", Unit: duration, Ref: "podman"},
			}, special: loadImage},
			{phases: []phase{{Name: "save", Title: "save it as an archive", Unit: duration, Ref: "podman"}}, special: saveImage},
		}},
	}}
}

// imageTool is how a program loads an image into a store in dir, and saves it.
type imageTool struct {
	load, save []string
}

func (e *env) imageTool(file, out string) imageTool {
	root, runroot, name := filepath.Join(e.rm.dir, "root"), filepath.Join(e.rm.dir, "run"), e.f.imageName()
	switch e.s.tool {
	case "podman":
		base := []string{"podman", "--root", root, "--runroot", runroot, "--storage-driver", "overlay"}
		return imageTool{
			load: slices.Concat(base, []string{"load", "-q", "-i", file}),
			save: slices.Concat(base, []string{"save", "-q", "--format", "docker-archive", "-o", out, name}),
		}
	case "skopeo":
		store := fmt.Sprintf("containers-storage:[overlay@%s+%s]%s", root, runroot, name)
		base := []string{"skopeo", "--insecure-policy", "copy", "-q"}
		return imageTool{
			load: slices.Concat(base, []string{"docker-archive:" + file, store}),
			save: slices.Concat(base, []string{store, "docker-archive:" + out + ":" + name}),
		}
	}
	base := []string{e.r.binary(e.s), "--root", root}
	return imageTool{
		load: slices.Concat(base, []string{"load", "-q", "-i", file}),
		save: slices.Concat(base, []string{"save", "-o", out, name}),
	}
}

func loadImage(ctx context.Context, e *env) ([]part, error) {
	file, err := e.f.imageArchive()
	if err != nil {
		return nil, err
	}
	// podman mounts its store on itself.
	e.undo = append(e.undo, func() error { return detachBelow(e.rm.dir) })
	t := e.imageTool(file, "")
	if err := e.settle(false); err != nil {
		return nil, err
	}
	c := start()
	if _, err := run(ctx, t.load...); err != nil {
		return nil, err
	}
	returned := c.part(1)
	err = e.p.sync()
	return []part{returned, c.part(1)}, err
}

func saveImage(ctx context.Context, e *env) ([]part, error) {
	out := filepath.Join(e.rm.dir, "saved.tar")
	t := e.imageTool("", out)
	if err := e.settle(false); err != nil {
		return nil, err
	}
	c := start()
	if _, err := run(ctx, t.save...); err != nil {
		return nil, err
	}
	p := c.part(1)
	if info, err := os.Stat(out); err != nil || info.Size() == 0 {
		return nil, errors.Join(fmt.Errorf("%s has saved nothing", e.s.Name), err)
	}
	return []part{p}, nil
}

// detachBelow unmounts what programs have left mounted in a directory.
func detachBelow(dir string) error {
	var err error
	for _, m := range slices.Backward(harness.MountsBelow(dir)) {
		err = errors.Join(err, unix.Unmount(m, unix.MNT_DETACH))
	}
	return err
}
