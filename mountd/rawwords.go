package mountd

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"

	"github.com/plyfs/plyfs/unionfs"
)

// splitEscaped splits at sep where no backslash stands before it. Backslashes
// stay, for the next level.
func splitEscaped(s string, sep byte) []string {
	var parts []string
	start := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case sep:
			parts = append(parts, s[start:i])
			start = i + 1
		}
	}
	return append(parts, s[start:])
}

// splitOptions splits a list of mount options at its commas: not at escaped ones, nor
// at those in a value that stands in quotation marks, as labels do
// (context="system_u:object_r:container_file_t:s0:c1,c2").
func splitOptions(s string) []string {
	var parts []string
	for _, p := range splitEscaped(s, ',') {
		if n := len(parts); n > 0 && opensQuote(parts[n-1]) {
			parts[n-1] += "," + p
			continue
		}
		parts = append(parts, p)
	}
	// A mark that nothing closes is a character like others.
	for i, p := range parts {
		if opensQuote(p) {
			return append(parts[:i:i], splitEscaped(p, ',')...)
		}
	}
	return parts
}

// opensQuote reports whether the value of an option begins with a quotation mark and
// does not end with one.
func opensQuote(opt string) bool {
	_, val, _ := strings.Cut(opt, "=")
	return strings.HasPrefix(val, `"`) && (len(val) == 1 || !strings.HasSuffix(val, `"`))
}

// unquote takes away the quotation marks around the value of an option.
func unquote(opt string) string {
	key, val, _ := strings.Cut(opt, "=")
	if n := len(val); n > 1 && val[0] == '"' && val[n-1] == '"' {
		return key + "=" + val[1:n-1]
	}
	return opt
}

// unescape removes one level of backslashes, as ovl_unescape() of the kernel.
func unescape(s string) string {
	if strings.IndexByte(s, '\\') < 0 {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' {
			if i++; i == len(s) {
				break
			}
		}
		b = append(b, s[i])
	}
	return string(b)
}

// onceEscaped turns a colon with two backslashes into one with one. fuse-overlayfs gets its
// options from libfuse, which has removed one level of backslashes from them, so its
// callers write \\: where kernel overlayfs wants \: in a path. What it then cannot be told,
// neither can we: a path with a backslash at its end.
func onceEscaped(s string) string {
	if !strings.Contains(s, `\\:`) {
		return s
	}
	var b strings.Builder
	slashes := 0
	for i := range len(s) {
		switch {
		case s[i] == '\\':
			slashes++
			continue
		case s[i] == ':' && slashes == 2:
			slashes = 1
		}
		b.WriteString(strings.Repeat(`\`, slashes))
		b.WriteByte(s[i])
		slashes = 0
	}
	b.WriteString(strings.Repeat(`\`, slashes))
	return b.String()
}

// maxOptionFile bounds an option file: ten thousand layers with the longest paths.
const maxOptionFile = 64 << 20

// readOptionFile reads options from a file, one on each line: a comma has no meaning
// there. Empty lines and those that begin with # are skipped.
func readOptionFile(path string) (opts []string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("option file %q: %w", path, reason(err))
	}
	defer f.Close()
	r := bufio.NewReader(io.LimitReader(f, maxOptionFile+1))
	size := 0
	for {
		line, err := r.ReadString('\n')
		if size += len(line); size > maxOptionFile {
			return nil, fmt.Errorf("option file %q: more than %d bytes", path, maxOptionFile)
		}
		line = strings.TrimRight(line, "\r\n")
		if line != "" && line[0] != '#' {
			opts = append(opts, line)
		}
		if err == io.EOF {
			return opts, nil
		}
		if err != nil {
			return nil, fmt.Errorf("option file %q: %w", path, reason(err))
		}
	}
}

// overflowID is what the kernel shows of ids that it cannot map (kernel.overflowuid).
const overflowID = 65534

// ParseIDs reads the triples of uidmapping= and gidmapping=, CONTAINER:HOST:LENGTH,
// joined by colons. containers/storage begins with one, too.
func ParseIDs(val string) (m unionfs.IDMap, err error) {
	bad := fmt.Errorf("expected triples CONTAINER:HOST:LENGTH of numbers, joined by colons")
	var n []uint32
	for f := range strings.SplitSeq(val, ":") {
		if f == "" {
			continue
		}
		v, err := strconv.ParseUint(f, 10, 32)
		if err != nil {
			return m, bad
		}
		n = append(n, uint32(v))
	}
	if len(n) == 0 || len(n)%3 != 0 {
		return m, bad
	}
	for ; len(n) > 0; n = n[3:] {
		if last := math.MaxUint32 - n[2]; n[0] > last || n[1] > last {
			return m, fmt.Errorf("the range %d:%d:%d goes beyond the last id", n[0], n[1], n[2])
		}
		m.Ranges = append(m.Ranges, unionfs.IDRange{Stored: n[0], Shown: n[1], Length: n[2]})
	}
	m.Rest = overflowID
	return m, nil
}

// parseSquash reads the id of squash_to_uid= and squash_to_gid=; -1 is none.
func parseSquash(val string) (*uint32, error) {
	if val == "-1" {
		return nil, nil
	}
	v, err := strconv.ParseUint(val, 10, 32)
	if err != nil || v == 1<<32-1 {
		return nil, fmt.Errorf("expected an id")
	}
	id := uint32(v)
	return &id, nil
}
