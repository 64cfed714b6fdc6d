package oracle

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// GenOptions bound what the generators make.
type GenOptions struct {
	MaxLowers int // 0: 6
	Ops       int // 0: 300
	// Unprivileged leaves out what an ordinary user namespace cannot make:
	// device nodes, trusted.* and security.* attributes, other owners.
	Unprivileged bool
	// NoHardlinks leaves out hard links in lowers.
	NoHardlinks bool
	// NoLinks makes no hard links, in lowers or by operations. The kernel
	// treats names of one file as several where it has no file handles.
	NoLinks bool
	// PlainNames leaves out what means something in another dialect: names
	// that begin with .wh. or leave no room for it, and attributes of other
	// unions.
	PlainNames bool
	// XWhiteouts makes the whiteouts of lowers without devices, as on
	// another union.
	XWhiteouts bool
	// NoXWhiteouts makes only devices.
	NoXWhiteouts bool
	// NoXattrs leaves out extended attributes, ACLs and protections among them.
	NoXattrs bool
	// LikeNFS leaves out what NFS, or the test that plays it, does otherwise:
	// devices, operations for which it has no word, setuid and setgid. It comes with
	// NoXattrs.
	LikeNFS bool
	// LateOpen leaves out what shows that a file is not opened, and so not copied
	// up, before it is written to: files that are setuid or setgid, and showsOpen.
	LateOpen bool
}

// plainNames is small, so that layers and operations meet.
var plainNames = []Name{"a", "b", "c", "d", "e", "f"}

var oddNames = []Name{
	".wh.a", ".wh.b", ".wh..wh..opq", ".wh.", "sp ace", "new\nline", "back\\slash", "\xff\xfe", "\u00fcml\u00e4ut", "*", "-rf", "..a", "...",
	"comma,colon:", Name(strings.Repeat("x", 255)), Name(strings.Repeat("\u00e9", 127)), "#1", "work", ".fuse_hidden0001",
}

var dirModes = []uint32{0o755, 0o755, 0o755, 0o777, 0o1777, 0o2775, 0o700, 0o555, 0o3777, 0o750}

var fileModes = []uint32{0o644, 0o644, 0o600, 0o666, 0o755, 0o4755, 0o2755, 0o6755, 0o400, 0o000, 0o2644, 0o777}

var sizes = []int64{0, 0, 1, 10, 100, 4095, 4096, 4097, 10000, 70000, 140000}

// gen is a source of random layers and operations.
type gen struct {
	*rand.Rand
	o     GenOptions
	dirs  []Name // paths that are probably directories
	names []Name // paths that probably exist
	files []Name // regular files among them
	open  [slots]bool
}

func newGen(seed int64, stream uint64, o GenOptions) *gen {
	return &gen{Rand: rand.New(rand.NewPCG(uint64(seed), stream)), o: o}
}

func pick[T any](g *gen, list []T) T { return list[g.IntN(len(list))] }

func (g *gen) chance(percent int) bool { return g.IntN(100) < percent }

func (g *gen) name() Name {
	if g.chance(12) {
		n := pick(g, oddNames)
		if !g.o.PlainNames || !strings.HasPrefix(string(n), ".wh.") && len(".wh."+n) <= 255 {
			return n
		}
	}
	return pick(g, plainNames)
}

func (g *gen) owner() (uid, gid int) {
	if g.o.Unprivileged {
		return 0, 0
	}
	ids := []int{0, 0, 1000, 1000, 1001, 2000, 65534, 100000}
	return pick(g, ids), pick(g, ids)
}

// when is a time that no run can take for its own.
func (g *gen) when() string {
	switch g.IntN(8) {
	case 0:
		return "0.000000000"
	case 1:
		return fmt.Sprintf("%d.%09d", 4102444800+g.Int64N(1e9), g.IntN(1e9))
	}
	return fmt.Sprintf("%d.%09d", 1e9+g.Int64N(4e8), g.IntN(1e9))
}

func (g *gen) acl() string {
	perm := func() string {
		return pick(g, []string{"rwx", "rw-", "r-x", "r--", "---"})
	}
	// Without other users, ids of an ACL would not be mapped.
	if g.chance(30) || g.o.Unprivileged {
		return fmt.Sprintf("acl:u::%s,g::%s,o::%s", perm(), perm(), perm())
	}
	return fmt.Sprintf("acl:u::rwx,u:1000:%s,u:1001:%s,g::%s,g:2000:%s,m::%s,o::%s", perm(), perm(), perm(), perm(), perm(), perm())
}

