package layers

import (
	"fmt"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

// thisPlatform is the one of this machine.
func thisPlatform() string { return platformName(runtime.GOOS, runtime.GOARCH, "") }

// isPlatform reports whether an image for name is one for want, which may leave the
// variant open.
func isPlatform(name, want string) bool { return name == want || strings.HasPrefix(name, want+"/") }

func platformName(os, arch, variant string) string {
	n := os + "/" + arch
	if variant != "" {
		n += "/" + variant
	}
	return n
}

// other names of architectures, as uname and others have them.
var archAliases = map[string]string{
	"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386", "i686": "386", "armhf": "arm/v7", "armel": "arm/v6",
}

var (
	platformPart = regexp.MustCompile(`^[a-z0-9_.-]+$`)
	knownArchs   = []string{"386", "amd64", "arm", "arm64", "loong64", "mips64le", "ppc64le", "riscv64", "s390x"}
)

// parsePlatform reads OS/ARCH[/VARIANT], OS or ARCH, and gives the usual names; "" stays.
func parsePlatform(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	bad := fmt.Errorf("%w: platform %q: expected OS/ARCH[/VARIANT], as linux/amd64", ErrInvalid, s)
	parts := strings.Split(strings.ToLower(s), "/")
	for i, p := range parts {
		if !platformPart.MatchString(p) {
			return "", bad
		}
		if full := archAliases[p]; full != "" && (i == 1 || len(parts) == 1) {
			parts[i] = full
		}
	}
	switch n := len(parts); {
	case n > 3:
		return "", bad
	case n == 1 && parts[0] == "linux":
		return platformName("linux", runtime.GOARCH, ""), nil
	case n == 1:
		if arch, _, _ := strings.Cut(parts[0], "/"); !slices.Contains(knownArchs, arch) {
			return "", bad
		}
		parts = append([]string{"linux"}, parts...)
	case n == 3 && parts[1] == "arm64" && parts[2] == "v8": // there is no other
		parts = parts[:2]
	}
	return strings.Join(parts, "/"), nil
}
