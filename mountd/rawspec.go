package mountd

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs"
	"github.com/plyfs/plyfs/whiteout/override"
)

// LookAtUpper adds a warning if the upper is used although it may be incomplete.
func (o *RawOptions) LookAtUpper() {
	if !o.Peer || o.Work == "" {
		return
	}
	if err := unionfs.LeftUnsynced(o.Work); err != nil {
		o.Warnings = append(o.Warnings, fmt.Sprintf("upperdir %q is used all the same: %v", o.Upper, err))
	}
}

// Spec resolves every path against the working directory, checks the mount
// point and returns what to hand to package holder.
func (o *RawOptions) Spec(target string) (holder.Spec, error) {
	if o.Peer && o.Upper != "" {
		_ = os.Mkdir(o.Work, 0o700) // what is wrong with it shows next
	}
	s, err := o.union()
	if err != nil {
		return s, err
	}
	if s.Target, err = resolveMountPoint(target); err != nil {
		return s, err
	}
	var dirs []string
	trusted := mayUseTrusted()
	for _, l := range s.Lowers {
		if trusted && isBelow(s.Target, l.Path) {
			continue // private copies of the layers' mounts do not show the mount
		}
		dirs = append(dirs, l.Path)
	}
	if s.Upper.Path != "" {
		dirs = append(dirs, s.Upper.Path, s.Work)
	}
	return s, checkOverlap(s.Target, dirs)
}

// union is Spec without a mount point.
func (o *RawOptions) union() (holder.Spec, error) {
	s := holder.Spec{
		IO: o.IO, GoFuse: o.GoFuse, Spin: o.Spin, Volatile: o.Volatile, FSName: o.FSName, Subtype: o.Subtype, ReadOnly: o.ReadOnly,
		AllowOther: o.AllowOther, NoSuid: o.NoSuid, NoDev: o.NoDev, NoExec: o.NoExec,
		NoAtime: o.NoAtime, StrictAtime: o.StrictAtime, NoDirAtime: o.NoDirAtime, Debug: o.Debug, Complete: o.Complete, TellLayers: o.TellLayers, Metacopy: o.Metacopy, NoIndex: o.NoIndex,
		Owners: o.Owners, Timeout: o.Timeout, StaticNlink: o.StaticNlink, CountSubdirs: o.Peer, ShortInodes: o.ShortInodes,
		NoXattrs: o.NoXattrs, NoACL: o.NoACL, NoDevices: o.NoDevices,
	}
	if o.Peer {
		s.Comm = o.Subtype // whoever looks for the process finds it
	}
	own := "overlay" // the dialect of what we write, and of lowers by default
	if !mayUseTrusted() || o.Dialect == "userxattr" {
		own = "userxattr"
	}
	s.Redirect = o.redirect(own)
	var resolver fsat.Resolver
	dialect := o.Dialect
	if dialect == "" {
		dialect = own
	}
	for _, p := range o.Lowers {
		dir, err := resolveDir(&resolver, "lowerdir", p)
		if err != nil {
			return s, err
		}
		l, err := layer(dir, dialect)
		if err != nil {
			return s, err
		}
		s.Lowers = append(s.Lowers, l)
	}
	if o.Upper != "" {
		dir, err := resolveDir(&resolver, "upperdir", o.Upper)
		if err != nil {
			return s, err
		}
		if s.Upper, err = layer(dir, own); err != nil {
			return s, err
		}
		if o.Peer {
			s.TakeUnsynced = true
			s.Upper.Dialect = s.Upper.Dialect.Mixed()
		}
		if s.Work, err = resolveDir(&resolver, "workdir", o.Work); err != nil {
			return s, err
		}
		s.Upper.Override = o.Override
		if o.ReadOnly { // the upper is then one more lower, and nothing of it is touched
			s.Lowers = append([]unionfs.Layer{s.Upper}, s.Lowers...)
			s.Upper, s.Work = unionfs.Layer{}, ""
		}
	} else {
		s.ReadOnly = true
	}
	return s, o.describe(&s)
}

