package mountd

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/holder"
	"github.com/plyfs/plyfs/unionfs/explain"
)

// LiveObject is what a mount itself shows under a path.
type LiveObject struct {
	Errno string `json:"errno,omitempty"` // nothing: the rest means nothing
	Ino   uint64 `json:"ino"`
	Dev   string `json:"dev"`
	Links uint32 `json:"links"`
	Kind  string `json:"kind"`
	Size  uint64 `json:"size"`
}

// LivePlace is a path in a live mount.
type LivePlace struct {
	Path  string // the whole, links of its directories resolved
	In    string // in the mount
	mount *mountinfo.Info
	table []*mountinfo.Info
}

// FindLive finds the mount that a path of this machine lies in. The path need not exist;
// its last component is not followed.
func FindLive(path string) (LivePlace, error) {
	var at LivePlace
	abs, err := filepath.Abs(path)
	if err != nil {
		return at, err
	}
	// As far as it exists, links are followed.
	dir, rest := filepath.Dir(abs), filepath.Base(abs)
	for {
		real, err := filepath.EvalSymlinks(dir)
		if err == nil {
			at.Path = filepath.Join(real, rest)
			dir = real
			break
		}
		if dir == "/" {
			return at, fmt.Errorf("find %q: %w", path, reason(err))
		}
		dir, rest = filepath.Dir(dir), filepath.Join(filepath.Base(dir), rest)
	}
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, at.Path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_MNT_ID, &st); err != nil {
		if err := unix.Statx(unix.AT_FDCWD, dir, 0, unix.STATX_MNT_ID, &st); err != nil {
			return at, fmt.Errorf("look at %q: %w", dir, err)
		}
	}
	if at.table, err = holder.MountTable(0); err != nil {
		return at, err
	}
	for _, m := range at.table {
		if uint64(m.ID) == st.Mnt_id {
			at.mount = m
		}
	}
	if at.mount == nil || !holder.IsOurs(at.mount) && at.mount.FSType != overlayType {
		what := "no mount that can be seen"
		if at.mount != nil {
			what = fmt.Sprintf("the %s mount on %q", at.mount.FSType, at.mount.Mountpoint)
		}
		return at, markedf(ErrUsage, "%q lies in %s, which is none of plyfs, nor of overlayfs: name an image or a container as well (plyfs explain NAME PATH), or the layers (-o lowerdir=…)",
			at.Path, what)
	}
	below := strings.TrimPrefix(strings.TrimPrefix(at.Path, at.mount.Mountpoint), "/")
	at.In = filepath.Join("/", at.mount.Root, below)
	return at, nil
}

// Request asks the service about the place.
func (at LivePlace) Request() ExplainRequest {
	return ExplainRequest{Target: Path(at.mount.Mountpoint), Major: at.mount.Major, Minor: at.mount.Minor, Path: Path(at.In)}
}

// Look says what the mount itself shows.
func (at LivePlace) Look() *LiveObject {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, at.Path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st); err != nil {
		o := &LiveObject{Errno: err.Error()}
		var errno unix.Errno
		if errors.As(err, &errno) {
			o.Errno = unix.ErrnoName(errno)
		}
		return o
	}
	return &LiveObject{
		Ino: st.Ino, Dev: fmt.Sprintf("%d:%d", st.Dev_major, st.Dev_minor), Links: st.Nlink, Size: st.Size, Kind: explain.Kind(uint32(st.Mode)),
	}
}

// overlayType is the type of kernel overlayfs, whose mounts can be explained as well: the
// rules are the same, and the mount table says what they are made of.
const overlayType = "overlay"

// options are the options of a mount of kernel overlayfs, as [ParseRawOptions] takes them.
func (at LivePlace) options() []string {
	var args []string
	for word := range strings.SplitSeq(at.mount.VFSOptions, ",") {
		key, val, ok := strings.Cut(word, "=")
		switch key {
		case "lowerdir", "lowerdir+", "upperdir", "workdir", "redirect_dir", "metacopy", "index":
			// Octal is the kernel's way to print special characters; what is left is how
			// the layers were named.
			val = octal.ReplaceAllStringFunc(val, func(s string) string {
				c, _ := strconv.ParseUint(s[1:], 8, 8)
				return string([]byte{byte(c)})
			})
			// Who has used mount(2) had to escape commas, who has used fsconfig(2) not.
			args = append(args, key+"="+comma.ReplaceAllString(val, `${1}\,`))
		case "userxattr":
			if !ok {
				args = append(args, key)
			}
		}
	}
	return args
}

var (
	octal = regexp.MustCompile(`\\[0-3][0-7]{2}`)
	comma = regexp.MustCompile(`(^|[^\\]),`)
)

// ExplainRaw explains a path in a mount that is none of a store, as far as its server, or
// the kernel, tells what it is made of.
func ExplainRaw(ctx context.Context, at LivePlace, r ExplainRequest) (Explanation, error) {
	x := Explanation{Target: r.Target}
	if at.mount.FSType == overlayType {
		o, err := ParseRawOptions(OverlayStyle, at.options())
		if err == nil {
			x, err = ExplainOptions(ctx, o, r)
			x.Target = r.Target
		}
		if err != nil {
			err = marked(layers.ErrUnsupported, fmt.Errorf("the overlayfs mount on %q, by the options in the mount table: %w", at.mount.Mountpoint, err))
		}
		return x, err
	}
	spec, err := holder.PublishedSpec(at.table, at.mount)
	if err != nil {
		return x, markedf(layers.ErrUnsupported, "the mount on %q is none of the store, and of which directories it is made cannot be found out: %w. "+
			"Name them: plyfs explain -o lowerdir=…,upperdir=…,workdir=… PATH, with the path in the mount", at.mount.Mountpoint, err)
	}
	x.ReadOnly = spec.ReadOnly
	return explainSpec(ctx, x, spec, rawLabels(spec.Lowers), r)
}

// ExplainOptions explains a path in the union that mount options describe, mounted or not.
func ExplainOptions(ctx context.Context, o *RawOptions, r ExplainRequest) (Explanation, error) {
	spec, err := o.union()
	if err != nil {
		return Explanation{}, marked(ErrUsage, err)
	}
	return explainSpec(ctx, Explanation{ReadOnly: spec.Upper.Path == ""}, spec, rawLabels(spec.Lowers), r)
}
