package metadata

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// Container returns one container by its full ID.
func (tx *Tx) Container(id string) (Container, error) {
	return get[Container](tx, bktContainers, id, "container")
}

// Containers returns all containers.
func (tx *Tx) Containers() ([]Container, error) { return all[Container](tx, bktContainers) }

// ContainerByName returns the ID behind a name.
func (tx *Tx) ContainerByName(name string) (id string, ok bool) {
	v := tx.b(idxContainerName).Get([]byte(name))
	return string(v), name != "" && v != nil
}

// ContainersByImage returns the containers of an image.
func (tx *Tx) ContainersByImage(id digest.Digest) []string {
	return tx.seconds(idxContainerImage, id.String())
}

// AddContainer inserts a container. Its name must be free.
func (tx *Tx) AddContainer(c Container) error {
	if id, taken := tx.ContainerByName(c.Name); taken {
		return fmt.Errorf("container name %q: %w (container %.12s)", c.Name, ErrExists, id)
	}
	if tx.b(bktContainers).Get([]byte(c.ID)) != nil || tx.b(idxContainerMount).Get([]byte(c.MountID)) != nil {
		return fmt.Errorf("container %q: %w", c.ID, ErrExists)
	}
	if _, err := tx.Image(c.ImageID); err != nil {
		return err
	}
	if c.Chain != "" && !tx.HasLayer(c.Chain) {
		return fmt.Errorf("container %q: %w: layer %s does not exist", c.Name, ErrInvariant, c.Chain)
	}
	tx.touchContainer(c.ID)
	if err := put(tx, bktContainers, []byte(c.ID), c); err != nil {
		return err
	}
	return tx.indexContainer(c)
}

func (tx *Tx) indexContainer(c Container) error {
	if err := tx.b(idxContainerName).Put([]byte(c.Name), []byte(c.ID)); err != nil {
		return err
	}
	if err := tx.b(idxContainerMount).Put([]byte(c.MountID), []byte(c.ID)); err != nil {
		return err
	}
	if c.Chain != "" {
		if err := tx.mark(idxContainerChain, c.Chain.String(), c.ID); err != nil {
			return err
		}
	}
	return tx.mark(idxContainerImage, c.ImageID.String(), c.ID)
}

// SetContainerState changes the state of a container.
func (tx *Tx) SetContainerState(id, state string) error {
	c, err := tx.Container(id)
	if err != nil {
		return err
	}
	c.State = state
	tx.touchContainer(id)
	if state != Creating {
		c.Owner = Owner{}
	}
	return put(tx, bktContainers, []byte(id), c)
}

// DeleteContainer removes a container that is not mounted.
func (tx *Tx) DeleteContainer(id string) (Container, error) {
	c, err := tx.Container(id)
	if err != nil {
		return c, err
	}
	live, err := tx.LiveMounts()
	if err != nil {
		return c, err
	}
	for _, l := range live {
		if l.ContainerID == id {
			return c, fmt.Errorf("container %q: %w: mounted on %s", c.Name, ErrInUse, l.Target)
		}
	}
	return c, tx.dropContainer(c)
}

func (tx *Tx) dropContainer(c Container) error {
	id := c.ID
	tx.touchContainer(id)
	if err := tx.b(bktContainers).Delete([]byte(id)); err != nil {
		return err
	}
	return errors.Join(tx.b(idxContainerName).Delete([]byte(c.Name)), tx.b(idxContainerMount).Delete([]byte(c.MountID)),
		tx.unmark(idxContainerChain, c.Chain.String(), id), tx.unmark(idxContainerImage, c.ImageID.String(), id))
}

// LiveMounts returns the recorded mounts, those of earlier boots too.
func (tx *Tx) LiveMounts() ([]Live, error) { return all[Live](tx, bktLive) }

// Live returns the mount on target.
func (tx *Tx) Live(bootID, target string) (Live, error) {
	v, err := get[Live](tx, bktLive, string(key(bootID, target)), "mount")
	if err != nil && errors.Is(err, ErrNotFound) {
		return v, fmt.Errorf("mount on %q: %w", target, ErrNotFound)
	}
	return v, err
}

// PutLive records a mount, replacing a row for the same target.
func (tx *Tx) PutLive(l Live) error {
	if l.ContainerID != "" {
		if _, err := tx.Container(l.ContainerID); err != nil {
			return err
		}
	}
	if l.ChainID != "" && !tx.HasLayer(l.ChainID) {
		return fmt.Errorf("layer %q: %w", l.ChainID, ErrNotFound)
	}
	if err := tx.DeleteLive(l.BootID, l.Target); err != nil {
		return err
	}
	if l.ChainID != "" {
		if err := tx.mark(idxLiveChain, l.ChainID.String(), l.BootID, l.Target); err != nil {
			return err
		}
	}
	return put(tx, bktLive, key(l.BootID, l.Target), l)
}

