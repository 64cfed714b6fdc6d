package sandbox

import (
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// RuntimeVersion is the version of the runtime specification that bundles follow:
// the one that every runtime in use knows.
const RuntimeVersion = "1.0.2"

// BundleOptions describe a bundle beside its process.
type BundleOptions struct {
	IDs      IDs // HostIDs: no user namespace
	Hostname string
	ReadOnly bool
	Terminal bool
	Caps     Caps
	// NoNewPrivileges is as in [Spec].
	NoNewPrivileges bool
	Volumes         []Volume
	// ImageName goes into the annotations.
	ImageName string
}

// RuntimeSpec is the config.json of a bundle that gives a process what a shell
// gives it: the same namespaces, mounts, protected paths and capabilities. The
// root is the directory rootfs beside it.
func RuntimeSpec(img ocispec.Image, p Process, u User, o BundleOptions) *specs.Spec {
	env := defaultEnv(slices.Clone(p.Env), "HOSTNAME", o.Hostname)
	env = defaultEnv(env, "HOME", u.Home)
	caps := o.Caps.names()
	s := &specs.Spec{
		Version:  RuntimeVersion,
		Hostname: o.Hostname,
		Root:     &specs.Root{Path: "rootfs", Readonly: o.ReadOnly},
		Process: &specs.Process{
			Terminal:        o.Terminal,
			User:            specs.User{UID: u.UID, GID: u.GID, AdditionalGids: u.Groups},
			Args:            p.Args,
			Env:             env,
			Cwd:             p.Cwd,
			NoNewPrivileges: o.NoNewPrivileges,
			Capabilities:    &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts:      bundleMounts(o),
		Annotations: annotations(img, o.ImageName),
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
			},
			MaskedPaths:   slices.Concat(below("/proc/", hiddenProc), below("/sys/", hiddenSys)),
			ReadonlyPaths: below("/proc/", protectedProc),
		},
	}
	if o.IDs.Kind != HostIDs {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		s.Linux.UIDMappings, s.Linux.GIDMappings = o.IDs.UIDs, o.IDs.GIDs
	} else {
		// Only the devices that the runtime makes can be opened.
		s.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}}
	}
	return s
}

func below(dir string, names []string) []string {
	var paths []string
	for _, n := range names {
		paths = append(paths, dir+n)
	}
	return paths
}

func bundleMounts(o BundleOptions) []specs.Mount {
	rootless := o.IDs.Kind != HostIDs
	pts := []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}
	if !rootless || len(o.IDs.GIDs) > 1 {
		pts = append(pts, "gid=5")
	}
	sys := specs.Mount{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}}
	if rootless { // a new one takes the owner of the network namespace
		sys = specs.Mount{Destination: "/sys", Type: "none", Source: "/sys", Options: []string{"rbind", "nosuid", "noexec", "nodev", "ro"}}
	}
	mounts := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: pts},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		sys,
	}
	for _, f := range []string{"/etc/resolv.conf", "/etc/hosts"} {
		if _, err := os.Stat(f); err == nil {
			mounts = append(mounts, specs.Mount{Destination: f, Type: "bind", Source: f, Options: []string{"bind", "ro", "nosuid", "noexec", "nodev"}})
		}
	}
	for _, v := range o.Volumes {
		opts := []string{"rbind", "nosuid", "nodev"}
		if v.ReadOnly {
			opts = append(opts, "ro")
		}
		mounts = append(mounts, specs.Mount{Destination: v.Inside, Type: "bind", Source: v.Host, Options: opts})
	}
	return mounts
}

// annotations are those of the image specification's conversion to a runtime
// configuration; labels come first, so that none pretends to be one of these.
func annotations(img ocispec.Image, name string) map[string]string {
	a := maps.Clone(img.Config.Labels)
	if a == nil {
		a = map[string]string{}
	}
	set := func(key, value string) {
		if value != "" {
			a["org.opencontainers.image."+key] = value
		}
	}
	set("os", img.OS)
	set("architecture", img.Architecture)
	set("variant", img.Variant)
	set("os.version", img.OSVersion)
	set("os.features", strings.Join(img.OSFeatures, ","))
	set("author", img.Author)
	set("stopSignal", img.Config.StopSignal)
	set("exposedPorts", strings.Join(keys(img.Config.ExposedPorts), ","))
	set("ref.name", name)
	if img.Created != nil {
		set("created", img.Created.Format(time.RFC3339Nano))
	}
	return a
}
