package mountd

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs"
)

// RawOptions are the -o options of a raw mount, as parsed: paths are
// unescaped, but not resolved.
type RawOptions struct {
	Lowers      []string // topmost first
	Upper, Work string
	Dialect     string // of the lowers; "" = the default of the caller
	Redirect    string // of redirect_dir=; "" = by the dialect
	Metacopy    bool
	NoIndex     bool
	IO          unionfs.IO
	GoFuse      bool          // transport=gofuse
	Spin        time.Duration // see transport.ServeOptions
	Volatile    bool
	ReadOnly    bool
	AllowOther  bool
	NoSuid      bool
	NoDev       bool
	NoExec      bool
	NoAtime     bool
	StrictAtime bool
	NoDirAtime  bool
	Remount     bool
	// ForeignUpper is as in RawStyle.
	ForeignUpper bool
	FSName       string
	Subtype      string
	Debug        bool

	// Warnings are sentences about words that have no effect, one per word.
	Warnings []string
}

// RawStyle is how the binary was called.
type RawStyle struct {
	Dialect string // of the lowers when no option says so
	// ForeignUpper: the upper may be one of fuse-overlayfs. It is read in every
	// form, and if a volatile mount has left it without a sync, that is worth a
	// warning and no more.
	ForeignUpper bool
	FSName       string // first column of the mount table
	Subtype      string
	NoDev        bool
	NoAtime      bool
}

// The styles of raw mounts.
var (
	// OverlayStyle is `plyfs overlay` and mount.plyfs.
	OverlayStyle = RawStyle{FSName: "plyfs", Subtype: "plyfs"}
	// FuseOverlayfsStyle is what callers of fuse-overlayfs rely on: type
	// fuse.fuse-overlayfs, nodev and noatime, and lowers written by anybody.
	FuseOverlayfsStyle = RawStyle{
		Dialect: "auto", ForeignUpper: true, FSName: "fuse-overlayfs", Subtype: "fuse-overlayfs",
		NoDev: true, NoAtime: true,
	}
)

// ParseRawOptions reads -o options, each a comma separated list, in order. The
// words are those of kernel overlayfs and mount(8); as there, a backslash
// takes the special meaning from the comma, colon or backslash behind it.
func ParseRawOptions(style RawStyle, args []string) (*RawOptions, error) {
	o := &RawOptions{
		Dialect: style.Dialect, FSName: style.FSName, Subtype: style.Subtype,
		NoDev: style.NoDev, NoAtime: style.NoAtime, ForeignUpper: style.ForeignUpper,
		AllowOther: os.Geteuid() == 0,
	}
	warned := map[string]bool{}
	for _, arg := range args {
		for _, opt := range splitEscaped(arg, ',') {
			if opt == "" { // ",," and a trailing comma are common
				continue
			}
			key, val, hasVal := strings.Cut(opt, "=")
			known, err := o.set(key, val, hasVal)
			if err != nil {
				return nil, err
			}
			if !known && !warned[key] {
				warned[key] = true
				o.Warnings = append(o.Warnings, fmt.Sprintf("unknown mount option %q ignored", unescape(opt)))
			}
		}
	}
	return o, o.check()
}

