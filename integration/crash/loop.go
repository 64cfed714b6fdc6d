package crash

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// attachLimit is how long attach looks for a device that nobody else takes.
const attachLimit = 10 * time.Second

// attach makes a loop device of a file. The device goes away by itself when the
// last user does: the caller keeps it open until it is mounted, and whatever
// ends the process or the mount detaches it.
func attach(path string) (*os.File, error) {
	backing, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("loop device: %w", err)
	}
	defer backing.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("loop device: %w", err)
	}
	defer ctl.Close()
	for end := time.Now().Add(attachLimit); ; {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		dev, err := attachTo(n, backing)
		if err == nil {
			return dev, nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return nil, fmt.Errorf("attach /dev/loop%d: %w", n, err)
		}
	}
}

func attachTo(n int, backing *os.File) (*os.File, error) {
	path := fmt.Sprintf("/dev/loop%d", n)
	dev, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	config := unix.LoopConfig{Fd: uint32(backing.Fd())}
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
	if err := unix.IoctlLoopConfigure(int(dev.Fd()), &config); err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	return dev, nil
}

// Available says why loop devices cannot be had; nil if they can.
func Available(dir string) error {
	f, err := os.CreateTemp(dir, "probe-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := errors.Join(f.Truncate(1<<20), f.Close()); err != nil {
		return err
	}
	dev, err := attach(f.Name())
	if err != nil {
		return err
	}
	return dev.Close()
}
