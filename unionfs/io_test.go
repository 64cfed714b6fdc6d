package unionfs

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// registrar stands for the kernel's side of passthrough.
type registrar struct {
	u      *union
	open   map[int32]string // id -> content of the registered file
	last   int32
	asked  int
	refuse error
}

func register(u *union) *registrar {
	r := &registrar{u: u, open: make(map[int32]string)}
	u.SetBacking(func(fd int) (int32, error) {
		r.asked++
		if r.refuse != nil {
			return 0, r.refuse
		}
		buf := make([]byte, 100)
		n, err := unix.Pread(fd, buf, 0)
		u.must(err)
		r.last++
		r.open[r.last] = string(buf[:n])
		return r.last, nil
	}, func(id int32) {
		if _, ok := r.open[id]; !ok {
			u.t.Errorf("registration %d is given back, but not there", id)
		}
		delete(r.open, id)
	})
	return r
}

// openAs opens a file, and says how.
func (u *union) openAs(path string, flags uint32) (fuse.OpenOut, string) {
	u.t.Helper()
	var out fuse.OpenOut
	id := u.walk(path)
	if id == 0 {
		u.t.Fatalf("%s does not exist", path)
	}
	u.ok(u.Open(nil, &fuse.OpenIn{InHeader: header(id), Flags: flags}, &out))
	switch {
	case out.OpenFlags&fuse.FOPEN_PASSTHROUGH != 0 && out.BackingID == 0:
		u.t.Errorf("%s is passed through to nothing", path)
	case out.OpenFlags&fuse.FOPEN_PASSTHROUGH != 0:
		return out, "passed"
	case out.BackingID != 0:
		u.t.Errorf("%s has a registration and is not passed through", path)
	case out.OpenFlags&fuse.FOPEN_KEEP_CACHE != 0:
		return out, "cached"
	}
	return out, "cached anew"
}

func (u *union) close(path string, flags uint32, out fuse.OpenOut) {
	u.t.Helper()
	u.Release(nil, &fuse.ReleaseIn{InHeader: header(u.walk(path)), Fh: out.Fh, Flags: flags})
}

const (
	ro = unix.O_RDONLY
	rw = unix.O_RDWR
)

