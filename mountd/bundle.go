package mountd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/sandbox"
)

// BundleRequest asks for an OCI runtime bundle.
type BundleRequest struct {
	// Dir is made if it does not exist. Nobody else may enter it.
	Dir string
	// Mount names image or container; its Target is chosen here.
	Mount   MountRequest
	Process sandbox.ProcessOptions
	Options sandbox.BundleOptions
}

// BundleResult says what was made.
type BundleResult struct {
	Bundle Path        `json:"bundle"`
	Mount  MountResult `json:"mount"`
	// IDs says who exists in the bundle.
	IDs   sandbox.IDs `json:"ids"`
	Notes []string    `json:"notes,omitempty"`
}

const bundleConfig = "config.json"

// Bundle mounts an image or container on Dir/rootfs and writes Dir/config.json, for a
// runtime like runc or crun that the caller starts. What fails leaves no mount.
func Bundle(ctx context.Context, s Service, r BundleRequest) (res BundleResult, err error) {
	dir, err := bundleDir(r.Dir)
	if err != nil {
		return res, err
	}
	rootfs := filepath.Join(dir, "rootfs")
	if err := os.Mkdir(rootfs, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return res, err
	}
	r.Mount.Target = Path(rootfs)
	r.Mount.Suid, r.Mount.Dev = true, false
	if res.Mount, err = s.Mount(ctx, r.Mount); err != nil {
		return res, err
	}
	defer func() {
		if err == nil {
			return
		}
		_, uerr := s.Unmount(context.WithoutCancel(ctx), UnmountRequest{Name: Path(rootfs), Target: Path(rootfs)})
		err = errors.Join(err, uerr)
	}()
	img, err := ImageOf(ctx, s, res.Mount)
	if err != nil {
		return res, err
	}
	p, err := sandbox.ProcessOf(img.Config, r.Process)
	if err != nil {
		return res, err
	}
	fd, err := fsat.OpenTrusted(rootfs)
	if err != nil {
		return res, fmt.Errorf("open %q: %w", rootfs, err)
	}
	defer unix.Close(fd)
	user, err := sandbox.LookupUser(fd, p.User)
	if err != nil {
		return res, err
	}
	if len(p.Args) == 0 {
		p.Args = []string{sandbox.ShellOf(fd)}
	}
	o := r.Options
	o.ReadOnly = res.Mount.ReadOnly
	if o.Hostname == "" {
		o.Hostname = ShortName(res.Mount)
	}
	if res.Mount.Container != nil {
		o.ImageName = res.Mount.Container.ImageName
	}
	if err := writeConfig(filepath.Join(dir, bundleConfig), sandbox.RuntimeSpec(img, p, user, o)); err != nil {
		return res, err
	}
	res.Bundle, res.IDs, res.Notes = Path(dir), o.IDs, sandbox.Notes(img.Config)
	return res, nil
}

// bundleDir makes the directory of a bundle, or takes one that has none in it.
// Set-user-id programs of the image work in the mount, so nobody else may
// enter: whoever made the directory open to all is asked to decide.
func bundleDir(name string) (string, error) {
	if err := os.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("bundle: %w", err)
	}
	dir, err := resolveDir(new(fsat.Resolver), "bundle", name)
	if err != nil {
		return "", err
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return "", fmt.Errorf("bundle %q: %w", dir, err)
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return "", markedf(ErrUsage, "bundle %q: others may enter it, and set-user-id programs of the image would work for them: chmod 700, or choose a new directory", dir)
	}
	if _, err := os.Lstat(filepath.Join(dir, bundleConfig)); err == nil {
		return "", markedf(layers.ErrExists, "bundle %q has a %s already: choose a new directory, or remove it", dir, bundleConfig)
	}
	return dir, nil
}

// writeConfig writes a new file, or none.
func writeConfig(name string, spec any) error {
	b, err := json.MarshalIndent(spec, "", "  ")
	if err != nil {
		return err
	}
	tmp := name + ".new"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	if err := os.Rename(tmp, name); err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	return nil
}
