package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/plyfs/plyfs/integration/engine"
	"github.com/plyfs/plyfs/integration/harness"
)

// twins are docker and plyfs, which get the same commands.
type twins struct {
	docker, plyfs engine.Person
	bin           string
	ids           *strings.Replacer // {base} and others -> an ID
}

func (w twins) runDocker(t *testing.T, args ...string) string {
	t.Helper()
	return w.docker.Run(t, append([]string{w.docker.DockerCLI()}, args...)...)
}

func (w twins) runPlyfs(t *testing.T, args ...string) string {
	t.Helper()
	return w.plyfs.Run(t, append([]string{w.bin}, args...)...)
}

var createdAndSize = regexp.MustCompile(` +(now|Less than|About|[0-9]+) .*`)

// output is what both must say. Of lists without the columns that differ, and in order:
// images that were made in the same second have none with docker.
func output(args []string, text string) string {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if args[0] == "load" { // docker says it of all images, if the last one has no name
		lines = slices.DeleteFunc(lines, func(l string) bool { return strings.HasPrefix(l, "Loaded image ID: ") })
	}
	if args[0] == "images" {
		for i, l := range lines {
			lines[i] = strings.Join(strings.Fields(createdAndSize.ReplaceAllString(l, "")), " ")
			lines[i] = strings.TrimSuffix(lines[i], " CREATED SIZE")
		}
		slices.Sort(lines)
	}
	return strings.Join(lines, "\n")
}

// same runs a command twice: both succeed, and say the same, or none does.
func (w twins) same(t *testing.T, command string) {
	t.Helper()
	args := strings.Fields(w.ids.Replace(command))
	d := w.docker.Do("", append([]string{w.docker.DockerCLI()}, args...)...)
	p := w.plyfs.Do("", append([]string{w.bin}, args...)...)
	if d.Err != "" || p.Err != "" || (d.Code == 0) != (p.Code == 0) {
		t.Errorf("%s: docker %d %s%s, plyfs %d %s%s", command, d.Code, d.Err, d.Stderr, p.Code, p.Err, p.Stderr)
	}
	if diff := cmp.Diff(output(args, d.Stdout), output(args, p.Stdout)); diff != "" {
		t.Errorf("%s (- docker, + plyfs):\n%s", command, diff)
	}
}

// empty removes all images of both.
func (w twins) empty(t *testing.T) {
	t.Helper()
	for n := 0; ; n++ { // those that others were made from go with these, or remain
		ids := strings.Fields(w.runDocker(t, "images", "-aq", "--no-trunc"))
		if len(ids) == 0 {
			break
		}
		if n == 9 {
			t.Fatalf("docker still has %q", ids)
		}
		w.docker.Do("", append([]string{w.docker.DockerCLI(), "rmi", "-f"}, ids...)...)
	}
	if err := os.RemoveAll(w.plyfs.Env["PLYFS_ROOT"]); err != nil {
		t.Fatal(err)
	}
}

