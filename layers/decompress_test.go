package layers

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/ulikunitz/xz"
)

// fixtureLayer is the diffID of testdata/layer.tar.*: written by bzip2 as two
// streams, and by xz with many blocks and another check than the usual one.
const fixtureLayer = digest.Digest("sha256:55a745adb7cdd916312af4cf5b8f5f79e2328a58b45cb4c3d7f736c5fa965b7c")

func fixtureFile(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// forms compresses a layer in every way that images come in.
func forms(t testing.TB) (layer []byte, out map[string][]byte) {
	t.Helper()
	z, _, err := decompress(bufio.NewReader(bytes.NewReader(fixtureFile(t, "layer.tar.bz2"))))
	if err != nil {
		t.Fatal(err)
	}
	if layer, err = io.ReadAll(z); err != nil || digest.FromBytes(layer) != fixtureLayer {
		t.Fatal("bzip2:", err)
	}
	half := len(layer) / 3
	xzOf := func(c xz.WriterConfig, b []byte) []byte {
		var buf bytes.Buffer
		w, err := c.NewWriter(&buf)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return buf.Bytes()
	}
	// As estargz ends: a member that holds nothing, and says where a table is.
	var empty bytes.Buffer
	w, _ := gzip.NewWriterLevel(&empty, gzip.NoCompression)
	w.Extra = []byte("SG\x16\x000000000000000100STARGZ")
	_ = w.Close() // memory
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	chunked := append(zst(t, layer[:half]), enc.EncodeAll(layer[half:], nil)...)
	chunked = append(chunked, 0x50, 0x2a, 0x4d, 0x18, 8, 0, 0, 0, 'G', 'N', 'U', 'l', 'I', 'n', 'U', 'x')
	return layer, map[string][]byte{
		"none":         layer,
		"gzip":         gz(t, layer),
		"estargz":      append(gz(t, layer), empty.Bytes()...),
		"zstd":         enc.EncodeAll(layer, nil),
		"zstd:chunked": chunked,
		"bzip2":        fixtureFile(t, "layer.tar.bz2"),
		"xz":           fixtureFile(t, "layer.tar.xz"),
		"xz streams": bytes.Join([][]byte{
			xzOf(xz.WriterConfig{CheckSum: xz.CRC32, BlockSize: 1000}, layer[:half]), make([]byte, 8),
			xzOf(xz.WriterConfig{NoCheckSum: true, DictCap: 1 << 20}, layer[half:]),
		}, nil),
	}
}

// TestForms loads an image whose layer is compressed in each way, and archives
// that are compressed as a whole.
func TestForms(t *testing.T) {
	layer, all := forms(t)
	for name, data := range all {
		t.Run(name, func(t *testing.T) {
			s := openStore(t)
			im := img{refs: []string{"x"}, layers: [][]byte{layer}}
			load(t, s, outerTar(t, ociFiles(t, func(testing.TB, []byte) []byte { return data }, im)))
			list, err := s.Layers(t.Context(), "x")
			if err != nil || len(list) != 1 || list[0].DiffID != fixtureLayer {
				t.Fatal(list, err)
			}
			clean(t, s)
			if name == "none" {
				return
			}
			for _, cut := range []int{1, len(data) / 2, len(data) - 9} {
				bad := bytes.Clone(data[:len(data)-cut])
				r := bufio.NewReader(bytes.NewReader(bad))
				z, form, err := decompress(r)
				var got []byte
				if err == nil {
					got, err = io.ReadAll(z)
				}
				if err == nil && bytes.Equal(got, layer) {
					continue // what was cut held no content
				}
				if err = decompressError(form, err); !errors.Is(err, ErrCorrupt) {
					t.Errorf("without %d of %d bytes: %v", cut, len(data), err)
				}
			}
		})
	}
	s := openStore(t)
	whole := outerTar(t, ociFiles(t, plain, img{refs: []string{"x"}, layers: [][]byte{layer}}))
	var x bytes.Buffer
	w, _ := xz.NewWriter(&x)
	_, _ = w.Write(whole) // memory
	_ = w.Close()
	for _, data := range [][]byte{x.Bytes(), zst(t, whole), gz(t, whole)} {
		load(t, s, data)
	}
}

// TestXZGuard: it changes nothing, however its input comes, and says no before
// there is a dictionary that is too large.
func TestXZGuard(t *testing.T) {
	_, all := forms(t)
	for _, name := range []string{"xz", "xz streams"} {
		data := all[name]
		for _, r := range []io.Reader{bytes.NewReader(data), iotest.OneByteReader(bytes.NewReader(data)), iotest.HalfReader(bytes.NewReader(data))} {
			g := &xzGuard{r: bufio.NewReaderSize(r, 4096), next: (*xzGuard).stream}
			got, err := io.ReadAll(g)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%s: %d of %d bytes, %v", name, len(got), len(data), err)
			}
		}
	}
	// The second block of the fixture asks for the largest dictionary.
	data := bytes.Clone(all["xz"])
	first := bytes.Index(data, []byte{0x21, 1})
	second := first + 2 + bytes.Index(data[first+2:], []byte{0x21, 1})
	for at, want := range map[int]int64{first: 0, second: 1} {
		bad := bytes.Clone(data)
		bad[at+2] = 40
		z, _, err := decompress(bufio.NewReader(bytes.NewReader(bad)))
		var n int64
		if err == nil {
			n, err = io.Copy(io.Discard, z)
		}
		if !errors.Is(err, ErrUnsupported) || n/40000 != want {
			t.Errorf("dictionary of 4 GiB: %v after %d bytes", err, n)
		}
	}
	// An error of the input stays what it is.
	broken := errors.New("unplugged")
	_, _, err := decompress(bufio.NewReader(io.MultiReader(bytes.NewReader(data[:8]), iotest.ErrReader(broken))))
	if !errors.Is(err, broken) || errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
	// Whatever is broken, it ends.
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		bad := bytes.Clone(data)
		for range 3 {
			bad[rnd.IntN(len(bad))] = byte(rnd.Uint32())
		}
		g := &xzGuard{r: bufio.NewReaderSize(bytes.NewReader(bad), 4096), next: (*xzGuard).stream}
		if n, err := io.Copy(io.Discard, g); n > int64(len(bad)) || n < int64(len(bad)) && err == nil {
			t.Fatalf("%d of %d bytes, %v", n, len(bad), err)
		}
	}
}