// TestPassThrough plays openings and closings, "-" before a step closes what the step
// has opened, and tells how each is open.
func TestPassThrough(t *testing.T) {
	type step struct {
		path  string
		flags uint32
		want  string // "": close the first that is open like this
	}
	open := func(path string, flags uint32, want string) step { return step{path, flags, want} }
	shut := func(path string, flags uint32) step { return step{path, flags, ""} }
	for _, tc := range []struct {
		name     string
		io       IO
		readOnly bool
		refuse   error
		steps    []step
		asked    int // how often the kernel is asked to register a file
	}{
		{
			name: "a lower file of a writable union is never passed", io: IOPassthrough,
			steps: []step{open("low", ro, "cached"), shut("low", ro), open("low", ro, "cached")},
		},
		{
			name: "a file of the upper is, with one registration", io: IOPassthrough, asked: 1,
			steps: []step{open("up", ro, "passed"), open("up", rw, "passed"), shut("up", ro), shut("up", rw), open("up", ro, "passed")},
		},
		{
			name: "a copied-up file is, once it is not open otherwise", io: IOPassthrough, asked: 1,
			steps: []step{
				open("low", ro, "cached"), open("low", rw, "cached"), shut("low", ro), open("low", ro, "cached"),
				shut("low", rw), open("low", rw, "cached"), shut("low", ro), shut("low", rw), open("low", rw, "passed"),
			},
		},
		{
			name: "opened for writing at once", io: IOPassthrough, asked: 1,
			steps: []step{open("low", rw, "passed"), open("low", ro, "passed")},
		},
		{
			name: "a setuid file is not passed to a writer", io: IOPassthrough, asked: 1,
			steps: []step{open("setuid", rw, "cached"), open("setuid", ro, "cached"), shut("setuid", rw), shut("setuid", ro), open("setuid", ro, "passed")},
		},
		{
			name: "unless it is passed already", io: IOPassthrough, asked: 1,
			steps: []step{open("setuid", ro, "passed"), open("setuid", rw, "passed")},
		},
		{
			name: "after passing, pages are read anew, once", io: IOPassthrough, asked: 1,
			steps: []step{
				open("setuid", ro, "passed"), shut("setuid", ro), open("setuid", rw, "cached anew"), open("setuid", ro, "cached"),
				shut("setuid", ro), shut("setuid", rw), open("setuid", ro, "passed"), shut("setuid", ro), open("setuid", rw, "cached anew"),
			},
		},
		{
			name: "a kernel that refuses for good is asked once", io: IOPassthrough, refuse: unix.EPERM, asked: 1,
			steps: []step{open("up", ro, "cached"), shut("up", ro), open("up", ro, "cached"), open("setuid", ro, "cached")},
		},
		{
			name: "one that refuses a file is asked again", io: IOPassthrough, refuse: unix.ELOOP, asked: 2,
			steps: []step{open("up", ro, "cached"), shut("up", ro), open("up", ro, "cached")},
		},
		{
			name: "io=cache passes nothing", io: IOCache,
			steps: []step{open("up", ro, "cached"), open("up", rw, "cached")},
		},
		{
			name: "a read-only union passes its lowers", io: IOPassthrough, readOnly: true, asked: 2,
			steps: []step{open("low", ro, "passed"), open("low", ro, "passed"), open("d/low", ro, "passed")},
		},
		{
			name: "a read-only union with io=cache", io: IOCache, readOnly: true,
			steps: []step{open("low", ro, "cached"), open("low", ro, "cached")},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			u := newUnionWith(t, func(o *Options) { o.IO, o.Atime = tc.io, AtimeNever }, !tc.readOnly, []string{"low", "d/low"})
			if !tc.readOnly {
				u.write("up", "up")
				u.write("setuid", "setuid")
				u.must(os.Chmod(filepath.Join(u.dir, "upper", "setuid"), 0o755|os.ModeSetuid))
			}
			// Only now, so that making the files is no part of it.
			r := register(u)
			r.refuse = tc.refuse
			handles := make(map[string][]fuse.OpenOut)
			for i, s := range tc.steps {
				key := fmt.Sprint(s.path, s.flags)
				if s.want == "" {
					u.close(s.path, s.flags, handles[key][0])
					handles[key] = handles[key][1:]
					continue
				}
				out, got := u.openAs(s.path, s.flags)
				handles[key] = append(handles[key], out)
				if got != s.want {
					t.Errorf("step %d: %s is %s, want %s", i, s.path, got, s.want)
				}
				if content := r.open[out.BackingID]; out.BackingID != 0 && content != s.path {
					t.Errorf("step %d: %s is passed through to the file %q", i, s.path, content)
				}
			}
			if r.asked != tc.asked {
				t.Errorf("%d registrations were tried, want %d", r.asked, tc.asked)
			}
			u.forgetAll()
			if len(r.open) > 0 || u.backings.Load() != 0 {
				t.Errorf("still registered when all is forgotten: %q, counted: %d", r.open, u.backings.Load())
			}
		})
	}
}

// TestIdleRegistrations: a file stays registered while nobody has it open, unless there
// are very many.
func TestIdleRegistrations(t *testing.T) {
	u := newUnionWith(t, func(o *Options) { o.IO = IOPassthrough }, true, []string{"low"})
	u.write("up", "up")
	r := register(u)
	out, _ := u.openAs("up", ro)
	second, _ := u.openAs("up", ro)
	u.close("up", ro, second)
	u.close("up", ro, out)
	if len(r.open) != 1 {
		t.Errorf("%d registrations are kept, want one", len(r.open))
	}
	out, _ = u.openAs("up", ro)
	second, _ = u.openAs("up", ro)
	u.backings.Add(maxIdleBacking) // of other files
	u.close("up", ro, second)
	if len(r.open) != 1 {
		t.Error("the registration of an open file is given back")
	}
	u.close("up", ro, out)
	if len(r.open) != 0 {
		t.Error("one of very many is kept")
	}
	if _, how := u.openAs("up", ro); how != "passed" || r.last != 2 {
		t.Errorf("opened again it is %s, after %d registrations; want passed, after 2", how, r.last)
	}
	u.backings.Add(-maxIdleBacking)
}

