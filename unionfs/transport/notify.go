package transport

import (
	"encoding/binary"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/counters"
)

// Messages to the kernel that answer nothing (include/uapi/linux/fuse.h,
// FUSE_NOTIFY_*).
const (
	notifyInvalInode = 2
	notifyStore      = 4
	notifyResend     = 7
)

// notifier sends them over a connection.
type notifier struct {
	fd     int
	log    *zap.Logger
	counts *counters.Counters
}

// StoreHeadroom is how many bytes store needs in front of the data.
const StoreHeadroom = outHeaderSize + 24

// invalidate tells the kernel to forget the attributes of a node, and its pages in
// the range. A node it does not know is no error.
func (n notifier) invalidate(nodeid uint64, off, length int64) {
	var msg [outHeaderSize + 24]byte
	binary.NativeEndian.PutUint64(msg[16:], nodeid)
	binary.NativeEndian.PutUint64(msg[24:], uint64(off))
	binary.NativeEndian.PutUint64(msg[32:], uint64(length))
	n.counts.Invalidated()
	n.send(notifyInvalInode, nodeid, msg[:])
}

// store puts buf[StoreHeadroom:] into the page cache of a node, from its first byte on.
// It waits for readers of these pages.
func (n notifier) store(nodeid uint64, buf []byte) {
	binary.NativeEndian.PutUint64(buf[16:], nodeid)
	binary.NativeEndian.PutUint64(buf[24:], 0)
	binary.NativeEndian.PutUint32(buf[32:], uint32(len(buf)-StoreHeadroom))
	binary.NativeEndian.PutUint32(buf[36:], 0)
	n.counts.Stored()
	n.send(notifyStore, nodeid, buf)
}

func (n notifier) send(code uint32, nodeid uint64, msg []byte) {
	binary.NativeEndian.PutUint32(msg[0:], uint32(len(msg)))
	binary.NativeEndian.PutUint32(msg[4:], code)
	binary.NativeEndian.PutUint64(msg[8:], 0)
	for {
		_, err := unix.Write(n.fd, msg)
		switch err {
		case unix.EINTR, unix.EAGAIN:
			continue
		case nil, unix.ENOENT, unix.ENODEV, unix.ECONNABORTED:
		default:
			n.log.Warn("notification refused", zap.Uint32("code", code), zap.Uint64("node", nodeid), zap.Error(err))
		}
		return
	}
}
