package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/plyfs/plyfs/integration/engine"
)

// TestSoakEngines does more of what TestPodman does: an image of many layers, a long build,
// many containers at once that write to the same files of the image.
func TestSoakEngines(t *testing.T) {
	if os.Getenv("SOAK_DURATION") == "" {
		t.Skip("SOAK_DURATION is not set")
	}
	engine.Need(t, "podman")
	const layers, containers = 60, 24
	eachPerson(t, func(t *testing.T, w engine.Person) {
		w = podmanStore(t, w)
		dir := filepath.Join(w.Home, "many")
		text := "FROM " + engine.BaseImage + "\n"
		for i := range layers {
			text += fmt.Sprintf("RUN echo %d >> /data/log && echo %[1]d > /full/new && rm -rf /kinds/dir%[2]d && mkdir /kinds/dir%[1]d && touch /kinds/dir%[1]d/x\n", i, i-1)
		}
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "Containerfile"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		// Each step takes longer than the one before: podman compares the trees.
		for i, steps := 0, strings.SplitAfter(text, "\n"); i*10 < layers; i++ {
			part := strings.Join(steps[:min(len(steps), (i+1)*10+1)], "")
			if err := os.WriteFile(filepath.Join(dir, "Containerfile"), []byte(part), 0o644); err != nil {
				t.Fatal(err)
			}
			w.Run(t, "podman", "build", "-q", "--layers", "-t", "localhost/many:1", dir)
		}
		got := w.Run(t, "podman", "run", "--rm", "localhost/many:1", "sh", "-c", "wc -l < /data/log; cat /full/new; find /kinds | grep -c dir")
		sameText(t, "image", fmt.Sprintf("%d\n%d\n3\n", layers, layers-1), got)

		var all sync.WaitGroup
		for i := range containers {
			all.Go(func() {
				res := w.Do("", "podman", "run", "--rm", "localhost/many:1", "sh", "-c", fmt.Sprintf(
					"for n in 1 2 3 4 5 6 7 8; do echo %d >> /data/log; mv /full/new /full/$n; cp /full/$n /full/new; rm -rf /kinds; mkdir -p /kinds/$n; done; wc -l < /data/log; ls /full /kinds | wc -l", i))
				if want := fmt.Sprintf("%d\n13\n", layers+8); res.Stdout != want || res.Held {
					t.Errorf("container %d: %+v", i, res)
				}
			})
		}
		all.Wait()
	})
}