// TestDockerStore gives the same commands to a docker daemon and to plyfs. What differs
// for a reason stands in docs/docker.md, and not here.
func TestDockerStore(t *testing.T) {
	engine.Need(t, "dockerd", "docker")
	harness.NeedRoot(t)
	root := enginePlace(t, engine.Options{}).Root
	w := twins{docker: root.Docker(t, "d", "vfs", ""), bin: program(t, "plyfs"), ids: strings.NewReplacer()}
	w.plyfs = root.With(map[string]string{"PLYFS_ROOT": filepath.Join(root.Home, "store"), "PLYFS_SOCKET": "none"})

	dir := filepath.Join(root.Home, "context")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"file": "text\n",
		"base": "FROM scratch\nCOPY file /file\nENV A=1 P=/x\nCMD [\"c\"]\n",
		"app":  "FROM base:1\nLABEL team=x\nCOPY file /other\nENTRYPOINT [\"e\"]\n",
		"rich": "FROM app:1\nCMD [\"c\"]\nEXPOSE 80\nVOLUME /v\nWORKDIR /w\nHEALTHCHECK --interval=5s --retries=3 CMD h\nONBUILD RUN x\nMAINTAINER me\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	w.runDocker(t, "build", "-q", "-f", filepath.Join(dir, "base"), "-t", "base:1", dir)
	w.runDocker(t, "build", "-q", "-f", filepath.Join(dir, "app"), "-t", "app:1", "-t", "app:latest", "-t", "example.com:5000/team/app:1", dir)
	steps := strings.Fields(w.runDocker(t, "history", "-q", "--no-trunc", "app:1"))
	base := strings.TrimSpace(w.runDocker(t, "images", "-q", "--no-trunc", "base:1"))
	w.ids = strings.NewReplacer("{app}", steps[0], "{step}", steps[1], "{base}", base, "{short}", steps[0][7:19])
	w.runDocker(t, "build", "-q", "-f", filepath.Join(dir, "rich"), "-t", "rich:1", dir)
	w.runDocker(t, "save", "-o", "rich.tar", "rich:1")
	all := append([]string{"save", "-o", "all.tar", "base", "app", "example.com:5000/team/app"}, steps...)
	w.runDocker(t, all...)

	for _, tc := range []struct {
		name     string
		commands []string
	}{
		{"lists", []string{
			"images", "images -a", "images -aq", "images -q --no-trunc", "images app", "images app:1", "images nothing", "images */*/app", "images -f reference=app:*",
			"images -f dangling=true", "images -a -f dangling=true", "images -a -f dangling=false", "images -f label=team", "images -f label=team=y", "images -a -f label=team=x",
			"images -f since={base}", "images -f before=app:1", "images -f since=missing", "images -f nothing=1", "images -f dangling=maybe", "images a b",
			"history -q --no-trunc app:1", "history -q base:1", "history missing",
		}},
		{"names", []string{
			"tag app:1 app:2", "tag {short} short:1", "tag base:1 moved:1", "tag app:1 moved:1", "tag app:1 docker.io/library/full:1", "tag app:1 sha256:abc", "tag app:1 UP:1",
			"tag app:1 app@{base}", "tag missing x:1", "tag app:1", "tag {base} base:" + strings.Repeat("a", 128), "tag {base} base:" + strings.Repeat("a", 129), "images",
		}},
		{"tag among several", []string{"rmi app:latest", "rmi example.com:5000/team/app:1 missing:1", "rmi app:1", "images -a"}},
		{"no prune", []string{"rmi --no-prune app:1 app:latest example.com:5000/team/app:1", "images", "images -a"}},
		{"by id", []string{"rmi {app}", "rmi {short}", "rmi example.com:5000/team/app:1", "rmi {app}", "rmi app:latest", "rmi {app}", "images -a"}},
		{"by id, forced", []string{"rmi -f {short}", "rmi -f {app}", "rmi -f missing", "images -a"}},
		{"base", []string{"rmi {base}", "rmi -f {base}", "rmi {step}", "rmi -f {step}", "rmi base:1", "rmi base:1", "images", "rmi -f {app}", "images -a"}},
		{"a name moves", []string{"tag base:1 app:1", "load -i all.tar", "images", "load -i all.tar"}},
		{"errors", []string{"rmi", "rmi UP:1", "rmi -f UP:1", "save missing", "save -o x.tar app:1 missing", "load -i missing.tar", "inspect missing", "rm -f missing", "rm missing", "commit missing x:1", "export missing"}},
	} {
		w.empty(t)
		w.same(t, "load -i all.tar")
		t.Run(tc.name, func(t *testing.T) {
			for _, c := range tc.commands {
				w.same(t, c)
			}
		})
	}

	t.Run("save", func(t *testing.T) {
		w.empty(t)
		w.same(t, "load -i all.tar")
		list, history := w.runDocker(t, "images", "--format", "{{.Repository}} {{.Tag}} {{.ID}}"), w.runDocker(t, "history", "-q", "app:1")
		for _, format := range []string{"docker", "docker-old"} {
			w.runPlyfs(t, append([]string{"save", "--format", format, "-o", "back.tar", "base", "app", "example.com:5000/team/app"}, steps...)...)
			w.empty(t)
			w.same(t, "load -i back.tar")
			sameText(t, format, sortedLines(list), sortedLines(w.runDocker(t, "images", "--format", "{{.Repository}} {{.Tag}} {{.ID}}")))
			sameText(t, format, history, w.runDocker(t, "history", "-q", "app:1"))
		}
	})
	t.Run("changes", func(t *testing.T) { w.changes(t) })
}

