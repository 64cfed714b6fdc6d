package oracle

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"sort"
	"strconv"
	"strings"
)

// EncodeValue makes the bytes of an extended attribute from their text form:
//
//	acl:u::rwx,u:1000:r--,g::r-x,m::rwx,o::r--   a POSIX ACL
//	cap:MASK                                     a version 2 file capability
//	rep:N                                        N bytes
//	hex:0001ff                                   these bytes
//	anything else                                itself
func EncodeValue(s string) ([]byte, error) {
	form, rest, ok := strings.Cut(s, ":")
	if !ok {
		return []byte(s), nil
	}
	switch form {
	case "acl":
		return encodeACL(rest)
	case "cap":
		mask, err := strconv.ParseUint(rest, 0, 32)
		if err != nil {
			return nil, fmt.Errorf("capability %q: %w", s, err)
		}
		b := binary.LittleEndian.AppendUint32(nil, 0x02000001) // revision 2, effective
		b = binary.LittleEndian.AppendUint32(b, uint32(mask))
		return append(b, make([]byte, 12)...), nil
	case "rep":
		n, err := strconv.Atoi(rest)
		if err != nil {
			return nil, fmt.Errorf("length %q: %w", s, err)
		}
		return []byte(strings.Repeat("v", n)), nil
	case "hex":
		b, err := hex.DecodeString(rest)
		if err != nil {
			return nil, fmt.Errorf("bytes %q: %w", s, err)
		}
		return b, nil
	}
	return []byte(s), nil
}

// encodeACL writes the form of system.posix_acl_access.
func encodeACL(s string) ([]byte, error) {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for item := range strings.SplitSeq(s, ",") {
		f := strings.Split(item, ":")
		if len(f) != 3 {
			return nil, fmt.Errorf("acl entry %q: expected tag:id:perm", item)
		}
		id := uint32(0xffffffff)
		if f[1] != "" {
			n, err := strconv.ParseUint(f[1], 10, 32)
			if err != nil {
				return nil, fmt.Errorf("acl entry %q: %w", item, err)
			}
			id = uint32(n)
		}
		tag := map[string]uint16{"u": 1, "g": 4, "m": 0x10, "o": 0x20}[f[0]]
		if tag == 0 {
			return nil, fmt.Errorf("acl entry %q: unknown tag", item)
		}
		if f[1] != "" {
			tag <<= 1
		}
		var perm uint16
		for i, c := range "rwx" {
			if strings.ContainsRune(f[2], c) {
				perm |= 4 >> i
			}
		}
		b = binary.LittleEndian.AppendUint16(b, tag)
		b = binary.LittleEndian.AppendUint16(b, perm)
		b = binary.LittleEndian.AppendUint32(b, id)
	}
	return b, nil
}

// showBytes renders data short enough to read and exact enough to compare.
func showBytes(b []byte) string {
	if len(b) <= 24 {
		return strconv.QuoteToASCII(string(b))
	}
	sum := sha256.Sum256(b)
	return fmt.Sprintf("%d bytes sha256:%x", len(b), sum[:6])
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}
