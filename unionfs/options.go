package unionfs

import (
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"

	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/override"
)

// Layer is one read-only lower directory.
type Layer struct {
	// Path is the layer's directory. It is opened once, by New, and never
	// looked up again.
	Path string
	// Dialect says how whiteouts and opaque directories are written in it.
	Dialect whiteout.Dialect
	// Override is the form in which the layer's objects say what they are, if they
	// are something else than their files.
	Override override.Form
	// Mapped says that the mount the layer lies in maps ids already (an idmapped
	// mount): what its files show is what callers see.
	Mapped bool
	// Direct promises that no object of the layer has a redirect or metacopy
	// attribute, or inode flags, so that none need be looked for.
	Direct bool
}

// Redirect is what to make of directories that were renamed, and of files whose
// data lies elsewhere: their attributes are believed only where nobody but
// root, or the one who mounts, can have written them.
type Redirect uint8

const (
	// RedirectRefuse answers EPERM to whoever looks at such an object.
	RedirectRefuse Redirect = iota
	// RedirectFollow follows redirects and makes none: a directory that the
	// lowers have cannot be renamed (EXDEV).
	RedirectFollow
	// RedirectOn follows redirects and makes them.
	RedirectOn
)

var redirectNames = [...]string{RedirectRefuse: "nofollow", RedirectFollow: "follow", RedirectOn: "on"}

// String returns the word of the mount option redirect_dir.
func (r Redirect) String() string {
	if int(r) < len(redirectNames) {
		return redirectNames[r]
	}
	return fmt.Sprintf("redirect(%d)", uint8(r))
}

// MarshalText gives JSON the same words.
func (r Redirect) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText parses what MarshalText wrote.
func (r *Redirect) UnmarshalText(b []byte) error {
	for v, n := range redirectNames {
		if n == string(b) {
			*r = Redirect(v)
			return nil
		}
	}
	return fmt.Errorf("unknown redirect mode %q: expected on, follow or nofollow", b)
}

// Options describes one union. Lowers[0] is the topmost lower.
type Options struct {
	Lowers []Layer
	// Chain, if not empty, is the path of a chain index (metadata/chainindex) of
	// exactly these lowers, whose id is ChainID: the merged tree is then read from
	// it, and the lowers only where content is. Whoever names it vouches that the
	// lowers have not changed since it was made.
	Chain, ChainID string

	// Upper and Work are the writable directory and the scratch directory
	// on the same file system. Both empty: a read-only union.
	Upper, Work string
	// Override is the form in which the upper says what its objects are; None: what
	// their files are. It is given up, with a warning, where the file system cannot
	// hold the attribute.
	Override override.Form
	// Owners says how ids become those that the kernel is told.
	Owners Owners
	// UpperDialect is what the upper is read and written in. The zero value
	// is whiteout.Overlay.
	UpperDialect whiteout.Dialect

	// Redirect says whether directories that the lowers have can be renamed,
	// and whose word about such renames is believed.
	Redirect Redirect
	// Metacopy lets a change of a lower file's attributes copy no data up. It
	// needs RedirectOn, so that such a file can be renamed. Whatever it says,
	// layers whose redirects are not followed are not believed either.
	Metacopy bool
	// NoIndex gives up hard links of lower files when one of them is copied up.
	NoIndex bool

	// Atime is when reading changes access times in the upper; NoDirAtime
	// keeps those of directories.
	Atime      Atime
	NoDirAtime bool

	// Timeout is how long the kernel may keep names and attributes; 0: for ever,
	// negative: not at all. With one, changes of the lowers' files are seen, if
	// late; names that come and go in a directory that was read already are not.
	Timeout time.Duration
	// StaticNlink shows one link of every directory. CountSubdirs counts the
	// subdirectories of merged directories, which show one link otherwise.
	StaticNlink, CountSubdirs bool
	// ShortInodes shows inode numbers of 32 bits, which can be ambiguous.
	ShortInodes bool
	// NoXattrs refuses extended attributes, NoACL those that are ACLs.
	NoXattrs, NoACL bool
	// TellLayers gives files and directories attributes that say where they are: user.plyfs.layer and
	// user.plyfs.explain.
	TellLayers bool
	// NoDevices makes whiteouts that are markers, files of the name .wh.NAME, also where
	// devices can be made. The upper's dialect must read them.
	NoDevices bool

	// IO is how data reaches programs.
	IO IO
	// Complete has the kernel ask for everything, so that who watches misses nothing: it keeps
	// no names, attributes, links or data. IO and Timeout do not matter then.
	Complete bool

	// Volatile drops every durability promise: no fsync reaches the disk.
	Volatile bool
	// TakeUnsynced takes an upper that an earlier volatile mount has left
	// behind without a sync, which is refused otherwise.
	TakeUnsynced bool
	// Restarts counts the processes that have served this mount before: a union that goes
	// on with it, see FS.Resume, finds its upper and workdir in use.
	Restarts int
	// Mount is the FS.Mount of the first of them, nil if it had none.
	Mount *os.File

	// Logger receives what an operator must know. Nil means no logging.
	Logger *zap.Logger
}
