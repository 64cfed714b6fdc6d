package layers

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// changed applies changes to a config, and gives what there is of it then.
func changed(config string, changes ...string) (string, error) {
	list, err := parseChanges(changes)
	if err != nil {
		return "", err
	}
	raw, err := childConfig([]byte(`{"config":`+config+`}`), ocispec.History{}, "", list)
	if err != nil {
		return "", err
	}
	var out struct{ Config json.RawMessage }
	err = json.Unmarshal(raw, &out)
	return string(out.Config), err
}

// TestChanges: what stands here is what docker 20.10 makes of the same changes, import
// (no config) and commit, but for what the comments say.
func TestChanges(t *testing.T) {
	for _, tc := range []struct {
		changes []string
		want    string
	}{
		{[]string{`CMD ["a","b"]`}, `{"Cmd":["a","b"]}`},
		{[]string{`CMD [ "a" , "b" ]`}, `{"Cmd":["a","b"]}`},
		{[]string{`CMD  spaces   inside `}, `{"Cmd":["/bin/sh","-c","spaces   inside"]}`},
		{[]string{`CMD ["a", b]`}, `{"Cmd":["/bin/sh","-c","[\"a\", b]"]}`},
		{[]string{`CMD echo "$A"`}, `{"Cmd":["/bin/sh","-c","echo \"$A\""]}`},
		{[]string{`CMD []`}, `{"Cmd":[]}`},
		{[]string{`cmd x`}, `{"Cmd":["/bin/sh","-c","x"]}`},
		{[]string{`ENTRYPOINT ["x"]`}, `{"Entrypoint":["x"]}`},
		{[]string{`CMD x`, `ENTRYPOINT ["y"]`}, `{"Cmd":["/bin/sh","-c","x"],"Entrypoint":["y"]}`},
		{[]string{`ENV A=1`}, `{"Env":["A=1"]}`},
		{[]string{"ENV\tA=1"}, `{"Env":["A=1"]}`},
		{[]string{`ENV A 1 $B "q" \$x`}, `{"Env":["A=1  q $x"]}`},
		{[]string{`ENV A=1 B="x y" C=a\ b D='q r'`}, `{"Env":["A=1","B=x y","C=a b","D=q r"]}`},
		{[]string{`ENV A="\"q\"" B="a\nb" C=a\\b D='a\b'`}, `{"Env":["A=\"q\"","B=a\\nb","C=a\\b","D=a\\b"]}`},
		{[]string{`ENV A=$ B=a$$b C=$1x D=\$B E='$B' F=~/x G=a#b H=`}, `{"Env":["A=$","B=ab","C=x","D=$B","E=$B","F=~/x","G=a#b","H="]}`},
		{[]string{`ENV A=${B:-dflt} C=${B:+x} D=${B:-${A:-deep}}`}, `{"Env":["A=dflt","C=","D=deep"]}`},
		{[]string{`ENV A=1`, `ENV A=2 B=$A`, `ENV C=${A}3`}, `{"Env":["A=2","B=1","C=23"]}`},
		{[]string{`ENV "A B"=c A"B"=c`}, `{"Env":["A B=c","AB=c"]}`},
		{[]string{"ENV A=1\nENV B=2"}, `{"Env":["A=1","B=2"]}`},
		{[]string{"ENV A=1 \\\n # no comment of the value\n\n B=2"}, `{"Env":["A=1","B=2"]}`},
		{[]string{`ENV A=1\`}, `{"Env":["A=1"]}`},
		{[]string{`EXPOSE 80 443/tcp 53/UDP 80`}, `{"ExposedPorts":{"443/tcp":{},"53/udp":{},"80/tcp":{}}}`},
		{[]string{`EXPOSE 80-82 8080:90 1.2.3.4:1:91/sctp`}, `{"ExposedPorts":{"80/tcp":{},"81/tcp":{},"82/tcp":{},"90/tcp":{},"91/sctp":{}}}`},
		{[]string{`ENV P="1 2"`, `EXPOSE $P`}, `{"Env":["P=1 2"],"ExposedPorts":{"1/tcp":{},"2/tcp":{}}}`},
		{[]string{`LABEL a=b`, `LABEL a=c "x y"="z $Q"`}, `{"Labels":{"a":"c","x y":"z "}}`},
		{[]string{`LABEL a b "c" $D`}, `{"Labels":{"a":"b c "}}`},
		{[]string{`ONBUILD  run   $x`}, `{"OnBuild":["run   $x"]}`},
		{[]string{`USER 1:2`}, `{"User":"1:2"}`},
		{[]string{`ENV U=me`, `USER ${U}:g`}, `{"Env":["U=me"],"User":"me:g"}`},
		{[]string{`VOLUME /a /b`, `VOLUME ["/c d"]`}, `{"Volumes":{"/a":{},"/b":{},"/c d":{}}}`},
		{[]string{`WORKDIR rel`}, `{"WorkingDir":"/rel"}`},
		{[]string{`WORKDIR /a/../b/`}, `{"WorkingDir":"/a/../b/"}`},
		{[]string{`WORKDIR "/q q"`, `WORKDIR b`}, `{"WorkingDir":"/q q/b"}`},
		{[]string{`HEALTHCHECK none`}, `{"Healthcheck":{"Test":["NONE"]}}`},
		{[]string{`HEALTHCHECK CMD x  y`}, `{"Healthcheck":{"Test":["CMD-SHELL","x  y"]}}`},
		{
			[]string{`HEALTHCHECK --interval=5s --timeout=3s --retries=2 --start-period=1m CMD ["x","y"]`},
			`{"Healthcheck":{"Test":["CMD","x","y"],"Interval":5000000000,"Timeout":3000000000,"StartPeriod":60000000000,"Retries":2}}`,
		},
		{[]string{`STOPSIGNAL SIGINT`}, `{"StopSignal":"SIGINT"}`}, // docker refuses it here
		{[]string{`CMD`}, `{"Cmd":[]}`},                            // docker: a shell without a command
	} {
		if got, err := changed(`{}`, tc.changes...); err != nil || got != tc.want {
			t.Errorf("%q: %v\n got %s\nwant %s", tc.changes, err, got, tc.want)
		}
	}
	const image = `{"Cmd":["c"],"Entrypoint":["e"],"Env":["A=1","P=/x"],"ExposedPorts":{"80/tcp":{}},"Healthcheck":{"Test":["CMD","h"],"Interval":5,"Retries":3},` +
		`"Hostname":"kept","Labels":{"k":"v"},"OnBuild":["RUN x"],"Volumes":{"/v":{}},"WorkingDir":"/w"}`
	for _, tc := range []struct{ change, key, want string }{
		{`CMD n`, "Cmd", `["/bin/sh","-c","n"]`},
		{`CMD n`, "Entrypoint", `["e"]`},
		{`ENTRYPOINT n`, "Cmd", ``}, // its arguments were for another program
		{`ENTRYPOINT []`, "Cmd", `["c"]`},
		{`ENTRYPOINT []`, "Entrypoint", `[]`}, // docker keeps ["e"], and so it does with CMD
		{`ENV P=$P:/y N=$A A=2`, "Env", `["A=2","P=/x:/y","N=1"]`},
		{`EXPOSE 81`, "ExposedPorts", `{"80/tcp":{},"81/tcp":{}}`},
		{`LABEL l=$A`, "Labels", `{"k":"v","l":"1"}`},
		{`VOLUME /u`, "Volumes", `{"/u":{},"/v":{}}`},
		{`WORKDIR b`, "WorkingDir", `"/w/b"`},
		{`ONBUILD RUN y`, "OnBuild", `["RUN y"]`},
		{`LABEL l=1`, "OnBuild", ``}, // it was for this image
		{`HEALTHCHECK --timeout=2ms CMD y`, "Healthcheck", `{"Test":["CMD-SHELL","y"],"Interval":5,"Timeout":2000000,"Retries":3}`},
		{`LABEL l=1`, "Healthcheck", `{"Test":["CMD","h"],"Interval":5,"Retries":3}`},
		{`LABEL l=1`, "Hostname", `"kept"`},
	} {
		got, err := changed(image, tc.change)
		var config map[string]json.RawMessage
		if err == nil {
			err = json.Unmarshal([]byte(got), &config)
		}
		if err != nil || string(config[tc.key]) != tc.want {
			t.Errorf("%q: %v\n got %s\nwant %s", tc.change, err, config[tc.key], tc.want)
		}
	}
}

// TestChangesThatAreNone: docker refuses them, too, but for a few.
func TestChangesThatAreNone(t *testing.T) {
	for _, c := range []string{
		``, `# comment`, `RUN x`, `COPY a b`, `FOO x`, `MAINTAINER me`, `SHELL ["/bin/x"]`, "ENV A=1\nRUN x",
		`CMD ["a",1]`, `ENV`, `ENV A`, `ENV =x`, `ENV A=1 B`, `ENV A="x`, `ENV A='x`, `ENV A=${B`, `ENV A=${}`, `ENV A=${B!x}`, `ENV A=${B:?gone}`, `ENV A=1 # c`,
		`LABEL a`, `LABEL a=b c`, `EXPOSE`, `EXPOSE x`, `EXPOSE 65536`, `EXPOSE 82-80`, `EXPOSE 80:`, `EXPOSE 80/foo`, `EXPOSE -1`,
		`ONBUILD`, `ONBUILD FROM x`, `ONBUILD maintainer x`, `ONBUILD ONBUILD RUN x`, `USER`, `USER "a`, `VOLUME`, `VOLUME []`, `VOLUME ""`, `VOLUME $A /x`, `VOLUME "/a b"`,
		`WORKDIR`, `WORKDIR ""`, `HEALTHCHECK`, `HEALTHCHECK x`, `HEALTHCHECK NONE x`, `HEALTHCHECK CMD`, `HEALTHCHECK CMD []`, `HEALTHCHECK --bad=1 CMD x`,
		`HEALTHCHECK --interval=1ns CMD x`, `HEALTHCHECK --interval=x CMD x`, `HEALTHCHECK --interval 5s CMD x`, `HEALTHCHECK --retries=0 CMD x`, `HEALTHCHECK --timeout=5s --timeout=6s CMD x`,
		// These are accepted by docker.
		`LABEL ""=x`, `ENV $A=b`, `HEALTHCHECK --interval= CMD x`,
	} {
		if got, err := changed(`{}`, c); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %s %v", c, got, err)
		}
	}
	// A variable cannot be made to grow without end.
	double := []string{"ENV A=" + strings.Repeat("x", 1<<10)}
	for range 40 {
		double = append(double, `ENV A="$A$A"`)
	}
	if _, err := changed(`{}`, double...); !errors.Is(err, ErrInvalid) {
		t.Error("doubled forty times:", err)
	}
}

// TestChangeIsRefusedFirst: nobody waits for an archive to be read, or a layer to be made.
func TestChangeIsRefusedFirst(t *testing.T) {
	s := openStore(t)
	baseImage(t, s)
	create(t, s, "base", "c")
	changes := []string{"VOLUME $NOTHING"}
	r := strings.NewReader("whatever")
	if _, err := s.Import(t.Context(), r, "x", ImportOptions{Changes: changes}); !errors.Is(err, ErrInvalid) || r.Len() != len("whatever") {
		t.Error("import:", err)
	}
	before := len(listLayers(t, s))
	if _, err := s.Commit(t.Context(), "c", "x", CommitOptions{Changes: changes}); !errors.Is(err, ErrInvalid) || len(listLayers(t, s)) != before {
		t.Error("commit:", err)
	}
	clean(t, s)
}

// TestCommitForgetsAuthor: they are of the image it was made from.
func TestCommitForgetsAuthor(t *testing.T) {
	got, err := childConfig([]byte(`{"author":"a","comment":"c","os":"linux","x":1}`), ocispec.History{}, "", nil)
	must(t, err)
	if d := cmp.Diff(`{"config":{},"created":null,"history":[{}],"os":"linux","rootfs":{"diff_ids":[],"type":"layers"},"x":1}`, string(got)); d != "" {
		t.Error(d)
	}
}

// TestPlatforms gives images platforms under all their names.
func TestPlatforms(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "linux/amd64": "linux/amd64", "arm64": "linux/arm64", "aarch64": "linux/arm64", "linux/x86_64": "linux/amd64", "Linux/AMD64": "linux/amd64",
		"linux/arm/v7": "linux/arm/v7", "linux/arm64/v8": "linux/arm64", "armhf": "linux/arm/v7", "linux/i386": "linux/386", "linux": thisPlatform(), "windows/amd64": "windows/amd64",
	} {
		if got, err := parsePlatform(in); err != nil || got != want {
			t.Errorf("%q: %q %v", in, got, err)
		}
	}
	for _, in := range []string{"foo", "linux/", "/amd64", "linux/arm/v7/x", "li nux/x", "linux/a\nb"} {
		if got, err := parsePlatform(in); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %q %v", in, got, err)
		}
	}
	if !slices.IsSorted(knownArchs) {
		t.Error("not in order:", knownArchs)
	}
	s := openStore(t)
	i, err := s.Import(t.Context(), bytes.NewReader(layerTar(t, file("f", "1"))), "x", ImportOptions{Platform: "aarch64"})
	must(t, err)
	if i.Platform != "linux/arm64" || i.Config.Architecture != "arm64" {
		t.Errorf("%+v", i)
	}
}
