package mountd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
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
	In    string // in the mount, links not resolved
	below string // In as seen from the mount point, which may show a part only
	mount *mountinfo.Info
	table []*mountinfo.Info
}

// FindLive finds the mount that a path of this machine lies in. Symbolic links are followed
// until it is reached; those in it lead to where they lead for programs whose root it is.
// The path need not exist.
func FindLive(path string) (LivePlace, error) {
	return findLive(path, "name an image or a container as well (plyfs explain NAME PATH), or the layers (-o lowerdir=…)")
}

// findLive also says what to do with a path that lies in no such mount.
func findLive(path, advice string) (LivePlace, error) {
	var at LivePlace
	abs, err := filepath.Abs(path)
	if err != nil {
		return at, err
	}
	if at.table, err = holder.MountTable(0); err != nil {
		return at, err
	}
	cur, rest := "/", strings.FieldsFunc(abs, func(r rune) bool { return r == '/' })
	for at.find(cur); !at.explainable() && len(rest) > 0; at.find(cur) {
		next := filepath.Join(cur, rest[0])
		st, err := os.Lstat(next)
		if err != nil {
			break // it does not exist, and is in none of our mounts
		}
		if st.Mode()&os.ModeSymlink != 0 && len(rest) > 1 {
			if next, err = filepath.EvalSymlinks(next); err != nil {
				break
			}
		}
		cur, rest = next, rest[1:]
	}
	full := filepath.Join(cur, filepath.Join(rest...))
	for in := at.mount; in != nil; { // another may lie in it, and in that; later ones are on top
		at.mount, in = in, nil
		for _, m := range at.table {
			if m.Parent == at.mount.ID && m.ID != m.Parent && (m.Mountpoint == full || isBelow(full, m.Mountpoint)) {
				in = m
			}
		}
	}
	if !at.explainable() {
		what := "no mount that can be seen"
		if at.mount != nil {
			what = fmt.Sprintf("the %s mount on %q", at.mount.FSType, at.mount.Mountpoint)
		}
		return at, markedf(ErrUsage, "%q lies in %s, which is none of plyfs, nor of overlayfs: %s",
			full, what, advice)
	}
	at.below = strings.Trim(strings.TrimPrefix(full, at.mount.Mountpoint), "/")
	at.In = filepath.Join("/", at.mount.Root, at.below)
	return at, nil
}

// find sets the mount that a path lies in, which is no link.
func (at *LivePlace) find(path string) {
	at.mount = nil
	var st unix.Statx_t
	if unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_MNT_ID, &st) != nil {
		return
	}
	for _, m := range at.table {
		if uint64(m.ID) == st.Mnt_id {
			at.mount = m
		}
	}
}

// explainable reports whether the mount is one whose layers can be known.
func (at *LivePlace) explainable() bool {
	return at.mount != nil && (holder.IsOurs(at.mount) || at.mount.FSType == overlayType)
}

// Request asks the service about the place.
func (at LivePlace) Request() ExplainRequest {
	return ExplainRequest{Target: Path(at.mount.Mountpoint), Major: at.mount.Major, Minor: at.mount.Minor, Path: Path(at.In)}
}

// Look says what the mount itself shows.
func (at LivePlace) Look() *LiveObject {
	var st unix.Statx_t
	fd, err := fsat.OpenTrusted(at.mount.Mountpoint)
	if err == nil && at.below != "" {
		root := fd
		fd, err = fsat.OpenInRoot(root, at.below, unix.O_PATH|unix.O_NOFOLLOW)
		fsat.Close(root)
	}
	if err == nil {
		err = fsat.Statx(fd, "", unix.STATX_BASIC_STATS, &st)
		fsat.Close(fd)
	}
	if err != nil {
		o := &LiveObject{Errno: err.Error()}
		if errno, ok := errors.AsType[unix.Errno](err); ok {
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
	spec, err := at.spec(ctx)
	if err != nil {
		return x, markedf(layers.ErrUnsupported, "the mount on %q is none of the store, and of which directories it is made cannot be found out: %w. "+
			"Name them: plyfs explain -o lowerdir=…,upperdir=…,workdir=… PATH, with the path in the mount", at.mount.Mountpoint, err)
	}
	x.ReadOnly = spec.ReadOnly
	return explainSpec(ctx, x, spec, rawLabels(spec.Lowers), r)
}

// specTimeout is how long the server of a mount may take to say what it is made of.
const specTimeout = 5 * time.Second

// spec asks the server of a mount what it is made of.
func (at LivePlace) spec(ctx context.Context) (holder.Spec, error) {
	s, err := at.server()
	if err != nil {
		return holder.Spec{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, specTimeout)
	defer cancel()
	a, err := holder.AskControl(ctx, s.RunDir, holder.Control{Describe: true})
	if err == nil && a.Mount == nil {
		err = errors.New("its server does not say it")
	}
	if err == nil {
		err = a.Mount.Spec.Validate()
	}
	if err != nil {
		return holder.Spec{}, err
	}
	return a.Mount.Spec, nil
}

// ExplainOptions explains a path in the union that mount options describe, mounted or not.
func ExplainOptions(ctx context.Context, o *RawOptions, r ExplainRequest) (Explanation, error) {
	spec, err := o.union()
	if err != nil {
		return Explanation{}, marked(ErrUsage, err)
	}
	return explainSpec(ctx, Explanation{ReadOnly: spec.Upper.Path == ""}, spec, rawLabels(spec.Lowers), r)
}
