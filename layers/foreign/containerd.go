package foreign

import (
	"context"
	"fmt"
)

func (s *Store) isContainerd() bool {
	return s.isFile("io.containerd.metadata.v1.bolt/meta.db")
}

func (s *Store) readContainerd(context.Context) error {
	return fmt.Errorf("%w: containerd", ErrUnsupported)
}