// xattr is a random name with a value that suits it.
func (g *gen) xattr(dir bool) (name, value string) {
	n := g.IntN(14)
	if g.o.PlainNames && (n == 4 || n == 5) {
		n = 0
	}
	switch n {
	case 0, 1, 2:
		return "user.a", pick(g, []string{"1", "two", "", "rep:200"})
	case 3:
		return "user.b", fmt.Sprintf("rep:%d", pick(g, []int{1, 500, 2000}))
	case 4:
		return "user.overlay.opaque", "y"
	case 5:
		return "user.fuseoverlayfs.opaque", "y"
	case 6, 7:
		return "system.posix_acl_access", g.acl()
	case 8:
		if dir {
			return "system.posix_acl_default", g.acl()
		}
		return "user.containers.override_stat", "0:0:0755"
	case 9, 10:
		if g.o.Unprivileged || dir {
			return "user.c", "x"
		}
		return "security.capability", "cap:0x400"
	case 11:
		if g.o.Unprivileged {
			return "user.d", "x"
		}
		return "security.test", "s"
	default:
		if g.o.Unprivileged {
			return "user.e", "x"
		}
		return "trusted.t", "rep:20"
	}
}

// GenRecipe makes a random layer stack.
func GenRecipe(seed int64, o GenOptions) Recipe {
	if o.MaxLowers == 0 {
		o.MaxLowers = 6
	}
	g := newGen(seed, 1, o)
	var r Recipe
	n := 1 + g.IntN(o.MaxLowers)
	for range n {
		r.Lowers = append(r.Lowers, g.layer(25+g.IntN(30), false))
	}
	if g.chance(30) {
		r.Upper = g.layer(g.IntN(15), true)
	} else {
		r.Upper.Entries = []Entry{g.root()}
	}
	return r
}

func (g *gen) root() Entry {
	e := Entry{Kind: Dir, Mode: pick(g, []uint32{0o755, 0o777, 0o777, 0o1777}), Mtime: g.when()}
	if g.chance(20) {
		e.UID, e.GID = g.owner()
	}
	return e
}

// layer makes one layer of about n names.
func (g *gen) layer(n int, upper bool) Layer {
	root := g.root()
	l := Layer{Entries: []Entry{root}}
	have := map[Name]Kind{"": Dir}
	dirs := []Name{""}
	var files []Name
	for range n {
		d := pick(g, dirs)
		name := g.name()
		p := join(d, name)
		if _, ok := have[p]; ok || strings.Count(string(p), "/") > 3 {
			continue
		}
		e := Entry{Path: p, Mtime: g.when()}
		e.UID, e.GID = g.owner()
		switch k := g.IntN(100); {
		case k < 35:
			e.Kind = Dir
			if g.chance(15) && !g.o.LikeNFS {
				e.Kind = Opaque
			}
			e.Mode = pick(g, dirModes)
			dirs = append(dirs, p)
		case k < 62:
			e.Kind, e.Mode = File, g.plainMode(pick(g, fileModes))
			e.Size, e.Seed = pick(g, sizes), g.Int64N(1e6)
			if g.chance(10) {
				e.Size, e.Sparse = 300000, true
			}
			files = append(files, p)
		case k < 72:
			e.Kind, e.Target = Symlink, g.target()
		case k < 76 && len(files) > 0 && !g.o.NoHardlinks && !g.o.NoLinks:
			e = Entry{Path: p, Kind: Hardlink, Target: pick(g, files)}
		case k < 80:
			e.Kind, e.Mode = pick(g, []Kind{Fifo, Socket}), 0o644
		case k < 84 && !g.o.Unprivileged && !g.o.LikeNFS:
			e.Kind, e.Mode = Char, 0o666
			e.Rdev = pick(g, [][2]uint32{{1, 3}, {1, 5}, {511, 1}})
			if g.chance(20) {
				e.Kind, e.Rdev = Block, [2]uint32{511, 77}
			}
		case k < 96 && !g.o.Unprivileged:
			if upper && d != "" {
				// Where the whiteout hides nothing, overlayfs stumbles over
				// it: rmdir says ENOTEMPTY.
				continue
			}
			e = Entry{Path: p, Kind: Whiteout}
			// In an opaque directory the kernel hides them from lookup, but
			// lists them and refuses to remove the directory.
			if (g.chance(10) || g.o.XWhiteouts) && !upper && !g.o.NoXWhiteouts {
				if have[d] != Opaque {
					e = Entry{Path: p, Kind: XWhiteout, Mtime: g.when()}
				} else if g.o.XWhiteouts {
					continue
				}
			}
		default:
			e.Kind, e.Mode, e.Size, e.Seed = File, 0o644, 5, 1
			files = append(files, p)
		}
		if !g.o.NoXattrs && g.chance(25) && (e.Kind == Dir || e.Kind == Opaque || e.Kind == File) {
			k, v := g.xattr(e.Kind != File)
			e.Xattrs = map[string]string{k: v}
		}
		have[p] = e.Kind
		l.Entries = append(l.Entries, e)
	}
	return l
}

