package transport

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// Resume is what another process needs, besides a descriptor of the connection, to go on
// with it: the kernel's INIT request, which comes only once, and its answer.
type Resume struct {
	Request []byte `json:"request"`
	Reply   []byte `json:"reply"`
}

// From include/uapi/linux/fuse.h.
const (
	initExt   = 1 << 30 // FUSE_INIT_EXT: there are more flags
	hasResend = 1 << 7  // FUSE_HAS_RESEND, in these; since Linux 6.9
	resendBit = 1 << 63 // FUSE_UNIQUE_RESEND, in the number of a request that is sent again
)

// newResume keeps an INIT request; nil if the kernel does not send unanswered requests
// again.
func newResume(request []byte) *Resume {
	const flags, flags2 = inHeaderSize + 12, inHeaderSize + 16
	if len(request) < flags2+4 || binary.NativeEndian.Uint32(request[flags:])&initExt == 0 ||
		binary.NativeEndian.Uint32(request[flags2:])&hasResend == 0 {
		return nil
	}
	return &Resume{Request: bytes.Clone(request)}
}

// errOther says that the kernel was promised something that this program does not do.
var errOther = errors.New("what was agreed with the kernel is not what this server agrees to")

// resume makes the agreement of the server before ours, and asks for its unanswered requests.
func (l *loop) resume(r *Resume, n notifier) error {
	if newResume(r.Request) == nil {
		return fmt.Errorf("go on with the mount: %w", errOther)
	}
	out := make([]byte, headroom)
	size, status := l.proto.HandleRequest([][]byte{bytes.Clone(r.Request)}, [][]byte{out})
	if status != fuse.OK || !bytes.Equal(out[:size], r.Reply) {
		return fmt.Errorf("go on with the mount: %w", errOther)
	}
	l.init = r
	n.send(notifyResend, 0, make([]byte, outHeaderSize))
	if l.ready != nil {
		l.ready(r)
	}
	return nil
}