func TestNoOpen(t *testing.T) {
	for _, writable := range []bool{false, true} {
		u := newUnionWith(t, func(o *Options) { o.IO = IONoOpen }, writable, []string{"low"})
		r := register(u)
		in := &fuse.OpenIn{InHeader: header(u.walk("low"))}
		if s := u.Open(nil, in, &fuse.OpenOut{}); s != fuse.ENOSYS {
			t.Errorf("writable=%v: OPEN is answered with %v, want ENOSYS", writable, s)
		}
		if got := u.read("low"); got != "low" {
			t.Errorf("writable=%v: read %q", writable, got)
		}
		if !writable {
			continue
		}
		// Nobody has opened it: the first write copies it up.
		if _, s := u.Write(nil, &fuse.WriteIn{InHeader: header(u.walk("low")), Offset: 1}, []byte("written")); s != fuse.OK {
			t.Errorf("write: %v", s)
		}
		if got := u.read("low"); got != "lwritten" {
			t.Errorf("read %q after the write", got)
		}
		// A file that is created is not open otherwise than others.
		var out fuse.CreateOut
		u.ok(u.Create(nil, &fuse.CreateIn{InHeader: header(fuse.FUSE_ROOT_ID), Flags: rw, Mode: 0o644}, "new", &out))
		u.known[out.NodeId]++
		if out.OpenFlags&fuse.FOPEN_PASSTHROUGH != 0 || r.asked > 0 {
			t.Errorf("a new file is passed through (flags %#x, %d registrations)", out.OpenFlags, r.asked)
		}
	}
}

func TestResolveIO(t *testing.T) {
	for _, tc := range []struct {
		io             IO
		readOnly, root bool
		want           IO
	}{
		{IOAuto, true, true, IONoOpen},
		{IOAuto, true, false, IONoOpen},
		{IOAuto, false, true, IOPassthrough},
		{IOAuto, false, false, IOCache},
		{IOCache, true, true, IOCache},
		{IONoOpen, false, true, IONoOpen},
		{IOPassthrough, true, false, IOPassthrough},
	} {
		if got := tc.io.resolve(tc.readOnly, tc.root); got != tc.want {
			t.Errorf("%v of read-only=%v, root=%v: %v, want %v", tc.io, tc.readOnly, tc.root, got, tc.want)
		}
	}
	for io := IOAuto; io <= IOCache; io++ {
		text, err := io.MarshalText()
		var back IO
		if err == nil {
			err = back.UnmarshalText(text)
		}
		if err != nil || back != io {
			t.Errorf("%v comes back as %v, %v", io, back, err)
		}
	}
	if err := new(IO).UnmarshalText([]byte("direct")); err == nil {
		t.Error("an unknown word is taken")
	}
}