// target is where a random symbolic link leads.
func (g *gen) target() Name {
	switch g.IntN(8) {
	case 0:
		return "/" + g.name()
	case 1:
		return "../" + g.name()
	case 2:
		return Name("/" + strings.Repeat("y", 200))
	case 3:
		return "/"
	case 4:
		return "."
	}
	return g.name()
}

func join(d, n Name) Name {
	if d == "" {
		return n
	}
	return d + "/" + n
}

// paths are at most this many operations old.
const refresh = 15

// Generator makes operations one by one. It is told what exists and which
// operations worked, so that most of its operations have something to work on;
// what it makes is nevertheless a plain list that can be replayed.
type Generator struct {
	g     *gen
	left  int
	asked int // what left was when it was last told what exists
}

// onSlot are the operations on open files.
var onSlot = map[string]bool{
	"open": true, "close": true, "read": true, "pread": true, "write": true, "pwrite": true, "ftruncate": true, "fallocate": true,
	"seek": true, "copyrange": true, "fsync": true, "fdatasync": true, "fstat": true, "fchmod": true, "fchown": true, "futimens": true,
	"flock": true, "ofdlock": true, "mmapread": true, "mmapwrite": true, "linkfd": true, "readdirfd": true, "fsetxattr": true, "fgetxattr": true,
}

// NewGenerator makes o.Ops operations from a seed.
func NewGenerator(seed int64, o GenOptions) *Generator {
	if o.Ops == 0 {
		o.Ops = 300
	}
	return &Generator{g: newGen(seed, 2, o), left: o.Ops}
}

// WantsPaths says whether the next operation should be "paths".
func (n *Generator) WantsPaths() bool {
	return n.left > 0 && (n.left%refresh == 0 && n.left != n.asked || len(n.g.dirs) == 0)
}

// setPaths takes the answer to the operation "paths".
func (n *Generator) setPaths(out string) {
	g := n.g
	n.asked = n.left
	g.dirs, g.names, g.files = []Name{""}, nil, nil
	for line := range strings.Lines(out) {
		typ, quoted, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		p, err := unquoteName(quoted)
		if err != nil || p == "" {
			continue
		}
		g.names = append(g.names, p)
		switch typ {
		case "dir":
			g.dirs = append(g.dirs, p)
		case "file":
			g.files = append(g.files, p)
		}
	}
}

// Next makes an operation, or reports that there are no more.
func (n *Generator) Next() (Op, bool) {
	if n.left == 0 {
		return Op{}, false
	}
	n.left--
	op := n.g.op()
	for n.g.o.NoLinks && (op.Op == "link" || op.Op == "linkfd") || n.g.o.LateOpen && showsOpen(op) {
		op = n.g.op()
	}
	if !n.g.o.Unprivileged && n.g.chance(30) {
		op.User = 1 + n.g.IntN(2)
	}
	if onSlot[op.Op] {
		// Each process has its own slots; the second has the last ones.
		op.Agent = op.FD / 4
	} else if n.g.chance(20) {
		op.Agent = 1
	}
	return op, true
}

// showsOpen says whether an operation is one of those that LateOpen leaves out: of inode
// flags; with O_TRUNC, which put has without flags; removing an ACL that is not there,
// which works in the upper only.
func showsOpen(op Op) bool {
	return op.Op == "setflags" || strings.Contains(op.Flags, "TRUNC") || op.Op == "put" && op.Flags == "" ||
		op.Op == "removexattr" && strings.HasPrefix(op.Attr, "system.posix_acl_")
}

// Observe tells how an operation ended on the kernel.
func (n *Generator) Observe(op Op, r Result) {
	switch op.Op {
	case "paths":
		n.setPaths(r.Out)
	case "open":
		if r.Err == "" {
			n.g.open[op.FD] = true
		}
	case "close":
		n.g.open[op.FD] = false
	case "remount":
		n.g.open = [10]bool{}
	}
}