// DeleteLive forgets a mount.
func (tx *Tx) DeleteLive(bootID, target string) error {
	if old, err := tx.Live(bootID, target); err == nil && old.ChainID != "" {
		if err := tx.unmark(idxLiveChain, old.ChainID.String(), bootID, target); err != nil {
			return err
		}
	}
	return tx.unmark(bktLive, bootID, target)
}

// Wanted returns the mounts that are to be made again, in the order of their targets.
func (tx *Tx) Wanted() ([]Wanted, error) {
	var out []Wanted
	err := tx.b(bktWanted).ForEach(func(k, raw []byte) error {
		var w Wanted
		if err := decode(raw, &w); err != nil {
			tx.skipped++
			return nil
		}
		w.Target = string(k)
		out = append(out, w)
		return nil
	})
	return out, err
}

// WantedAt returns what is to be mounted on target.
func (tx *Tx) WantedAt(target string) (Wanted, error) {
	w, err := get[Wanted](tx, bktWanted, target, "wanted mount")
	w.Target = target
	return w, err
}

// PutWanted records a wanted mount, replacing a row for the same target.
func (tx *Tx) PutWanted(w Wanted) error { return put(tx, bktWanted, []byte(w.Target), w) }

// DeleteWanted forgets a wanted mount.
func (tx *Tx) DeleteWanted(target string) error { return tx.b(bktWanted).Delete([]byte(target)) }

// AddIngest records a stage.
func (tx *Tx) AddIngest(i Ingest) error {
	if tx.b(bktIngests).Get([]byte(i.ID)) != nil || tx.b(bktCache).Get([]byte(i.ID)) != nil {
		return fmt.Errorf("stage %q: %w", i.ID, ErrExists)
	}
	return put(tx, bktIngests, []byte(i.ID), i)
}

// Ingests returns all stages.
func (tx *Tx) Ingests() ([]Ingest, error) { return all[Ingest](tx, bktIngests) }

// DeleteIngest forgets a stage; it must exist: if it does not, somebody took
// us for dead and swept it.
func (tx *Tx) DeleteIngest(id string) error {
	if tx.b(bktIngests).Get([]byte(id)) == nil {
		return fmt.Errorf("stage %q: %w", id, ErrNotFound)
	}
	return tx.b(bktIngests).Delete([]byte(id))
}

// AddLease inserts a lease.
func (tx *Tx) AddLease(l Lease) error { return put(tx, bktLeases, []byte(l.ID), l) }

// Leases returns all leases.
func (tx *Tx) Leases() ([]Lease, error) { return all[Lease](tx, bktLeases) }

// LeaseLayer makes a lease keep a layer.
func (tx *Tx) LeaseLayer(lease string, chain digest.Digest) error {
	if tx.b(bktLeases).Get([]byte(lease)) == nil {
		return fmt.Errorf("lease %q: %w", lease, ErrNotFound)
	}
	return errors.Join(tx.mark(bktLeaseLayer, lease, chain.String()), tx.mark(idxLayerLease, chain.String(), lease))
}

// EndLease removes a lease and returns the layers it kept.
func (tx *Tx) EndLease(id string) ([]digest.Digest, error) {
	chains := digests(tx.seconds(bktLeaseLayer, id))
	for _, c := range chains {
		if err := errors.Join(tx.unmark(bktLeaseLayer, id, c.String()), tx.unmark(idxLayerLease, c.String(), id)); err != nil {
			return nil, err
		}
	}
	return chains, tx.b(bktLeases).Delete([]byte(id))
}

// AddTrash records a path to delete.
func (tx *Tx) AddTrash(t Trash) (uint64, error) {
	seq, err := tx.b(bktTrash).NextSequence()
	if err != nil {
		return 0, err
	}
	t.Seq = seq
	return seq, put(tx, bktTrash, binary.BigEndian.AppendUint64(nil, seq), t)
}

// TrashRows returns the paths to delete.
func (tx *Tx) TrashRows() ([]Trash, error) { return all[Trash](tx, bktTrash) }

// DeleteTrash forgets a path that is gone.
func (tx *Tx) DeleteTrash(seq uint64) error {
	return tx.b(bktTrash).Delete(binary.BigEndian.AppendUint64(nil, seq))
}
