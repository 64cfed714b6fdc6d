package unionfs

import (
	"errors"
	"fmt"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/unionfs/ledger"
)

// past is what is being taken over from an earlier server.
type past struct {
	fs     *FS
	byID   map[uint64][]*ledger.Record
	byName map[pastName]*ledger.Record
	fds    map[uint64]int // not used yet
	done   map[uint64]bool
	paths  []*inode // referenced until all is done
}

type pastName struct {
	parent uint64
	name   string
}

func newPast(fs *FS, records *ledger.Past, fds map[uint64]int) *past {
	p := &past{
		fs: fs, fds: fds, byID: make(map[uint64][]*ledger.Record, len(records.Records)),
		byName: make(map[pastName]*ledger.Record, len(records.Records)), done: make(map[uint64]bool),
	}
	for i := range records.Records {
		p.add(&records.Records[i])
	}
	return p
}

func (p *past) add(r *ledger.Record) {
	p.byID[r.ID] = append(p.byID[r.ID], r)
	if r.Kind == ledger.Name {
		p.byName[pastName{r.Parent, r.Text}] = r
	}
}

// working are the names in the workdir that objects have.
func (p *past) working() map[string]bool {
	used := make(map[string]bool)
	for _, records := range p.byID {
		for _, r := range records {
			if r.Kind == ledger.Work {
				used[r.Text] = true
			}
		}
	}
	return used
}

// at returns the record of a name.
func (p *past) at(parent uint64, name string) *ledger.Record {
	if p == nil {
		return nil
	}
	return p.byName[pastName{parent, name}]
}

// drop forgets a record.
func (p *past) drop(r *ledger.Record) {
	p.fs.ledger.Drop(r.Ref)
	all := p.byID[r.ID]
	for i := range all {
		if all[i] == r {
			p.byID[r.ID] = append(all[:i:i], all[i+1:]...)
		}
	}
	if at := (pastName{r.Parent, r.Text}); p.byName[at] == r {
		delete(p.byName, at)
	}
}

// lose gives up an object that cannot be found.
func (p *past) lose(id uint64, err error) {
	say := p.fs.log.Warn
	if errors.Is(err, errNotKept) { // nobody has it open, or the kernel is about to forget it
		say = p.fs.log.Debug
	}
	say("an object that an earlier server has shown cannot be found", zap.Uint64("node", id), zap.Error(err))
	for len(p.byID[id]) > 0 {
		p.drop(p.byID[id][0])
	}
}

// before returns what an earlier server has said of a name: the object, referenced, if it
// is known by another name already, or else its record; neither if nothing.
func (fs *FS) before(dir *inode, f *found) (*ledger.Record, *inode, error) {
	r := fs.past.at(dir.id, f.name)
	if r == nil {
		return nil, nil, nil
	}
	if n := fs.nodes.get(r.ID); n != nil && n.tryRef() {
		n, err := fs.nameKnown(dir, f, n)
		return nil, n, err
	}
	return r, nil, nil
}

// inode returns the inode of a node id, which has a reference of the kernel's if it is in
// the ledger, and else one until all is done.
func (p *past) inode(id uint64) (*inode, error) {
	fs := p.fs
	records := p.byID[id]
	if n := fs.nodes.get(id); n != nil && (p.done[id] || len(records) == 0) {
		return n, nil
	}
	if len(records) == 0 {
		n, err := fs.natural(id, p.inode)
		if err == nil {
			p.paths = append(p.paths, n)
		}
		return n, err
	}
	if p.done[id] {
		return nil, errStale // it has not been found
	}
	p.done[id] = true
	var known *inode
	var errs error
	for _, r := range records {
		if r.Kind != ledger.Name {
			continue
		}
		dir, err := p.inode(r.Parent)
		if err == nil && !dir.isDir() {
			err = unix.ENOTDIR
		}
		var n *inode
		if err == nil {
			n, err = fs.child(dir, r.Text, nil)
		}
		switch {
		case err != nil:
			errs = errors.Join(errs, fmt.Errorf("name %q: %w", r.Text, err))
		case n.id != id:
			fs.unref(n, 1)
		case known == nil:
			known = n
			n.ownExtra().lookups.Add(1) // the reference is the kernel's
		default:
			fs.unref(n, 1)
		}
	}
	if known == nil {
		var err error
		if known, err = p.nameless(id, records); err != nil {
			p.done[id] = false // settleAll may bring it back
			return nil, errors.Join(errs, err)
		}
		known.ownExtra().lookups.Add(1)
	}
	known.ownExtra().copied.Store(true)
	return known, nil
}

