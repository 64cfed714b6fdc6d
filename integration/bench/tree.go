package main

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
)

// imageSpec makes a stack like that of a Debian image with programs installed
// in it: a base, three installations, a change of configuration that replaces
// and deletes, and an application. scale 1 gives about 17 000 names in the
// merged tree; it is the same on every machine.
func imageSpec(scale float64) stackSpec {
	g := &imageGen{random: rand.New(rand.NewPCG(17, 23))}
	n := func(packages int) int { return max(2, int(float64(packages)*scale)) }
	s := stackSpec{g.install(n(230)), g.install(n(110)), g.install(n(60)), g.modules(n(3200)), g.change(n(40)), g.app(n(1600))}
	return s
}

// imageGen keeps what lower layers have, for the layers above.
type imageGen struct {
	random   *rand.Rand
	packages int
	names    []string // all packages
}

// size draws from a log-normal distribution, as sizes of files in images are:
// half are below median, a few are very much larger.
func (g *imageGen) size(median, sigma float64) int64 {
	return int64(median * math.Exp(min(g.random.NormFloat64(), 3)*sigma))
}

func (g *imageGen) word() string {
	const syllables = "ba ce di fo gu ka le mi no pu ra se ti vo xu za"
	all := strings.Fields(syllables)
	var w strings.Builder
	for range 2 + g.random.IntN(3) {
		w.WriteString(all[g.random.IntN(len(all))])
	}
	return w.String()
}

// install is a layer that n packages are installed in.
func (g *imageGen) install(n int) layerSpec {
	b := newBuilder()
	for range n {
		g.pack(b)
	}
	g.database(b)
	return b.spec
}

// pack adds the files of one package: documentation, translations, a library
// with its links, programs, data in a few directories, entries of the package
// manager.
func (g *imageGen) pack(b *builder) {
	g.packages++
	name := fmt.Sprintf("%s%d", g.word(), g.packages)
	g.names = append(g.names, name)
	b.file("usr/share/doc/"+name+"/copyright", g.size(3000, 1))
	b.file("usr/share/doc/"+name+"/changelog.Debian.gz", g.size(1500, 1.2))
	for i := range g.random.IntN(3) {
		program := name + []string{"", "-config", "ctl"}[i]
		b.add(entry{path: "usr/bin/" + program, kind: aFile, size: g.size(30000, 1.1), mode: 0o755})
		b.file("usr/share/man/man1/"+program+".1.gz", g.size(2000, 0.8))
	}
	if g.random.IntN(3) == 0 {
		lib := "usr/lib/x86_64-linux-gnu/lib" + name + ".so"
		b.file(lib+".1.2.3", g.size(90000, 1.1))
		b.add(entry{path: lib + ".1", kind: aSymlink, target: "lib" + name + ".so.1.2.3"})
		b.add(entry{path: lib, kind: aSymlink, target: "lib" + name + ".so.1"})
	}
	for _, lang := range []string{"cs", "de", "es", "fr", "it", "ja", "pl", "pt_BR", "ru", "sv", "zh_CN"}[:g.random.IntN(12)] {
		b.file("usr/share/locale/"+lang+"/LC_MESSAGES/"+name+".mo", g.size(6000, 1))
	}
	for range g.random.IntN(6) {
		dir := "usr/share/" + name + "/" + g.word()
		if g.random.IntN(2) == 0 {
			dir += "/" + g.word()
		}
		for i := range 1 + g.random.IntN(9) {
			b.file(fmt.Sprintf("%s/%s%d", dir, g.word(), i), g.size(1800, 1.5))
		}
	}
	if g.random.IntN(4) == 0 {
		b.file("etc/"+name+"/"+name+".conf", g.size(900, 1))
	}
	if g.random.IntN(8) == 0 {
		b.file("usr/share/"+name+"/hard", g.size(4000, 1))
		b.add(entry{path: "usr/share/" + name + "/link", kind: aHardlink, target: "usr/share/" + name + "/hard"})
	}
	b.file("var/lib/dpkg/info/"+name+".list", g.size(1200, 0.8))
	b.file("var/lib/dpkg/info/"+name+".md5sums", g.size(1200, 0.8))
}

// database is what every installation rewrites.
func (g *imageGen) database(b *builder) {
	b.file("var/lib/dpkg/status", int64(g.packages)*900)
	b.file("var/lib/dpkg/status-old", int64(g.packages)*880)
	b.file("var/log/dpkg.log", int64(g.packages)*700)
	b.file("etc/ld.so.cache", 20000)
}

// modules is a layer with n files of a language's library, nested deeply.
func (g *imageGen) modules(n int) layerSpec {
	b := newBuilder()
	var dir string
	for i := range n {
		if i%17 == 0 {
			dir = "usr/lib/python3/dist-packages/" + g.word()
			for range g.random.IntN(4) {
				dir += "/" + g.word()
			}
		}
		b.file(fmt.Sprintf("%s/%s%d.py", dir, g.word(), i), g.size(3500, 1.3))
	}
	g.database(b)
	return b.spec
}

// change replaces the configuration of n packages, removes the documentation
// of n others, and makes one directory anew.
func (g *imageGen) change(n int) layerSpec {
	b := newBuilder()
	for i := range min(n, len(g.names)/2) {
		b.file("usr/share/doc/"+g.names[i]+"/copyright", g.size(3000, 1))
		b.add(entry{path: "usr/share/doc/" + g.names[len(g.names)-1-i], kind: aWhiteout})
	}
	b.add(entry{path: "usr/share/man/man1", kind: anOpaqueDir, mode: 0o755})
	b.file("usr/share/man/man1/"+g.names[0]+".1.gz", 2000)
	g.database(b)
	return b.spec
}

// app is an application with n files, and one large data file.
func (g *imageGen) app(n int) layerSpec {
	b := newBuilder()
	b.file("srv/app/data.bin", 24<<20)
	for i := range n {
		b.file(fmt.Sprintf("srv/app/%s/d%d/%s%d.js", []string{"lib", "static", "views"}[i%3], i/40, g.word(), i), g.size(4000, 1.4))
	}
	return b.spec
}
