package layers

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/whiteout"
)

var containerName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)

// CreateContainer makes a writable layer on an image, with the init layer of
// the image between them. An empty name is generated.
func (s *Store) CreateContainer(ctx context.Context, imageRef, name string) (_ *Container, err error) {
	if name != "" && !containerName.MatchString(name) {
		return nil, fmt.Errorf("%w: container name %q: letters, digits, '_', '.' and '-' only, 128 at most, a letter or digit first", ErrInvalid, name)
	}
	if s.powers.guest != nil {
		return nil, s.powers.guest
	}
	if err := s.sweep(ctx); err != nil {
		return nil, err
	}
	lease, err := s.newLease(ctx)
	if err != nil {
		return nil, err
	}
	defer s.dropLease(lease)

	img, err := s.leaseImage(ctx, lease, imageRef, name)
	if err != nil {
		return nil, err
	}
	id := make([]byte, 32)
	_, _ = rand.Read(id) // never fails (crypto/rand)
	return s.createContainer(ctx, lease, img.ID, img.ChainID, metadata.Container{ID: hex.EncodeToString(id), Name: name, ImageName: imageRef})
}

// createContainer makes the container of a row that has an ID and says what it is
// called. top is the chain of its image, or one on top of that, which the lease keeps.
func (s *Store) createContainer(ctx context.Context, lease string, imageID, top digest.Digest, row metadata.Container) (*Container, error) {
	owner, err := self()
	if err != nil {
		return nil, err
	}
	initLayer, err := s.ensureInit(ctx, lease, top)
	if err != nil {
		return nil, fmt.Errorf("init layer: %w", err)
	}
	name := row.Name
	row.MountID, row.Chain, row.Top, row.Init = newID(), initLayer.ChainID, top, initLayer.CacheID
	row.ImageID, row.Dialect = imageID, s.powers.upperDialect().String()
	row.State, row.Owner, row.Created = metadata.Creating, owner, time.Now().UTC()
	for try := 0; ; try++ {
		if name == "" {
			row.Name = randomName(try)
		}
		err = s.update(ctx, func(tx *metadata.Tx) error { return tx.AddContainer(row) })
		if name != "" || !errors.Is(err, ErrExists) || try > 100 {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	if err := s.makeRW(ctx, row); err != nil {
		s.abortContainer(row)
		return nil, fmt.Errorf("writable layer: %w", err)
	}
	err = s.update(ctx, func(tx *metadata.Tx) error { return tx.SetContainerState(row.ID, metadata.Ready) })
	if err != nil {
		s.abortContainer(row)
		return nil, err
	}
	return s.Container(ctx, row.ID)
}

// leaseImage resolves an image and keeps its layers.
func (s *Store) leaseImage(ctx context.Context, lease, ref, name string) (img Image, err error) {
	err = s.update(ctx, func(tx *metadata.Tx) error {
		if id, taken := tx.ContainerByName(name); taken {
			return sentinel{fmt.Errorf("container name %q is taken by container %.12s; remove it or choose another name", name, id), ErrExists}
		}
		r, err := resolve(tx, ref)
		if err != nil {
			return err
		}
		if img, _, _, err = image(tx, r.id); err != nil || img.ChainID == "" {
			return err
		}
		return tx.LeaseLayer(lease, img.ChainID)
	})
	return img, err
}

// makeRW makes rw/<mountID>/{upper,work}. The upper's root shows as the root
// of the mount, so it takes the attributes of the root below it.
func (s *Store) makeRW(ctx context.Context, c metadata.Container) error {
	if err := s.fault("after-container-row"); err != nil {
		return err
	}
	stack, err := s.stackOf(ctx, c.Chain)
	if err != nil {
		return err
	}
	v, err := openView(ctx, stack)
	if err != nil {
		return err
	}
	defer v.Close()
	root := &attrs{mode: 0o755, mtime: time.Now()}
	below, err := v.root()
	if err == nil && below != nil {
		root, err = v.attrs(below)
	}
	if err != nil {
		return err
	}
	if err := fsat.Mkdir(s.stageFd, c.MountID, 0o700); err != nil {
		return err
	}
	dir, err := fsat.OpenName(s.stageFd, c.MountID, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer fsat.Close(dir)
	for _, n := range []string{upperName, workName} {
		if err := fsat.Mkdir(dir, n, 0o700); err != nil {
			return err
		}
	}
	upper, err := fsat.OpenName(dir, upperName, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer fsat.Close(upper)
	if _, err := s.powers.apply(upper, "", kindDir, root, nil); err != nil {
		return fmt.Errorf("attributes of the root directory: %w", err)
	}
	if err := s.writeContainerDoc(ctx, dir, c); err != nil {
		return err
	}
	for _, fd := range []int{upper, dir} {
		if err := unix.Fsync(fd); err != nil {
			return err
		}
	}
	if err := fsat.Rename(s.stageFd, c.MountID, s.rwFd, c.MountID, unix.RENAME_NOREPLACE); err != nil {
		return err
	}
	if err := unix.Fsync(s.rwFd); err != nil {
		return err
	}
	return s.fault("after-container-rename")
}

func (s *Store) abortContainer(c metadata.Container) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var junk []metadata.Trash
	err := s.update(ctx, func(tx *metadata.Tx) (err error) {
		junk, err = s.sweepTx(tx, nil, []string{}, []string{c.ID})
		return err
	})
	if err == nil {
		s.purge(ctx, junk)
	}
}

func (s *Store) container(tx *metadata.Tx, c metadata.Container) (Container, error) {
	if !validID(c.MountID) {
		return Container{}, fmt.Errorf("container %q: %w: the database names the directory %q", c.Name, ErrCorrupt, c.MountID)
	}
	out := Container{
		ID: c.ID, Name: c.Name, MountID: c.MountID, InitID: c.Init, ImageID: c.ImageID, ImageName: c.ImageName,
		ChainID: c.Chain, Created: c.Created, State: c.State, Upper: filepath.Join(s.root, rwName, c.MountID, upperName),
	}
	live, err := tx.LiveMounts()
	if err != nil {
		return out, err
	}
	for _, l := range live {
		if m := liveOf(l); l.ContainerID == c.ID && m.Alive() {
			out.Live = append(out.Live, m)
		}
	}
	return out, nil
}

// findContainer finds a container by name, ID or unique ID prefix.
func findContainer(tx *metadata.Tx, nameOrID string) (metadata.Container, error) {
	if id, ok := tx.ContainerByName(nameOrID); ok {
		return tx.Container(id)
	}
	all, err := tx.Containers()
	if err != nil {
		return metadata.Container{}, err
	}
	var found []metadata.Container
	for _, c := range all {
		if nameOrID != "" && strings.HasPrefix(c.ID, nameOrID) {
			found = append(found, c)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return metadata.Container{}, fmt.Errorf("container %q: %w; see ps for what there is", nameOrID, ErrNotFound)
	}
	return metadata.Container{}, fmt.Errorf("%w: container ID %q is ambiguous: %d containers begin with it", ErrInvalid, nameOrID, len(found))
}

// Container finds a container by name, ID or unique ID prefix.
func (s *Store) Container(ctx context.Context, nameOrID string) (*Container, error) {
	var out Container
	err := s.view(ctx, func(tx *metadata.Tx) error {
		c, err := findContainer(tx, nameOrID)
		if err == nil {
			out, err = s.container(tx, c)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return &out, nil
}

// Containers lists all containers, newest first.
func (s *Store) Containers(ctx context.Context) (out []Container, err error) {
	err = s.view(ctx, func(tx *metadata.Tx) error {
		out = nil
		all, err := tx.Containers()
		if err != nil {
			return err
		}
		for _, c := range all {
			if c.State == metadata.Creating {
				continue
			}
			one, err := s.container(tx, c)
			if err != nil {
				return err
			}
			out = append(out, one)
		}
		return nil
	})
	sort.SliceStable(out, func(i, j int) bool { return out[i].Created.After(out[j].Created) })
	return out, err
}

// RemoveContainer deletes a container and its writable layer. A mounted one is
// refused.
func (s *Store) RemoveContainer(ctx context.Context, nameOrID string) error {
	dead, err := s.deadMounts(ctx)
	if err != nil {
		return err
	}
	var junk []metadata.Trash
	err = s.updateFreeing(ctx, func(tx *metadata.Tx) error {
		junk = nil
		c, err := findContainer(tx, nameOrID)
		if err != nil {
			return err
		}
		live, err := tx.LiveMounts()
		if err != nil {
			return err
		}
		for _, l := range live {
			if l.ContainerID != c.ID {
				continue
			}
			if !dead[liveKey(l)] {
				return fmt.Errorf("container %q: %w: it is mounted on %s; unmount it first", c.Name, ErrInUse, l.Target)
			}
			if err := tx.DeleteLive(l.BootID, l.Target); err != nil {
				return err
			}
		}
		if err := unwantContainer(tx, c.ID, func(metadata.Wanted) bool { return true }); err != nil {
			return err
		}
		if _, err := tx.DeleteContainer(c.ID); err != nil {
			return err
		}
		if junk, err = addTrash(tx, "container removed", rwName+"/"+c.MountID); err != nil {
			return err
		}
		more, err := releaseChain(tx, c.Chain, nil)
		junk = append(junk, more...)
		return err
	})
	if err != nil {
		return err
	}
	s.purge(ctx, junk)
	return nil
}

// ContainerStack returns the directories a mount of the container is made of:
// init layer, then image layers.
func (s *Store) ContainerStack(ctx context.Context, nameOrID string) (st Stack, err error) {
	err = s.view(ctx, func(tx *metadata.Tx) error {
		c, err := findContainer(tx, nameOrID)
		if err != nil {
			return err
		}
		st, err = s.containerStackTx(tx, c)
		return err
	})
	if err == nil {
		err = checkAdopted(st.Lowers)
	}
	return st, err
}

func (s *Store) containerStackTx(tx *metadata.Tx, c metadata.Container) (Stack, error) {
	if c.State != metadata.Ready {
		return Stack{}, fmt.Errorf("container %q: %w: its state is %q", c.Name, ErrCorrupt, c.State)
	}
	if !validID(c.MountID) {
		return Stack{}, fmt.Errorf("container %q: %w: the database names the directory %q", c.Name, ErrCorrupt, c.MountID)
	}
	d, err := whiteout.ParseDialect(c.Dialect)
	if err != nil {
		return Stack{}, fmt.Errorf("container %q: %w: %w", c.Name, ErrCorrupt, err)
	}
	rw := filepath.Join(s.root, rwName, c.MountID)
	st := Stack{Upper: filepath.Join(rw, upperName), Work: filepath.Join(rw, workName), Dialect: d, Override: upperOverride(d), ChainID: c.Chain}
	st.History = filepath.Join(rw, historyName)
	if st.Lowers, err = s.stackTx(tx, c.Chain); err != nil {
		return Stack{}, err
	}
	if c.Chain != c.Top && len(st.Lowers) > 0 {
		st.Lowers[0].DiffID = "" // the init layer is none of the image's
	}
	return st, nil
}

var (
	nameLeft  = strings.Fields("able amber brave brisk calm civil clear crisp deft eager fair fine firm fond free glad grand happy keen kind light lucid merry neat noble plain proud quick quiet ready sharp sleek smart solid stout sunny swift tidy vivid warm")
	nameRight = strings.Fields("alder aspen birch cedar elder elm fern fir hazel holly ivy larch laurel lilac lime linden lotus maple moss myrtle oak olive palm pine poplar reed rowan rush sage sorrel spruce thyme vine walnut willow yarrow yew")
)

func randomName(try int) string {
	var b [3]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	n := nameLeft[int(b[0])%len(nameLeft)] + "_" + nameRight[int(b[1])%len(nameRight)]
	if try > 0 {
		n += fmt.Sprint(int(b[2]) + try)
	}
	return n
}

// liveOf translates a row.
func liveOf(l metadata.Live) Live {
	return Live{
		Target: l.Target, ContainerID: l.ContainerID, ImageID: l.ImageID, ChainID: l.ChainID, Pid: l.Pid, StartTime: l.StartTime,
		BootID: l.BootID, ReadOnly: l.ReadOnly, RunDir: l.RunDir, Created: l.Created,
	}
}

func liveKey(l metadata.Live) string {
	return fmt.Sprintf("%s\x00%s\x00%d\x00%d", l.BootID, l.Target, l.Pid, l.StartTime)
}

// deadMounts finds the mount rows whose process is gone, before a transaction
// that may not look at processes itself.
func (s *Store) deadMounts(ctx context.Context) (map[string]bool, error) {
	var rows []metadata.Live
	err := s.view(ctx, func(tx *metadata.Tx) (err error) {
		rows, err = tx.LiveMounts()
		return err
	})
	dead := map[string]bool{}
	for _, l := range rows {
		if !liveOf(l).Alive() {
			dead[liveKey(l)] = true
		}
	}
	return dead, err
}

// AddLive records a mount. A row of a dead process for the same target, or of the same
// mount, is replaced; another living one is ErrInUse, and so is a second writable mount
// of a container.
func (s *Store) AddLive(ctx context.Context, l Live) error {
	if !filepath.IsAbs(l.Target) || (l.ContainerID == "") == (l.ImageID == "" && l.ChainID == "") {
		return fmt.Errorf("%w: a mount needs an absolute target and either a container or an image", ErrInvalid)
	}
	if l.BootID == "" {
		boot, err := BootID()
		if err != nil {
			return err
		}
		l.BootID = boot
	}
	if l.Created.IsZero() {
		l.Created = time.Now().UTC()
	}
	dead, err := s.deadMounts(ctx)
	if err != nil {
		return err
	}
	row := metadata.Live{
		Target: l.Target, ContainerID: l.ContainerID, ImageID: l.ImageID, ChainID: l.ChainID, Pid: l.Pid, StartTime: l.StartTime,
		BootID: l.BootID, ReadOnly: l.ReadOnly, RunDir: l.RunDir, Created: l.Created,
	}
	return s.update(ctx, func(tx *metadata.Tx) error {
		if row.ContainerID != "" {
			c, err := findContainer(tx, row.ContainerID)
			if err != nil {
				return err
			}
			row.ContainerID, row.ChainID, row.ImageID = c.ID, c.Chain, c.ImageID
		} else if row.ChainID == "" {
			img, err := tx.Image(row.ImageID)
			if err != nil {
				return err
			}
			row.ChainID = img.TopChain
		}
		rows, err := tx.LiveMounts()
		if err != nil {
			return err
		}
		for _, o := range rows {
			// A run directory is that of one mount, whoever holds it.
			same := o.Pid == row.Pid && o.StartTime == row.StartTime || o.RunDir != "" && o.RunDir == row.RunDir && o.Target == row.Target
			if o.BootID != row.BootID || dead[liveKey(o)] || same {
				continue
			}
			if o.Target == row.Target {
				return fmt.Errorf("mountpoint %q: %w: process %d has a mount there", row.Target, ErrInUse, o.Pid)
			}
			if row.ContainerID != "" && o.ContainerID == row.ContainerID && !row.ReadOnly && !o.ReadOnly {
				return fmt.Errorf("container %q: %w: it is mounted on %s by process %d; unmount it there first", l.ContainerID, ErrInUse, o.Target, o.Pid)
			}
		}
		return tx.PutLive(row)
	})
}

// MoveLive makes the row of one mount point that of another one of the same mount. If it
// has gone meanwhile, nothing happens.
func (s *Store) MoveLive(ctx context.Context, from, to string) error {
	if !filepath.IsAbs(to) {
		return fmt.Errorf("%w: mount point %q is not an absolute path", ErrInvalid, to)
	}
	boot, err := BootID()
	if err != nil {
		return err
	}
	dead, err := s.deadMounts(ctx)
	if err != nil {
		return err
	}
	return s.update(ctx, func(tx *metadata.Tx) error {
		l, err := tx.Live(boot, from)
		if errors.Is(err, metadata.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if o, err := tx.Live(boot, to); err == nil && !dead[liveKey(o)] {
			return fmt.Errorf("mountpoint %q: %w: process %d has a mount there", to, ErrInUse, o.Pid)
		}
		if err := tx.DeleteLive(boot, from); err != nil {
			return err
		}
		l.Target = to
		return tx.PutLive(l)
	})
}

// RemoveLive forgets a mount. Unknown targets are not an error.
func (s *Store) RemoveLive(ctx context.Context, target string) error {
	boot, err := BootID()
	if err != nil {
		return err
	}
	var junk []metadata.Trash
	err = s.update(ctx, func(tx *metadata.Tx) error {
		l, err := tx.Live(boot, target)
		if errors.Is(err, metadata.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := tx.DeleteLive(boot, target); err != nil {
			return err
		}
		// The image may have been removed by force while it was mounted.
		junk, err = releaseChain(tx, l.ChainID, nil)
		return err
	})
	if err == nil {
		s.purge(ctx, junk)
	}
	return err
}

// LiveMounts lists every recorded mount of this boot, dead ones too: the
// caller decides what to do with them.
func (s *Store) LiveMounts(ctx context.Context) (out []Live, err error) {
	boot, err := BootID()
	if err != nil {
		return nil, err
	}
	err = s.view(ctx, func(tx *metadata.Tx) error {
		out = nil
		rows, err := tx.LiveMounts()
		for _, l := range rows {
			if l.BootID == boot {
				out = append(out, liveOf(l))
			}
		}
		return err
	})
	return out, err
}