// set obeys one option. val is still escaped.
func (o *RawOptions) set(key, val string, hasVal bool) (known bool, err error) {
	switch key {
	case "lowerdir", "lowerdir+", "upperdir", "workdir", "dialect", "fsname", "subtype":
		if !hasVal || val == "" {
			return true, fmt.Errorf("mount option %q needs a value: %s=…", key, key)
		}
	}
	switch key {
	case "lowerdir": // as in the kernel, a later one starts over
		o.Lowers = o.Lowers[:0]
		for _, l := range splitEscaped(val, ':') {
			if l == "" {
				return true, fmt.Errorf("empty path in lowerdir=%s: data-only layers (::) are not supported, and a colon at either end is a mistake", val)
			}
			o.Lowers = append(o.Lowers, unescape(l))
		}
	case "lowerdir+": // below all so far; colons have no meaning
		o.Lowers = append(o.Lowers, unescape(val))
	case "datadir+":
		return true, errors.New("mount option datadir+ is not supported: data-only layers need metacopy")
	case "upperdir":
		o.Upper = unescape(val)
	case "workdir":
		o.Work = unescape(val)
	case "dialect":
		if _, err := layer("", val); err != nil {
			return true, err
		}
		o.Dialect = val
	case "userxattr":
		o.Dialect = "userxattr"
	case "volatile":
		o.Volatile = true
	case "fsync":
		switch val {
		case "0", "volatile":
			o.Volatile = true
		case "1", "auto", "strict", "":
			o.Volatile = false
		default:
			return false, nil
		}
	case "ro", "rw":
		o.ReadOnly = key == "ro"
	case "nosuid", "suid":
		o.NoSuid = key == "nosuid"
	case "nodev", "dev":
		o.NoDev = key == "nodev"
	case "noexec", "exec":
		o.NoExec = key == "noexec"
	case "noatime", "atime", "relatime", "strictatime":
		o.NoAtime, o.StrictAtime = key == "noatime", key == "strictatime"
	case "nodiratime", "diratime":
		o.NoDirAtime = key == "nodiratime"
	case "remount":
		o.Remount = true
	case "allow_other":
		o.AllowOther = true
	case "fsname":
		o.FSName = unescape(val)
	case "subtype":
		o.Subtype = unescape(val)
	case "debug":
		o.Debug = true
	case "uidmapping", "gidmapping", "squash_to_root", "squash_to_uid", "squash_to_gid":
		// Ignoring these would show wrong owners, which is worse than no mount.
		return true, fmt.Errorf("mount option %q is not supported", key)
	case "default_permissions", "private", "defaults", "auto", "noauto", "user", "nofail", "_netdev", "comment":
		// Always in force here, or meant for somebody else.
	case "index", "metacopy":
		if val != "on" && val != "off" {
			return true, fmt.Errorf("mount option %s=%s: expected on or off", key, val)
		}
		if key == "index" {
			o.NoIndex = val == "off"
		} else {
			o.Metacopy = val == "on"
		}
	case "redirect_dir":
		switch val {
		case "on", "off", "follow", "nofollow":
			o.Redirect = val
		default:
			return true, fmt.Errorf("mount option %s=%s: expected on, off, follow or nofollow", key, val)
		}
	case "io":
		if err := o.IO.UnmarshalText([]byte(val)); err != nil {
			return true, fmt.Errorf("mount option io=%s: %w", val, err)
		}
	case "transport":
		if val != "own" && val != "gofuse" {
			return true, fmt.Errorf("mount option transport=%s: expected own or gofuse", val)
		}
		o.GoFuse = val == "gofuse"
	case "spin":
		us, err := strconv.ParseUint(val, 10, 16)
		if err != nil {
			return true, fmt.Errorf("mount option spin=%s: expected microseconds, 0 to 65535", val)
		}
		if o.Spin = time.Duration(us) * time.Microsecond; us == 0 {
			o.Spin = -1
		}
	case "nfs_export", "xino", "uuid":
		switch val {
		case "off", "null": // what we do anyway
		default:
			return false, nil
		}
	default:
		return strings.HasPrefix(key, "x-"), nil
	}
	return true, nil
}

// check reports what no set of directories could make valid.
func (o *RawOptions) check() error {
	switch {
	case o.Remount: // of a mount that knows its layers
		return nil
	case len(o.Lowers) == 0:
		return errors.New("no layer given: -o lowerdir=DIR[:DIR…] is needed")
	case o.Upper != "" && o.Work == "":
		return errors.New("upperdir= needs workdir=: an empty directory on the same file system as the upper directory")
	case o.Metacopy && o.Redirect != "" && o.Redirect != "on":
		return fmt.Errorf("metacopy=on and redirect_dir=%s contradict each other: "+
			"a file whose data stayed in a lower can be renamed only with redirect_dir=on", o.Redirect)
	}
	return nil
}

// LookAtUpper adds a warning if the upper is used although it may be incomplete.
func (o *RawOptions) LookAtUpper() {
	if !o.ForeignUpper || o.Work == "" {
		return
	}
	if err := unionfs.LeftUnsynced(o.Work); err != nil {
		o.Warnings = append(o.Warnings, fmt.Sprintf("upperdir %q is used all the same: %v", o.Upper, err))
	}
}

// Spec resolves every path against the working directory, checks the mount
// point and returns what to hand to package holder.
func (o *RawOptions) Spec(target string) (holder.Spec, error) {
	s := holder.Spec{
		IO: o.IO, GoFuse: o.GoFuse, Spin: o.Spin, Volatile: o.Volatile, FSName: o.FSName, Subtype: o.Subtype, ReadOnly: o.ReadOnly,
		AllowOther: o.AllowOther, NoSuid: o.NoSuid, NoDev: o.NoDev, NoExec: o.NoExec,
		NoAtime: o.NoAtime, StrictAtime: o.StrictAtime, NoDirAtime: o.NoDirAtime, Debug: o.Debug, Metacopy: o.Metacopy, NoIndex: o.NoIndex,
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
		if o.ForeignUpper {
			s.TakeUnsynced = true
			s.Upper.Dialect = s.Upper.Dialect.Mixed()
		}
		if s.Work, err = resolveDir(&resolver, "workdir", o.Work); err != nil {
			return s, err
		}
		if o.ReadOnly { // the upper is then one more lower, and nothing of it is touched
			s.Lowers = append([]unionfs.Layer{s.Upper}, s.Lowers...)
			s.Upper, s.Work = unionfs.Layer{}, ""
		}
	} else {
		s.ReadOnly = true
	}
	var err error
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

// splitEscaped splits at sep where no backslash stands before it. Backslashes
// stay, for the next level.
func splitEscaped(s string, sep byte) []string {
	var parts []string
	start := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case sep:
			parts = append(parts, s[start:i])
			start = i + 1
		}
	}
	return append(parts, s[start:])
}

// unescape removes one level of backslashes, as ovl_unescape() of the kernel.
func unescape(s string) string {
	if strings.IndexByte(s, '\\') < 0 {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' {
			if i++; i == len(s) {
				break
			}
		}
		b = append(b, s[i])
	}
	return string(b)
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
