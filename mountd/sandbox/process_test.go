package sandbox

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestProcessOf(t *testing.T) {
	text := func(s string) *string { return &s }
	path := "PATH=" + DefaultPath
	img := ocispec.ImageConfig{
		User: "app", WorkingDir: "srv/../data", Entrypoint: []string{"/entry", "-x"}, Cmd: []string{"serve"},
		Env: []string{"A=1", "B=x=y", "A=2", "noequals", "=empty"},
	}
	base := Process{User: "app", Cwd: "/data", Env: []string{"A=2", "B=x=y", path}}
	with := func(change func(*Process)) Process {
		p := base
		p.Env = append([]string(nil), base.Env...)
		change(&p)
		return p
	}
	for name, c := range map[string]struct {
		img  ocispec.ImageConfig
		o    ProcessOptions
		want Process
		err  string
	}{
		"image": {img: img, want: with(func(p *Process) { p.Args = []string{"/entry", "-x", "serve"} })},
		"command": {img: img, o: ProcessOptions{Command: []string{"ls", "-l"}}, want: with(func(p *Process) {
			p.Args = []string{"/entry", "-x", "ls", "-l"}
		})},
		"entrypoint drops the command": {img: img, o: ProcessOptions{Entrypoint: text("sh")}, want: with(func(p *Process) { p.Args = []string{"sh"} })},
		"no entrypoint":                {img: img, o: ProcessOptions{Entrypoint: text("")}, want: base},
		"both": {img: img, o: ProcessOptions{Entrypoint: text("sh"), Command: []string{"-c", "x"}}, want: with(func(p *Process) {
			p.Args = []string{"sh", "-c", "x"}
		})},
		"nothing": {want: Process{Cwd: "/", Env: []string{path}}},
		"user and directory": {o: ProcessOptions{User: "1:2", Cwd: "../../../x/./y"}, want: Process{
			User: "1:2", Cwd: "/x/y", Env: []string{path},
		}},
		"environment": {
			img:  ocispec.ImageConfig{Env: []string{"PATH=/own", "GONE=1"}},
			o:    ProcessOptions{Env: []string{"NEW=1", "GONE", "PATH=/other", "ABSENT"}},
			want: Process{Cwd: "/", Env: []string{"PATH=/other", "NEW=1"}},
		},
		"no name":    {o: ProcessOptions{Env: []string{"=x"}}, err: "no name"},
		"NUL":        {img: ocispec.ImageConfig{Cmd: []string{"a\x00b"}}, err: "NUL"},
		"NUL in env": {img: ocispec.ImageConfig{Env: []string{"A=\x00"}}, err: "NUL"},
		"NUL in dir": {img: ocispec.ImageConfig{WorkingDir: "/a\x00"}, err: "NUL"},
		"empty word": {img: ocispec.ImageConfig{Entrypoint: []string{""}}, err: "is empty"},
	} {
		got, err := ProcessOf(c.img, c.o)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: error %v, want %q", name, err, c.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

func TestParseCaps(t *testing.T) {
	names := func(add, drop string) string {
		split := func(s string) []string {
			if s == "" {
				return nil
			}
			return strings.Split(s, ",")
		}
		c, err := ParseCaps(split(add), split(drop))
		if err != nil {
			return err.Error()
		}
		return strings.Join(c.names(), " ")
	}
	all := len(capNames)
	for _, c := range []struct {
		add, drop string
		count     int
		has, not  string
	}{
		{count: 14, has: "CAP_CHOWN", not: "CAP_SYS_ADMIN"},
		{add: "sys_admin", count: 15, has: "CAP_SYS_ADMIN"},
		{drop: "CAP_NET_RAW,mknod", count: 12, not: "CAP_MKNOD"},
		{drop: "all", count: 0},
		{add: "CHOWN", drop: "ALL", count: 1, has: "CAP_CHOWN"},
		{add: "ALL", count: all, has: "CAP_CHECKPOINT_RESTORE"},
		{add: "ALL", drop: "SYS_ADMIN", count: all - 1, not: "CAP_SYS_ADMIN"},
	} {
		got := names(c.add, c.drop)
		if n := len(strings.Fields(got)); n != c.count || c.has != "" && !strings.Contains(got, c.has) || c.not != "" && strings.Contains(got, c.not) {
			t.Errorf("add %q drop %q: %d: %s", c.add, c.drop, n, got)
		}
	}
	if got := names("nonsense", ""); !strings.Contains(got, `"nonsense"`) {
		t.Errorf("nonsense: %s", got)
	}
	// 00000000a80425fb is what engines show in /proc/PID/status.
	if c, err := ParseCaps(nil, nil); c != 0xa80425fb || err != nil {
		t.Errorf("default: %x, %v", c, err)
	}
}

func TestParseVolume(t *testing.T) {
	for _, c := range []struct {
		text string
		want Volume
		err  bool
	}{
		{text: "/a:/b", want: Volume{Host: "/a", Inside: "/b"}},
		{text: "/a:/b:ro", want: Volume{Host: "/a", Inside: "/b", ReadOnly: true}},
		{text: "/a:/b:rw", want: Volume{Host: "/a", Inside: "/b"}},
		{text: "./a:/b/../c/", want: Volume{Host: "/dir/a", Inside: "/c"}},
		{text: "/a", err: true},
		{text: "/a:b", err: true},
		{text: ":/b", err: true},
		{text: "/a:/b:rx", err: true},
		{text: "/a:/", err: true},
		{text: "/a:/..", err: true},
	} {
		got, err := ParseVolume(c.text, "/dir")
		if (err != nil) != c.err || err == nil && got != c.want {
			t.Errorf("%q: %+v, %v", c.text, got, err)
		}
	}
}

func TestRuntimeSpec(t *testing.T) {
	img := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}}
	img.Config.Labels = map[string]string{"my": "label", "org.opencontainers.image.os": "pretended"}
	img.Config.ExposedPorts = map[string]struct{}{"80/tcp": {}, "443/tcp": {}}
	p := Process{Args: []string{"sh"}, Env: []string{"HOME=/own"}, Cwd: "/srv"}
	s := RuntimeSpec(img, p, User{UID: 5, Home: "/root"}, BundleOptions{IDs: IDs{Kind: HostIDs}, Hostname: "h", Caps: 1})
	if d := cmp.Diff([]string{"HOME=/own", "HOSTNAME=h"}, s.Process.Env); d != "" {
		t.Errorf("environment (-want +got):\n%s", d)
	}
	if len(s.Linux.UIDMappings) != 0 || s.Linux.Resources == nil {
		t.Errorf("root's bundle: mappings %v, resources %v", s.Linux.UIDMappings, s.Linux.Resources)
	}
	if d := cmp.Diff(map[string]string{
		"my": "label", "org.opencontainers.image.os": "linux", "org.opencontainers.image.architecture": "amd64",
		"org.opencontainers.image.exposedPorts": "443/tcp,80/tcp",
	}, s.Annotations); d != "" {
		t.Errorf("annotations (-want +got):\n%s", d)
	}
	s = RuntimeSpec(img, p, User{}, BundleOptions{IDs: oneID(1000, 1000, ""), Volumes: []Volume{{Host: "/a", Inside: "/b", ReadOnly: true}}})
	if len(s.Linux.UIDMappings) != 1 || s.Linux.UIDMappings[0].HostID != 1000 || s.Linux.Resources != nil {
		t.Errorf("user's bundle: mappings %v, resources %v", s.Linux.UIDMappings, s.Linux.Resources)
	}
	last := s.Mounts[len(s.Mounts)-1]
	if last.Source != "/a" || last.Destination != "/b" || !strings.Contains(strings.Join(last.Options, ","), "ro") {
		t.Errorf("volume: %+v", last)
	}
	for _, m := range s.Mounts { // nobody has a group 5 there
		if m.Destination == "/dev/pts" && strings.Contains(strings.Join(m.Options, ","), "gid=") {
			t.Errorf("terminals: %v", m.Options)
		}
	}
}
