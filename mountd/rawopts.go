package mountd

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/plyfs/plyfs/unionfs"
	"github.com/plyfs/plyfs/whiteout/override"
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
	// Peer is as in RawStyle.
	Peer    bool
	FSName  string
	Subtype string
	Debug   bool
	// Complete is of trace=complete, TellLayers of layer_xattrs.
	Complete, TellLayers bool

	// Owners are of uidmapping=, gidmapping= and squash_to_….
	Owners unionfs.Owners
	// Override is of xattr_permissions=.
	Override override.Form
	// As in unionfs.Options.
	Timeout                                              time.Duration
	StaticNlink, ShortInodes, NoXattrs, NoACL, NoDevices bool

	// Warnings are sentences about words that have no effect, one per word.
	Warnings []string
}

// RawStyle is how the binary was called.
type RawStyle struct {
	Dialect string // of the lowers when no option says so
	// Peer: the caller takes us for fuse-overlayfs. The upper may be one of its own: it
	// is read in every form, and if a volatile mount has left it without a sync, that
	// is worth a warning and no more. What only kernel overlayfs understands is
	// ignored, with a warning; empty paths are skipped, a missing workdir is made.
	// Directories have as many links as they have subdirectories, and two.
	Peer    bool
	FSName  string // first column of the mount table
	Subtype string
	NoDev   bool
	NoAtime bool
}

// The styles of raw mounts.
var (
	// OverlayStyle is `plyfs overlay` and mount.plyfs.
	OverlayStyle = RawStyle{FSName: "plyfs", Subtype: "plyfs"}
	// FuseOverlayfsStyle is what callers of fuse-overlayfs rely on: type
	// fuse.fuse-overlayfs, nodev and noatime, and lowers written by anybody.
	FuseOverlayfsStyle = RawStyle{
		Dialect: "auto", Peer: true, FSName: "fuse-overlayfs", Subtype: "fuse-overlayfs",
		NoDev: true, NoAtime: true,
	}
	// MountProgramStyle is what an engine gets that has the binary as its mount_program
	// under another name: the same, but the mount table says whose mount it is.
	MountProgramStyle = RawStyle{
		Dialect: "auto", Peer: true, FSName: "plyfs", Subtype: "plyfs",
		NoDev: true, NoAtime: true,
	}
)

// noDevicesEnv is fuse-overlayfs' variable that keeps it from making devices 0:0.
const noDevicesEnv = "FUSE_OVERLAYFS_DISABLE_OVL_WHITEOUT"

// ParseRawOptions reads -o options, each a comma separated list, in order; a
// word @FILE stands for the options in a file. The words are those of kernel
// overlayfs, fuse-overlayfs and mount(8); as there, a backslash takes the special
// meaning from the comma, colon or backslash behind it.
func ParseRawOptions(style RawStyle, args []string) (*RawOptions, error) {
	o := &RawOptions{
		Dialect: style.Dialect, FSName: style.FSName, Subtype: style.Subtype,
		NoDev: style.NoDev, NoAtime: style.NoAtime, Peer: style.Peer,
		AllowOther: os.Geteuid() == 0,
	}
	_, o.NoDevices = os.LookupEnv(noDevicesEnv)
	o.NoDevices = o.NoDevices && o.Peer
	warned := map[string]bool{}
	word := func(opt string) error {
		key, val, hasVal := strings.Cut(opt, "=")
		known, err := o.set(key, val, hasVal)
		if err == nil && !known && !warned[key] {
			warned[key] = true
			o.Warnings = append(o.Warnings, fmt.Sprintf("unknown mount option %q ignored", unescape(opt)))
		}
		return err
	}
	for _, arg := range args {
		for _, opt := range splitOptions(arg) {
			var err error
			switch path, isFile := strings.CutPrefix(opt, "@"); {
			case opt == "": // ",," and a trailing comma are common
			case isFile:
				var lines []string
				lines, err = readOptionFile(unescape(path))
				for i := 0; i < len(lines) && err == nil; i++ {
					err = word(lines[i])
				}
			default:
				err = word(unquote(opt))
			}
			if err != nil {
				return nil, err
			}
		}
	}
	return o, o.check()
}

func (o *RawOptions) warnf(format string, args ...any) {
	o.Warnings = append(o.Warnings, fmt.Sprintf(format, args...))
}

// set obeys one option. val is still escaped.
func (o *RawOptions) set(key, val string, hasVal bool) (known bool, err error) {
	switch key {
	case "lowerdir", "lowerdir+", "upperdir", "workdir", "dialect", "fsname", "subtype", "uidmapping", "gidmapping":
		if !hasVal || val == "" {
			return true, fmt.Errorf("mount option %q needs a value: %s=…", key, key)
		}
	}
	for _, group := range []func(key, val string) (bool, error){o.setLayers, o.setMount, o.setOwners, o.setPeer, o.setUnion} {
		if known, err = group(key, val); known || err != nil {
			return true, err
		}
	}
	return strings.HasPrefix(key, "x-"), nil
}

// setLayers obeys an option that names directories.
func (o *RawOptions) setLayers(key, val string) (known bool, err error) {
	if o.Peer {
		val = onceEscaped(val)
	}
	switch key {
	case "lowerdir": // as in the kernel, a later one starts over
		o.Lowers = o.Lowers[:0]
		for _, l := range splitEscaped(val, ':') {
			switch {
			case l != "":
				o.Lowers = append(o.Lowers, unescape(l))
			case !o.Peer:
				return true, fmt.Errorf("empty path in lowerdir=%s: data-only layers (::) are not supported, and a colon at either end is a mistake", val)
			}
		}
	case "lowerdir+": // below all so far; colons have no meaning
		o.Lowers = append(o.Lowers, unescape(val))
	case "datadir+":
		return true, errors.New("mount option datadir+ is not supported: data-only layers need metacopy")
	case "upperdir":
		o.Upper = unescape(val)
	case "workdir":
		o.Work = unescape(val)
	case "plugins":
		return true, errors.New("mount option plugins= is not supported: all layers are directories")
	default:
		return false, nil
	}
	return true, nil
}