// describe finds out in which form the layers say what their objects are, if that was
// asked for: those of fuse-overlayfs have the attribute on their root. And, where ids
// are mapped, in which of them a mount has done that already.
func (o *RawOptions) describe(s *holder.Spec) error {
	if o.Override != override.None {
		form, err := o.formOf(s.Upper.Path)
		if err != nil {
			return err
		}
		if s.Upper.Path != "" && form != override.None {
			s.Upper.Override = form // its older name, perhaps
		}
		for i := range s.Lowers {
			if s.Lowers[i].Override, err = o.formOf(s.Lowers[i].Path); err != nil {
				return err
			}
		}
	}
	if len(o.Owners.UIDs.Ranges)+len(o.Owners.GIDs.Ranges) == 0 {
		return nil
	}
	table, err := holder.MountTable(0)
	if err != nil {
		return err
	}
	idmapped := map[int]bool{}
	for _, m := range table {
		idmapped[m.ID] = slices.Contains(strings.Split(m.Options, ","), "idmapped")
	}
	for i := range s.Lowers {
		id, err := mountOf(s.Lowers[i].Path)
		if err != nil {
			return err
		}
		s.Lowers[i].Mapped = idmapped[id]
	}
	return nil
}

// formOf returns the form that the root of a layer is described in.
func (o *RawOptions) formOf(dir string) (override.Form, error) {
	forms := []override.Form{override.Containers, override.Fuse}
	if o.Override == override.Privileged {
		forms = []override.Form{override.Privileged}
	}
	if dir == "" {
		return override.None, nil
	}
	fd, err := fsat.OpenTrusted(dir)
	if err != nil {
		return override.None, fmt.Errorf("layer %q: %w", dir, err)
	}
	defer fsat.Close(fd)
	for _, f := range forms {
		switch _, found, err := f.Read(fd, ""); {
		case err != nil:
			return override.None, fmt.Errorf("layer %q: attribute %s: %w", dir, f.Attr(), err)
		case found:
			return f, nil
		}
	}
	return override.None, nil
}

// mountOf returns the number of the mount that a directory lies in.
func mountOf(dir string) (int, error) {
	fd, err := fsat.OpenTrusted(dir)
	if err != nil {
		return 0, fmt.Errorf("layer %q: %w", dir, err)
	}
	defer fsat.Close(fd)
	id, err := fsat.MountID(fd)
	if err != nil {
		return 0, fmt.Errorf("layer %q: %w", dir, err)
	}
	return int(id), nil
}

// redirect is what redirect_dir= means, or its absence. As in the kernel,
// attributes that only root can write are followed unless it is forbidden, and
// those that anybody can write only if it is asked for.
func (o *RawOptions) redirect(own string) unionfs.Redirect {
	switch {
	case o.Redirect == "on" || o.Metacopy:
		return unionfs.RedirectOn
	case o.Redirect == "follow" || o.Redirect != "nofollow" && own == "overlay":
		return unionfs.RedirectFollow
	}
	return unionfs.RedirectRefuse
}

// layer makes a layer of a path and the name of a dialect.
func layer(path, dialect string) (unionfs.Layer, error) {
	l := unionfs.Layer{Path: path}
	err := l.Dialect.UnmarshalText([]byte(dialect))
	return l, err
}

// resolveDir returns the absolute, symlink-free path of a directory. The
// lexical cleaning of filepath.Abs would resolve "link/.." wrongly.
func resolveDir(r *fsat.Resolver, what, p string) (string, error) {
	st, err := os.Stat(p)
	if err != nil {
		return "", fmt.Errorf("%s %q: %w", what, p, reason(err))
	}
	if !st.IsDir() {
		return "", fmt.Errorf("%s %q: %w", what, p, unix.ENOTDIR)
	}
	real, err := r.Resolve(p)
	if err != nil {
		return "", fmt.Errorf("%s %q: %w", what, p, reason(err))
	}
	return real, nil
}

// reason strips the operation and path that the caller's sentence has already.
func reason(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// initUserNS is the inode number of the first user namespace, fixed by the
// kernel (PROC_USER_INIT_INO).
const initUserNS = 0xEFFFFFFD

// mayUseTrusted reports whether trusted.* attributes are readable and writable.
func mayUseTrusted() bool {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/user", &st); err != nil || st.Ino != initUserNS {
		return false
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	return data[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
}