// errNotKept says that the last server has not come to give the keeper a descriptor.
var errNotKept = errors.New("it has no name, and nobody has kept it")

// nameless makes the inode of an object that has lost its known names.
func (p *past) nameless(id uint64, records []*ledger.Record) (*inode, error) {
	fs := p.fs
	o := &orphan{fd: -1, node: id}
	var low lowerObj
	var ino uint64
	var indexed string
	for _, r := range records {
		ino = r.Ino
		switch r.Kind {
		case ledger.Loose:
			o.recs[0] = r.Ref
			if fd, ok := p.fds[id]; ok {
				o.fd = fd
				delete(p.fds, id)
			} else if r.Text != "" {
				var err error
				if o.fd, err = fs.removedDir(r.Text); err != nil {
					return nil, err
				}
			}
		case ledger.Work:
			o.name, o.recs[0] = r.Text, r.Ref
		case ledger.Index:
			indexed, o.recs[0] = r.Text, r.Ref
		case ledger.Lower:
			var err error
			if low, err = fs.lowers.lookup(r.Text); err == nil {
				_, err = fs.lowers.admit(low)
			}
			if err != nil {
				return nil, fmt.Errorf("%q in the lowers: %w", r.Text, err)
			}
			o.recs[1] = r.Ref
		}
	}
	dirfd, name := o.fd, ""
	var err error
	switch {
	case o.fd >= 0:
	case o.name != "":
		dirfd, name = fs.work.Fd(), o.name
	case indexed != "" && fs.index != nil && fs.index.has(indexed):
		dirfd, err = fs.index.dir()
		name = indexed
	case low != nil:
		n := newInode(id, ino, uint32(low.typ())<<12, low)
		if n.isDir() {
			n.dir.loaded, n.dir.dead = true, true
		}
		return n, p.adopt(n, o)
	default:
		return nil, errNotKept
	}
	var st unix.Stat_t
	if err == nil {
		err = fs.statUpper(dirfd, name, &st)
	}
	if err != nil {
		return nil, err
	}
	n := newInode(id, ino, st.Mode&unix.S_IFMT, low)
	n.upper, n.meta = true, low != nil && !n.isDir()
	if n.prot, err = fs.readProtection(dirfd, name); err != nil {
		return nil, err
	}
	if st.Nlink > 0 && !n.isDir() {
		n.ownExtra().upID = realID{st.Dev, st.Ino} // it may be met under a name that nobody knew
	}
	if indexed != "" {
		e := n.ownExtra()
		e.group = &linkGroup{index: indexed, links: fs.unionLinks(dirfd, indexed, &st, 0)}
	}
	if n.isDir() {
		n.dir.loaded, n.dir.dead = true, true
	}
	if o.fd >= 0 {
		fs.orphans.Add(1)
		fs.kept.add(id, o.fd, true)
	}
	return n, p.adopt(n, o)
}

// adopt registers an inode without a name.
func (p *past) adopt(n *inode, o *orphan) error {
	n.ownExtra().orphan = o
	n.told.Store(toldMany)
	if !p.fs.nodes.add(n) {
		return errStale
	}
	return nil
}