// TestPush: a small lower file goes to the kernel with the answer to its first opening.
func TestPush(t *testing.T) {
	const headroom = 40
	type pushed struct{ path, data string }
	for _, writable := range []bool{false, true} {
		u := newUnionWith(t, func(o *Options) {
			o.IO = IOCache
			for name, size := range map[string]int{"fits": handOut, "large": handOut + 1, "empty": 0} {
				data := strings.Repeat("0123456789abcdef", size/16+1)[:size]
				if err := os.WriteFile(filepath.Join(o.Lowers[0].Path, name), []byte(data), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}, writable, []string{"small", "again", "changed"})
		var got []pushed
		paths := make(map[uint64]string)
		u.SetStore(headroom, func(nodeid uint64, buf []byte) {
			got = append(got, pushed{paths[nodeid], string(buf[headroom:])})
		})
		open := func(path string, flags uint32) {
			paths[u.walk(path)] = path
			out, _ := u.openAs(path, flags)
			u.close(path, flags, out)
		}
		for _, path := range []string{"small", "small", "again", "small", "again", "empty", "large", "fits"} {
			open(path, ro)
		}
		want := []pushed{{"small", "small"}, {"again", "again"}, {"fits", strings.Repeat("0123456789abcdef", handOut/16)}}
		if writable {
			u.write("up", "data of the upper")
			open("up", ro)
			open("changed", rw) // copies it up
			open("changed", ro)
		} else {
			open("changed", ro)
			want = append(want, pushed{"changed", "changed"})
		}
		if d := cmp.Diff(want, got, cmp.AllowUnexported(pushed{})); d != "" {
			t.Errorf("writable=%v: handed to the kernel (-want +got):\n%.2000s", writable, d)
		}
	}
}

// TestPushNeedsAStore: without a way to hand data out, opening works all the same.
func TestPushNeedsAStore(t *testing.T) {
	u := newUnionWith(t, func(o *Options) { o.IO = IOCache }, true, []string{"f"})
	if _, how := u.openAs("f", ro); how != "cached" {
		t.Errorf("open: %s", how)
	}
}

// TestTold: the kernel is told to forget attributes only where it has some of another
// thread's asking.
func TestTold(t *testing.T) {
	const a, b = 100, 200
	for _, tc := range []struct {
		name    string
		told    []uint32 // threads that have been told
		changer uint32   // 0: staleAttr
		want    bool
	}{
		{"nobody has been told", nil, a, false},
		{"the changer alone", []uint32{a}, a, false},
		{"the changer alone, often", []uint32{a, a, a}, a, false},
		{"another one", []uint32{b}, a, true},
		{"both", []uint32{a, b}, a, true},
		{"both, the changer last", []uint32{b, a}, a, true},
		{"somebody unknown", []uint32{0}, a, true},
		{"the changer, then somebody unknown", []uint32{a, 0}, a, true},
		{"the kernel does not notice, nobody told", nil, 0, false},
		{"the kernel does not notice", []uint32{a}, 0, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newInode(7, 7, unix.S_IFDIR, nil)
			calls := 0
			fs := &FS{invalidate: func(id uint64, off, length int64) {
				if calls++; id != 7 || off >= 0 {
					t.Errorf("invalidate(%d, %d, %d); want the attributes of 7 only", id, off, length)
				}
			}}
			for _, pid := range tc.told {
				n.tell(pid)
			}
			change := func() {
				if tc.changer == 0 {
					fs.staleAttr(n)
				} else {
					fs.changed(n, tc.changer)
				}
			}
			change()
			if (calls == 1) != tc.want || calls > 1 {
				t.Errorf("%d messages, want one: %v", calls, tc.want)
			}
			if change(); calls > 1 {
				t.Error("a second message, though nobody has been told since")
			}
		})
	}
}

// TestChangesInvalidate: which requests make the kernel forget what.
func TestChangesInvalidate(t *testing.T) {
	u := newUnion(t, true, []string{"d/low"})
	d := u.walk("d")
	names := map[uint64]string{d: "d", u.walk("d/low"): "low"}
	var got []string
	u.SetInvalidator(func(id uint64, off, length int64) { got = append(got, fmt.Sprint(names[id], " ", off)) })
	attr := func(id uint64, pid uint32) {
		h := header(id)
		h.Pid = pid
		u.ok(u.GetAttr(nil, &fuse.GetAttrIn{InHeader: h}, &fuse.AttrOut{}))
	}
	as := func(id uint64, pid uint32) *fuse.InHeader {
		h := header(id)
		h.Pid = pid
		return &h
	}
	expect := func(what string, want ...string) {
		t.Helper()
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", what, d)
		}
		got = nil
	}
	const one, two = 1001, 1002
	mkdir := func(name string, pid uint32) {
		t.Helper()
		var out fuse.EntryOut
		u.ok(u.Mkdir(nil, &fuse.MkdirIn{InHeader: *as(d, pid), Mode: 0o755}, name, &out))
		u.known[out.NodeId]++
	}
	u.ok(u.Mkdir(nil, &fuse.MkdirIn{InHeader: *as(d, one), Mode: 0o755}, "first", &fuse.EntryOut{}))
	u.known[u.walk("d/first")]++
	got = nil // d has been copied up for it
	u.nodes.get(d).told.Store(0)

	mkdir("a", one)
	expect("nobody has been told the attributes of d")
	attr(d, one)
	mkdir("b", one)
	expect("only the changer has")
	attr(d, two)
	mkdir("c", one)
	expect("somebody else has", "d -1")
	mkdir("f", two)
	expect("nobody has since")
	attr(d, two)
	u.ok(u.Rmdir(nil, as(d, one), "f"))
	expect("removing a name is a change, too", "d -1")

	// The kernel does not know that opening a file copies it up.
	low := u.walk("d/low")
	u.nodes.get(low).told.Store(0)
	u.nodes.get(d).told.Store(0)
	attr(low, one)
	u.ok(u.Open(nil, &fuse.OpenIn{InHeader: *as(low, one), Flags: rw}, &fuse.OpenOut{}))
	expect("a copy-up changes attributes", "low -1")
	u.Release(nil, &fuse.ReleaseIn{InHeader: header(low), Flags: rw})
}
