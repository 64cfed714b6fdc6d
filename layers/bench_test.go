package layers

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"
)

// benchLayers are layers of files that neither compress to nothing nor not at
// all, spread over directories that the layers share.
func benchLayers(b testing.TB, layers, files, size int) [][]byte {
	b.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	words := make([]byte, 1<<20)
	for i := range words {
		words[i] = "aeiounrst \n{}()_0123"[r.IntN(20)]
	}
	var out [][]byte
	for l := range layers {
		var ents []ent
		for i := range files {
			if d := i / 20; i%20 == 0 {
				if d < 50 {
					ents = append(ents, dir(fmt.Sprintf("usr/share/d%d", d)))
				}
				ents = append(ents, dir(fmt.Sprintf("usr/share/d%d/sub%d", d%50, d/50)))
			}
			var data []byte
			for n := size/2 + r.IntN(size+1); len(data) < n; {
				at := r.IntN(len(words))
				data = append(data, words[at:min(at+64+r.IntN(4000), len(words))]...)
			}
			ents = append(ents, file(fmt.Sprintf("usr/share/d%d/sub%d/file-%d-%d.txt", i/20%50, i/20/50, l, i), string(data)))
		}
		out = append(out, layerTar(b, ents...))
	}
	return out
}

var loadShapes = []struct {
	name                string
	layers, files, size int
}{
	{"small-files", 5, 4000, 2000},
	{"large-files", 5, 4, 8 << 20},
}

func BenchmarkLoad(b *testing.B) {
	for _, shape := range loadShapes {
		im := img{refs: []string{"i:latest"}, layers: benchLayers(b, shape.layers, shape.files, shape.size)}
		for name, files := range map[string][]memberFile{"docker": oldDocker(b, im), "oci-gzip": ociFiles(b, gz, im)} {
			archive := outerTar(b, files)
			b.Run(shape.name+"/"+name, func(b *testing.B) {
				b.SetBytes(int64(len(archive)))
				for i := range b.N {
					s, err := Open(context.Background(), filepath.Join(b.TempDir(), fmt.Sprint(i)), Options{})
					if err != nil {
						b.Fatal(err)
					}
					if _, err := s.Load(context.Background(), Source{Reader: onlyReader{bytes.NewReader(archive)}}, LoadOptions{}); err != nil {
						b.Fatal(err)
					}
					_ = s.Close()
				}
			})
		}
	}
}

// BenchmarkChain builds the index of a chain of 10 layers with 2000 files each.
func BenchmarkChain(b *testing.B) {
	s := openStore(b)
	st := loadLayers(b, s, benchLayers(b, 10, 2000, 10)...)
	for b.Loop() {
		if _, err := s.DropChains(b.Context()); err != nil {
			b.Fatal(err)
		}
		if _, _, err := s.ChainIndex(b.Context(), st); err != nil {
			b.Fatal(err)
		}
	}
}
