//go:build !amd64 && !arm64

package confine

// Filter is not there for this architecture.
func Filter(Options) error { return ErrUnavailable }