// reopen takes over how a file is open.
func (p *past) reopen(n *inode, o *ledger.OpenFile) {
	f := n.ioState()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.opens, f.rec = o.Opens, o.Ref
	f.passed, f.cached, f.backing = int(o.Opens.Passed.Load()), int(o.Opens.Cached.Load()), o.Opens.Backing.Load()
	f.open.Store(int32(f.passed + f.cached))
	f.pushed, f.stale = true, true
	n.ownExtra().writers.Store(o.Opens.Writers.Load())
	if f.backing != 0 {
		p.fs.backings.Add(1)
	}
	if e := n.ownExtra(); e.lookups.Load() == 0 { // its names are those of the lowers: the kernel has it all the same
		n.refs.Add(1)
		e.lookups.Add(1)
	}
}

// settleAll makes the records of names agree with the disk, where a request was under way.
// A directory may be found only when others have been settled.
func (p *past) settleAll(pending []ledger.Request) {
	for progress := true; progress && len(pending) > 0; {
		progress = false
		rest := pending[:0:0]
		for _, q := range pending {
			if p.settle(q) {
				progress = true
			} else {
				rest = append(rest, q)
			}
		}
		pending = rest
	}
}

// settle does so for one request, and reports whether its directories could be found.
// Requests that are long answered may be among them: what they say of names is heard only
// where records agree.
func (p *past) settle(q ledger.Request) bool {
	fs := p.fs
	lookAt := func(id uint64, name string) (dir *inode, f found, ok bool) {
		dir, err := p.inode(id)
		if err != nil || !dir.isDir() || fs.load(dir) != nil {
			return nil, found{}, false
		}
		return dir, dir.dir.find(name, false), true
	}
	dir, f, ok := lookAt(q.Dir, q.Name)
	if !ok {
		return false
	}
	was := p.at(q.Dir, q.Name)
	if q.Code == ledger.Remove {
		if was != nil && !f.visible() {
			p.drop(was)
		}
		return true
	}
	dir2, g, ok := lookAt(q.Dir2, q.Name2)
	if !ok {
		return false
	}
	switch {
	case q.Code == ledger.Swap:
		if fs.swapped(dir, dir2, &q) {
			p.rename(q.Node, q.Dir2, q.Name2, q.Dir, q.Name)
			p.rename(q.Node2, q.Dir, q.Name, q.Dir2, q.Name2)
		}
	case was != nil && was.ID == q.Node && !f.upper && g.upper:
		p.rename(q.Node, q.Dir2, q.Name2, q.Dir, q.Name)
	}
	return true
}

// rename makes a name the object's, in the place of another one.
func (p *past) rename(id, dir uint64, name string, oldDir uint64, old string) {
	var ino uint64
	for _, r := range append([]*ledger.Record(nil), p.byID[id]...) {
		ino = r.Ino
		if r.Kind == ledger.Name && (r.Parent == dir && r.Text == name || r.Parent == oldDir && r.Text == old) {
			p.drop(r)
		}
	}
	if r := p.at(dir, name); r != nil && r.ID != id {
		p.drop(r)
	}
	p.add(&ledger.Record{
		Ref: p.fs.ledger.Add(ledger.Name, id, dir, name, ino), Kind: ledger.Name, ID: id, Parent: dir, Text: name, Ino: ino,
	})
}

// swapped reports whether the exchange of two names has been done.
func (fs *FS) swapped(dir, dir2 *inode, q *ledger.Request) bool {
	return fs.numberOf(dir, q.Name) == q.Ino2 && fs.numberOf(dir2, q.Name2) == q.Ino
}

// numberOf is the inode number that an object has in the upper's own file system; 0: none.
func (fs *FS) numberOf(dir *inode, name string) uint64 {
	if !dir.inUpper() {
		return 0
	}
	h, err := fs.dirFd(dir)
	if err != nil {
		return 0
	}
	defer h.release()
	var st unix.Stat_t
	if fsat.Stat(h.fd, name, &st) != nil {
		return 0
	}
	return st.Ino
}