// changes are made in commits by both.
func (w twins) changes(t *testing.T) {
	w.empty(t)
	w.same(t, "load -i rich.tar")
	w.runDocker(t, "create", "--name", "work", "rich:1")
	defer w.runDocker(t, "rm", "work")
	w.runPlyfs(t, "create", "rich:1", "work")
	for _, c := range [][]string{
		{`LABEL l=1`},
		{`CMD ["n"]`, `ENV A=2 B="$A $A" C=${P}:/y D='$A' E=\$A F=${none:-x} G=${A:+y}`, `ENV B=$A`, `EXPOSE 81 90-92/UDP`, `LABEL team=y "a b"="c $A"`},
		{`ENTRYPOINT ["n"]`, `ENV A 2  $P`, `VOLUME /u`, `VOLUME ["/a b"]`, `WORKDIR sub`, `USER u$A`, `ONBUILD RUN y`},
		{`CMD n  m`, `ENTRYPOINT n`, "ENV A=2\nENV B=3 \\\n C=4", `WORKDIR /a/../b`, `HEALTHCHECK --timeout=2s CMD ["y"]`},
		{`ENTRYPOINT n`, `CMD m`, `HEALTHCHECK NONE`},
		{`CMD ["n",1]`},
		{`ENV A`},
		{`ENV A="2`},
		{`EXPOSE 65536`},
		{`VOLUME $none`},
		{`ONBUILD FROM y`},
		{`HEALTHCHECK --retries=0 CMD y`},
		{`RUN x`},
		{``},
	} {
		args := []string{"commit", "-m", "why"}
		for _, i := range c {
			args = append(args, "-c", i)
		}
		args = append(args, "work", "changed:1")
		d := w.docker.Do("", append([]string{w.docker.DockerCLI()}, args...)...)
		p := w.plyfs.Do("", append([]string{w.bin}, args...)...)
		if d.Err != "" || p.Err != "" || (d.Code == 0) != (p.Code == 0) {
			t.Errorf("%q: docker %d %s%s, plyfs %d %s%s", c, d.Code, d.Err, d.Stderr, p.Code, p.Err, p.Stderr)
		}
		if d.Code != 0 || p.Code != 0 {
			continue
		}
		if diff := cmp.Diff(w.dockerConfig(t), w.plyfsConfig(t)); diff != "" {
			t.Errorf("%q (- docker, + plyfs):\n%s", c, diff)
		}
	}
}

// committedConfig is what commits must agree about.
type committedConfig struct {
	Author  string
	Comment string
	Layers  int
	Config  struct {
		Cmd, Entrypoint, Env, OnBuild []string
		ExposedPorts, Volumes         map[string]struct{}
		Labels                        map[string]string
		Healthcheck                   any
		User, WorkingDir, StopSignal  string
	}
}

func (w twins) dockerConfig(t *testing.T) (c committedConfig) {
	t.Helper()
	var all []struct {
		committedConfig
		RootFS struct{ Layers []string }
	}
	if err := json.Unmarshal([]byte(w.runDocker(t, "inspect", "changed:1")), &all); err != nil || len(all) != 1 {
		t.Fatalf("%d images, %v", len(all), err)
	}
	all[0].Layers = len(all[0].RootFS.Layers)
	return all[0].committedConfig
}

func (w twins) plyfsConfig(t *testing.T) (c committedConfig) {
	t.Helper()
	var all []struct {
		RawConfig struct {
			Author  string
			Config  json.RawMessage
			History []struct{ Comment string }
			RootFS  struct {
				DiffIDs []string `json:"diff_ids"`
			}
		}
	}
	if err := json.Unmarshal([]byte(w.runPlyfs(t, "inspect", "changed:1")), &all); err != nil || len(all) != 1 {
		t.Fatalf("%d images, %v", len(all), err)
	}
	raw := all[0].RawConfig
	if err := json.Unmarshal(raw.Config, &c.Config); err != nil {
		t.Fatal(err)
	}
	c.Author, c.Comment, c.Layers = raw.Author, raw.History[len(raw.History)-1].Comment, len(raw.RootFS.DiffIDs)
	return c
}