// setMount obeys an option about the mount itself.
func (o *RawOptions) setMount(key, val string) (known bool, err error) {
	switch key {
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
	case "allow_root":
		o.warnf("mount option allow_root is not supported: nobody but the user who mounts gets in")
	case "fsname":
		o.FSName = unescape(val)
	case "subtype":
		o.Subtype = unescape(val)
	case "debug":
		o.Debug = true
	case "context", "fscontext", "defcontext", "rootcontext":
		o.warnf("mount option %s= is not applied: the policy labels the mount", key)
	case "default_permissions", "private", "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group",
		"nofail", "_netdev", "comment", "async", "splice_read", "splice_write", "splice_move", "kernel_cache", "max_write":
		// Always in force here, or meant for somebody else.
	default:
		return false, nil
	}
	return true, nil
}

// setOwners obeys an option about who owns what.
func (o *RawOptions) setOwners(key, val string) (known bool, err error) {
	bad := func(err error) error { return fmt.Errorf("mount option %s=%s: %w", key, val, err) }
	switch key {
	case "uidmapping", "gidmapping":
		m, err := ParseIDs(val)
		if err != nil {
			return true, bad(err)
		}
		to := &o.Owners.UIDs
		if key == "gidmapping" {
			to = &o.Owners.GIDs
		}
		m.Squash = to.Squash
		*to = m
	case "squash_to_root":
		for _, m := range []*unionfs.IDMap{&o.Owners.UIDs, &o.Owners.GIDs} {
			if m.Squash == nil { // an id goes before root
				m.Squash = new(uint32)
			}
		}
	case "squash_to_uid", "squash_to_gid":
		id, err := parseSquash(val)
		if err != nil {
			return true, bad(err)
		}
		if id != nil && key == "squash_to_uid" {
			o.Owners.UIDs.Squash = id
		} else if id != nil {
			o.Owners.GIDs.Squash = id
		}
	case "xattr_permissions":
		switch val {
		case "0":
			o.Override = override.None
		case "1":
			o.Override = override.Privileged
		case "2":
			o.Override = override.Containers
		default:
			return true, bad(errors.New("expected 0, 1 or 2"))
		}
	default:
		return false, nil
	}
	return true, nil
}

// setPeer obeys an option of fuse-overlayfs that no group above has.
func (o *RawOptions) setPeer(key, val string) (known bool, err error) {
	switch key {
	case "fsync", "sync":
		switch val {
		case "0", "volatile":
			o.Volatile = true
		case "1", "auto", "strict", "":
			o.Volatile = false
		default:
			return false, nil
		}
	case "timeout":
		s, err := strconv.ParseFloat(val, 64)
		if err != nil || math.IsNaN(s) || s < 0 {
			return true, fmt.Errorf("mount option timeout=%s: expected seconds", val)
		}
		const forever = 1e9 // seconds; fuse-overlayfs' default
		switch {
		case s >= forever:
			o.Timeout = 0
		case s < 1e-9:
			o.Timeout = -1
		default:
			o.Timeout = time.Duration(s * float64(time.Second))
		}
	case "static_nlink":
		o.StaticNlink = true
	case "ino32_t":
		o.ShortInodes = true
	case "noxattrs":
		o.NoXattrs = val != "0"
	case "noacl":
		o.NoACL = true
	case "threaded", "writeback", "fast_ino", "fast_ino_check", "xino":
		// There are always threads, never data held back, and inode numbers are
		// right without being asked for.
	default:
		return false, nil
	}
	return true, nil
}

// setUnion obeys an option of kernel overlayfs, or of ours, about how the union works.
func (o *RawOptions) setUnion(key, val string) (known bool, err error) {
	switch key {
	case "dialect":
		if _, err := layer("", val); err != nil {
			return true, err
		}
		o.Dialect = val
	case "userxattr":
		if o.Peer { // which reads every form
			return false, nil
		}
		o.Dialect = "userxattr"
	case "volatile":
		o.Volatile = true
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
	case "layer_xattrs":
		o.TellLayers = true
	case "trace":
		if val != "complete" && val != "partial" {
			return true, fmt.Errorf("mount option trace=%s: expected complete or partial", val)
		}
		o.Complete = val == "complete"
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
	case "nfs_export", "uuid":
		return val == "off" || val == "null", nil // what we do anyway
	default:
		return false, nil
	}
	return true, nil
}

// check reports what no set of directories could make valid.
func (o *RawOptions) check() error {
	if o.Peer && o.Metacopy && o.Redirect != "on" {
		// Callers pass on what is meant for the kernel. Who reads such an upper
		// afterwards must know of it.
		o.Metacopy = false
		o.warnf("mount option metacopy=on ignored: without redirect_dir=on no file is copied in part")
	}
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
	case o.Timeout != 0 && o.IO == unionfs.IONoOpen:
		return errors.New("timeout= and io=noopen contradict each other: a file that is opened without asking is never looked at again")
	case o.Complete && (o.IO != unionfs.IOAuto && o.IO != unionfs.IOCache || o.GoFuse):
		return errors.New("trace=complete does not go with io= or transport=: every read and write is to be asked for")
	case o.Override == override.Privileged && !mayUseTrusted():
		return errors.New("xattr_permissions=1 is for root: use xattr_permissions=2")
	}
	return nil
}
