package layers

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// Check verifies the invariants of the store: the database against itself,
// the database against the disk, and, when deep, every layer against its
// diffID. With Repair it mends what can be mended without losing anything a
// user has made; a writable layer is never deleted. What remains then needs an
// image to be loaded again, and says which.
//
//	K1   structure of the database file          K2  the store is on one file system, the one it was made on
//	K3   chainIDs                                K4  parents, depth
//	K5   content directory of each layer         K6  sidecars equal rows
//	K7   directories of layers without a row     K8  stages without an owner
//	K9   indexes                                 K10 configs
//	K11  images' top layers                      K12 references
//	K13  containers' layers and directories      K14 writable layers without a row
//	K15  mounts whose process is gone            K16 work of dead processes (K17: leases)
//	K18  trash                                   K19 (deep) content gives the diffID
//	K20  (deep) objects are what the tar says    K21 (deep) sizes
//	K22  files that lost their content           K23 indexes of layers
//	K24  indexes of chains                       K25 free space (warnings)
//	K26  manifests and the build cache           K27 rows can be decoded
//	K28  adopted content is where and as it was  K29 (deep) no attributes of a foreign form
//	K30  kept blobs
func (s *Store) Check(ctx context.Context, o CheckOptions) (*Report, error) {
	r := &Report{Findings: []Finding{}}
	for pass := 1; ; pass++ {
		c := &checker{s: s, ctx: ctx, o: o, r: &Report{}}
		c.o.Deep = o.Deep && pass == 1 // a repair marks what is deep down
		if err := c.pass(); err != nil {
			return nil, err
		}
		r.merge(c.r, pass)
		if !o.Repair || pass == repairPasses || !slices.ContainsFunc(c.r.Findings, func(f Finding) bool { return f.Fixed }) {
			if o.Repair {
				s.purge(ctx, nil) // images that went
			}
			return r, nil
		}
	}
}

// repairPasses is how often a repair looks whether another one is needed, because the
// first one has brought something to light.
const repairPasses = 5

