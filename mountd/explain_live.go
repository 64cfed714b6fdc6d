package mountd

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
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
	if at.mount == nil || !holder.IsOurs(at.mount) {
		what := "no mount that can be seen"
		if at.mount != nil {
			what = fmt.Sprintf("the %s mount on %q", at.mount.FSType, at.mount.Mountpoint)
		}
		return at, markedf(ErrUsage, "%q lies in %s, which is none of plyfs: name an image or a container as well (plyfs explain NAME PATH), or the layers (-o lowerdir=…)",
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

// ExplainRaw explains a path in a mount that is none of a store, as far as its server tells
// what it is made of.
func ExplainRaw(ctx context.Context, at LivePlace, r ExplainRequest) (Explanation, error) {
	x := Explanation{Target: r.Target}
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
