package layers

import (
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata/chainindex"
)

// describe says what a path of a container is, and in what it differs from what its image
// has there.
func (d *differ) describe(out *Difference, n, below *vnode) error {
	var now, was *chainindex.Object
	var err error
	if n != nil {
		if now, err = d.union.object(n); err != nil {
			return err
		}
		out.Type, out.Size = typeName(now.Mode), contentSize(&now.Inode)
		out.LinkTo = d.linkTo(n, out.Path)
	}
	if below != nil {
		if was, err = d.lower.object(below); err != nil {
			return err
		}
		out.OldSize = contentSize(&was.Inode)
		if below.isDir() && (now == nil || !now.IsDir()) { // what was in it has no lines of its own
			if out.OldSize, err = d.lower.bytes(below); err != nil {
				return err
			}
		}
	}
	if now == nil {
		out.Type = typeName(was.Mode)
	}
	if now == nil || was == nil {
		return nil
	}
	var r reasons
	r.metadata(was, now, !now.IsDir()) // whose time says that there is something new in it
	if now.Type() == was.Type() && out.Type == TypeFile && now.Size == was.Size && now.Size > 0 {
		same, err := d.sameData(n, below)
		if err != nil {
			return err
		}
		if !same {
			r.add(WhyContent, "")
		}
	}
	out.Why, out.Details = r.why, r.details
	return nil
}

// linkTo is the name listed before that is the same file as n, "" if there is none.
func (d *differ) linkTo(n *vnode, path Path) Path {
	if n.isDir() || n.st.Nlink < 2 {
		return ""
	}
	at := [2]uint64{n.st.Dev, n.st.Ino}
	if d.names[at] == "" {
		d.names[at] = path
		return ""
	}
	return d.names[at]
}

// bytes is the size of the files in a directory, each once.
func (v *view) bytes(dir *vnode) (sum int64, err error) {
	seen := map[[2]uint64]bool{}
	err = v.walk(dir, func(n *vnode) error {
		at := [2]uint64{n.st.Dev, n.st.Ino}
		if n.st.Mode&unix.S_IFMT == unix.S_IFREG && (n.st.Nlink < 2 || !seen[at]) {
			seen[at] = true
			sum += n.st.Size
		}
		return v.ctx.Err()
	})
	return sum, err
}

func (d *differ) sameData(n, below *vnode) (bool, error) {
	open := d.union.open
	if n.meta {
		open = d.union.openData
	}
	a, err := open(n)
	if err != nil {
		return false, err
	}
	defer fsat.Close(a)
	b, err := d.lower.open(below)
	if err != nil {
		return false, err
	}
	defer fsat.Close(b)
	return sameFiles(d.ctx, a, b)
}

// object is what an index would say of n.
func (v *view) object(n *vnode) (*chainindex.Object, error) {
	fd, err := v.open(n)
	if err != nil {
		return nil, err
	}
	defer fsat.Close(fd)
	a, st, err := v.attrsOf(n, fd)
	if err != nil {
		return nil, err
	}
	o := &chainindex.Object{Inode: inodeOf(&st)}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		if o.Target, err = v.layers[n.layer].readlink(fd); err != nil {
			return nil, err
		}
	}
	for _, x := range a.xattrs {
		o.Xattrs = append(o.Xattrs, chainindex.Xattr{Name: x.name, Value: []byte(x.value)})
	}
	return o, nil
}