func (c *checker) pass() error {
	whole, err := c.file()
	if err != nil || !whole {
		return err
	}
	for _, f := range []func() error{
		c.badRows, c.rows, c.place, c.leftovers, c.strays, c.read, c.caches, c.containers, c.saved, c.blobs, c.chains, c.space,
	} {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

// merge adds the findings of one more pass of a repair: what is new, and what has become
// of those of the passes before.
func (r *Report) merge(next *Report, pass int) {
	r.Layers, r.Images, r.Containers = next.Layers, next.Images, next.Containers
	r.Bytes += next.Bytes
	now := map[string]bool{}
	key := func(f Finding) string { return f.Invariant + "\x00" + f.Object }
	before := map[string]int{}
	for i, f := range r.Findings {
		if f.Open() {
			before[key(f)] = i
		}
	}
	for _, f := range next.Findings {
		now[key(f)] = true
		if f.Fixed && pass == repairPasses {
			f.Fixed, f.Problem = false, f.Problem+"; it comes back after each repair"
		}
		if i, ok := before[key(f)]; ok && pass > 1 {
			r.Findings[i] = f
		} else {
			r.Findings = append(r.Findings, f)
		}
	}
	for k, i := range before {
		if f := &r.Findings[i]; !now[k] && !deepInvariant[f.Invariant] {
			f.Fixed, f.Repair = true, "none: it went with what else was repaired"
		}
	}
}

// deepInvariant are those that only a deep check looks at.
var deepInvariant = map[string]bool{"K19": true, "K20": true, "K21": true, "K29": true}

type checker struct {
	s   *Store
	ctx context.Context
	o   CheckOptions
	r   *Report
	e   *evidence // see evidence()

	layers []metadata.Layer
	cache  []metadata.Cache
	conts  []metadata.Container
	images map[digest.Digest][]string // chainID → images that need it
}

// found reports a finding and repairs it if it may and can.
func (c *checker) found(inv, object, problem, repair string, fix func() error) {
	f := Finding{Invariant: inv, Severity: SeverityError, Object: object, Problem: problem, Repair: repair}
	c.report(f, fix)
}

func (c *checker) warn(inv, object, problem, repair string, fix func() error) {
	c.report(Finding{Invariant: inv, Severity: SeverityWarning, Object: object, Problem: problem, Repair: repair}, fix)
}

func (c *checker) report(f Finding, fix func() error) {
	if c.o.Repair && fix != nil {
		if err := fix(); err != nil {
			f.Problem += "; repair failed: " + err.Error()
		} else {
			f.Fixed = true
		}
	}
	c.r.Findings = append(c.r.Findings, f)
}

// evidence is gathered once, when a repair first needs it.
func (c *checker) evidence() (*evidence, error) {
	if c.e == nil {
		e, err := c.s.gather(c.ctx, false)
		if err != nil {
			return nil, err
		}
		c.e = e
	}
	return c.e, nil
}

// file checks the database file. Only one that is whole is looked into.
func (c *checker) file() (whole bool, err error) {
	probs, err := c.s.db.CheckFile(c.ctx)
	if err != nil {
		return false, c.s.mapErr(err)
	}
	if len(probs) == 0 {
		return true, nil
	}
	text := probs[0].Text
	if n := len(probs) - 1; n > 0 {
		text += fmt.Sprintf(" (and %d problems more)", n)
	}
	f := Finding{Invariant: "K1", Severity: SeverityError, Object: dbName, Problem: text, Repair: "make it anew from what lies beside it (plyfs store rebuild)"}
	if !c.o.Repair {
		c.report(f, nil)
		return false, nil
	}
	rep, err := c.s.Rebuild(c.ctx)
	if err != nil {
		return false, fmt.Errorf("%w; what was wrong: %s", err, text)
	}
	f.Fixed, f.Repair = true, fmt.Sprintf("made anew from %s: %d images, %d layers, %d containers", strings.Join(rep.Sources, ", "), rep.Images, rep.Layers, rep.Containers)
	if rep.Kept != "" {
		f.Repair += "; the old one is " + rep.Kept
	}
	if len(rep.Doubtful) > 0 {
		f.Repair += "; these may have been removed before: " + strings.Join(rep.Doubtful, ", ")
	}
	c.report(f, nil)
	return true, nil
}

func (c *checker) read() error {
	return c.s.view(c.ctx, func(tx *metadata.Tx) (err error) {
		c.images = map[digest.Digest][]string{}
		var errs []error
		get := func(err error) { errs = append(errs, err) }
		c.layers, err = tx.Layers()
		get(err)
		c.cache, err = tx.Caches()
		get(err)
		c.conts, err = tx.Containers()
		get(err)
		images, err := tx.Images()
		get(err)
		c.r.Layers, c.r.Images, c.r.Containers = len(c.layers), len(images), len(c.conts)
		for _, i := range images {
			name := imageNames(tx, i.ID)
			ls, _ := tx.Chain(i.TopChain) // K4 and K11 tell
			for _, l := range ls {
				c.images[l.ChainID] = append(c.images[l.ChainID], name)
			}
		}
		return errors.Join(errs...)
	})
}

// place checks that the store is one file system, and the one it was made on.
func (c *checker) place() error {
	var root unix.Stat_t
	if err := fsat.Fstat(c.s.rootFd, &root); err != nil {
		return err
	}
	for _, d := range []string{layersName, stageName, rwName, trashName, chainsName, imagesName, copiesName} {
		var st unix.Stat_t
		if err := fsat.Stat(c.s.rootFd, d, &st); err == nil && st.Dev != root.Dev {
			c.found("K2", d, "it lies on another file system than the store: nothing can be moved into place", "none: unmount what is mounted there", nil)
		}
	}
	var was string
	if err := c.s.view(c.ctx, func(tx *metadata.Tx) error { was = tx.Place(); return nil }); err != nil {
		return err
	}
	if now := c.s.place(); was != "" && now != "" && was != now {
		c.warn("K2", dbName, "the store was made on another file system: it is a copy; indexes of layers are made anew as they are needed", "note the new place", func() error {
			return c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.SetPlace(now) })
		})
	}
	return nil
}

// leftovers looks for what dead processes have left.
func (c *checker) leftovers() error {
	var (
		ingests []metadata.Ingest
		leases  []metadata.Lease
		live    []metadata.Live
		trash   []metadata.Trash
	)
	err := c.s.view(c.ctx, func(tx *metadata.Tx) error {
		var errs [4]error
		ingests, errs[0] = tx.Ingests()
		leases, errs[1] = tx.Leases()
		live, errs[2] = tx.LiveMounts()
		trash, errs[3] = tx.TrashRows()
		return errors.Join(errs[:]...)
	})
	if err != nil {
		return err
	}
	sweep := func() error { return c.s.sweep(c.ctx) }
	for _, i := range ingests {
		if !alive(i.Owner, i.Started) {
			c.found("K16", "stage/"+i.ID, fmt.Sprintf("its owner, process %d, is gone", i.Owner.Pid), "remove", sweep)
		}
	}
	for _, l := range leases {
		if !alive(l.Owner, l.Started) {
			c.found("K16", "lease "+l.ID, fmt.Sprintf("its owner, process %d, is gone", l.Owner.Pid), "end it", sweep)
		}
	}
	for _, t := range trash {
		if !validTrash(t.Path) {
			c.found("K18", t.Path, "a trash row names a path that is none of ours", "forget it", func() error {
				return c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.DeleteTrash(t.Seq) })
			})
		}
	}
	for _, l := range live {
		if !liveOf(l).Alive() {
			c.found("K15", l.Target, fmt.Sprintf("process %d, which served the mount, is gone", l.Pid), "forget the mount", func() error {
				return c.s.update(c.ctx, func(tx *metadata.Tx) error { return tx.DeleteLive(l.BootID, l.Target) })
			})
		}
	}
	return nil
}
