package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
)

// Store is the snapshots below one root.
type Store struct {
	dirs
	db     *db
	unions unions
	log    *zap.Logger
	names  locks

	mu     sync.Mutex
	making map[string]bool // ids whose directory may be without a row for now

	purging chan struct{} // asks for a look into the trash
	stop    context.CancelFunc
	stopped chan struct{}
}

// Open opens the snapshots in root, which is made if it does not exist, and clears away
// what a crash has left. A root belongs to one process at a time.
func Open(root string, log *zap.Logger) (*Store, error) {
	return open(root, log, processes{log})
}

func open(root string, log *zap.Logger, u unions) (s *Store, err error) {
	root, err = mountd.CanonicalRoot(root)
	if err != nil {
		return nil, err
	}
	s = &Store{
		dirs: dirs{root}, unions: u, log: log, making: map[string]bool{},
		purging: make(chan struct{}, 1), stopped: make(chan struct{}),
	}
	if err := s.prepare(); err != nil {
		return nil, err
	}
	if s.db, err = openDB(root); err != nil {
		return nil, err
	}
	if err := s.tidy(); err != nil {
		return nil, errors.Join(err, s.db.close())
	}
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	go s.purgeLoop(ctx)
	s.purgeSoon()
	return s, nil
}

// Close ends the work in the background and closes the database. Unions stay mounted.
func (s *Store) Close() error {
	s.stop()
	<-s.stopped
	return s.db.close()
}

func (s *Store) purgeSoon() {
	select {
	case s.purging <- struct{}{}:
	default: // asked for already
	}
}

func (s *Store) purgeLoop(ctx context.Context) {
	defer close(s.stopped)
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.purging:
			if err := s.purge(ctx, s.log); err != nil && ctx.Err() == nil {
				s.log.Warn("delete removed snapshots", zap.Error(err))
			}
		}
	}
}

// tidy compares the directories with the rows, see the crash table in doc.go.
func (s *Store) tidy() error {
	entries, err := os.ReadDir(s.snapshots()) // first: what is made later is not looked at
	if err != nil {
		return fmt.Errorf("list snapshots: %w", err)
	}
	s.mu.Lock()
	making := maps.Clone(s.making)
	s.mu.Unlock()
	rows := map[string]Kind{}
	names := map[string]string{}
	unread := 0
	err = s.db.view(func(t tx) error {
		return t.each(func(name string, r row) error {
			rows[r.ID], names[r.ID] = r.Kind, name
			return nil
		}, func(name string, err error) {
			unread++
			s.log.Error("the row of a snapshot cannot be read", zap.String("name", name), zap.Error(err))
		})
	})
	if err != nil {
		return err
	}
	for _, e := range entries {
		id := e.Name()
		kind, known := rows[id]
		delete(names, id)
		switch {
		case !known && (making[id] || unread > 0): // a row that cannot be read may be its row
		case !known:
			s.log.Warn("a directory without a snapshot is removed", zap.String("id", id))
			if err := s.discard(id); err != nil {
				return fmt.Errorf("remove a directory without a snapshot: %w", err)
			}
		case kind == Committed:
			if err := s.dropUnion(id); err != nil {
				return err
			}
		}
	}
	for id, name := range names {
		if _, err := os.Lstat(s.of(id)); errors.Is(err, fs.ErrNotExist) {
			s.log.Error("the directory of a snapshot is missing", zap.String("name", name), zap.String("id", id))
		}
	}
	s.purgeSoon()
	return nil
}

// dropUnion removes what only a union needs.
func (s *Store) dropUnion(id string) error {
	for _, d := range s.ofUnion(id) {
		if err := os.RemoveAll(d); err != nil {
			return fmt.Errorf("directories of a union: %w", err)
		}
	}
	return nil
}

// find returns the row of a name and the ids of its parents, the nearest first.
func (s *Store) find(name string) (r row, parents []string, err error) {
	err = s.db.view(func(t tx) error {
		if r, err = t.get(name); err != nil {
			return err
		}
		parents, err = t.chain(r)
		return err
	})
	return r, parents, err
}

