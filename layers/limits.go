package layers

// Limits bound what an archive may make us do. They stop bombs, not images:
// the defaults are far above any real one.
type Limits struct {
	Entries    int64 // tar entries of one layer
	LayerBytes int64 // uncompressed bytes of one layer
	Layers     int   // layers of one image
	Depth      int   // path components
	XattrBytes int64 // of one entry, names and values
	Manifest   int64 // bytes of manifest.json, index.json or a manifest
	Config     int64 // bytes of an image config
	JSONDepth  int
	Members    int // entries of an image archive
}

func (l Limits) withDefaults() Limits {
	def := func(p *int64, v int64) {
		if *p == 0 {
			*p = v
		}
	}
	defInt := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	def(&l.Entries, 20_000_000)
	def(&l.LayerBytes, 4<<40)
	def(&l.XattrBytes, 1<<20)
	def(&l.Manifest, 4<<20)
	def(&l.Config, 8<<20)
	defInt(&l.Layers, 1000)
	defInt(&l.Depth, 1024)
	defInt(&l.JSONDepth, 64)
	defInt(&l.Members, 200_000)
	return l
}