// Stat returns a snapshot.
func (s *Store) Stat(name string) (in Info, err error) {
	err = s.db.view(func(t tx) error {
		r, err := t.get(name)
		in = r.info(name)
		return err
	})
	return in, err
}

// Update changes the labels of a snapshot; without fields all that can be changed.
func (s *Store) Update(name string, labels map[string]string, fields []string) (in Info, err error) {
	err = s.db.update(func(t tx) error {
		r, err := t.get(name)
		if err != nil {
			return err
		}
		if r.Labels, err = relabel(r.Labels, labels, fields); err != nil {
			return err
		}
		r.Updated = time.Now().UTC()
		in = r.info(name)
		return t.put(name, r)
	})
	return in, err
}

// Walk calls f with each snapshot that one of the filters lets pass, by name.
func (s *Store) Walk(filters []string, f func(Info) error) error {
	match, err := parseFilters(filters)
	if err != nil {
		return err
	}
	var list []Info // f may take its time
	err = s.db.view(func(t tx) error {
		return t.each(func(name string, r row) error {
			if in := r.info(name); match(in) {
				list = append(list, in)
			}
			return nil
		}, func(name string, err error) {
			s.log.Error("the row of a snapshot cannot be read", zap.String("name", name), zap.Error(err))
		})
	})
	for i := 0; i < len(list) && err == nil; i++ {
		err = f(list[i])
	}
	return err
}

// Usage returns what a snapshot takes. A view takes nothing.
func (s *Store) Usage(name string) (Usage, error) {
	r, _, err := s.find(name)
	if err != nil || r.Kind != Active {
		return r.Usage, err
	}
	return usageOf(s.fs(r.ID))
}

// Mounts returns how to mount an active snapshot or a view, and mounts its union if need be.
func (s *Store) Mounts(ctx context.Context, name string) ([]Mount, error) {
	release, err := s.names.take(ctx, name)
	if err != nil {
		return nil, err
	}
	defer release()
	r, parents, err := s.find(name)
	if err != nil {
		return nil, err
	}
	return s.mounts(ctx, name, r, parents)
}

// Cleanup removes directories that belong to no snapshot, and waits for what is being deleted.
func (s *Store) Cleanup(ctx context.Context) error {
	if err := s.tidy(); err != nil {
		return err
	}
	return s.purge(ctx, s.log)
}

// mounts decides what a caller has to mount; see the table in doc.go.
func (s *Store) mounts(ctx context.Context, name string, r row, parents []string) ([]Mount, error) {
	if r.Kind == Committed {
		return nil, markedf(layers.ErrInUse, "snapshot %q is committed: only active snapshots and views are mounted", name)
	}
	u, needed, err := s.unionOf(r, parents)
	if err != nil {
		return nil, err
	}
	source := s.fs(r.ID)
	switch {
	case needed:
		if err := s.unions.mount(ctx, u); err != nil {
			return nil, err
		}
		source = u.target
	case len(parents) == 1:
		source = s.fs(parents[0])
	}
	access := "rw"
	if r.Kind == View {
		access = "ro"
	}
	return []Mount{{Type: "bind", Source: source, Options: []string{"rbind", access}}}, nil
}

// unionOf returns the union of a snapshot, and whether it needs one.
func (s *Store) unionOf(r row, parents []string) (u union, needed bool, err error) {
	u = union{id: r.ID, target: s.mnt(r.ID), run: s.run(r.ID)}
	owners, mapped, err := ownersOf(r.Labels)
	if err != nil {
		return u, false, err
	}
	u.owners = owners
	for _, id := range parents {
		u.lowers = append(u.lowers, s.fs(id))
	}
	switch {
	case r.Kind == Active:
		u.upper, u.work = s.fs(r.ID), s.work(r.ID)
		return u, mapped || len(parents) > 0, nil
	case len(parents) == 0:
		u.lowers = []string{s.fs(r.ID)}
		return u, mapped, nil
	}
	return u, mapped || len(parents) > 1, nil
}
