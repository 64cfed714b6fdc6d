package mountd

import (
	"bytes"
	"context"
	"net/http"
	"strconv"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/metrics"
	"github.com/plyfs/plyfs/unionfs/counters"
)

const (
	metricsPath = "/metrics"
	// scrapesAtOnce is how many documents are made at once; more are refused.
	scrapesAtOnce = 4
	// scrapeTimeout bounds the making of one.
	scrapeTimeout = 20 * time.Second
	// maxMetricMounts is how many mounts have series of their own: each has some hundreds.
	maxMetricMounts = 200
	// sizesAge is how old sizes of the store may be. To find them out, all files of the
	// store are looked at.
	sizesAge = 5 * time.Minute
	// sizesWait is how long a document waits for them; it is made without, or with the last
	// ones, if they take longer.
	sizesWait = 3 * time.Second
	// sizesTimeout ends a measurement that does not come to an end.
	sizesTimeout = 10 * time.Minute
)

// metricsHandler makes documents for Prometheus. Mounts are asked each time, sizes of the
// store are remembered.
type metricsHandler struct {
	svc   Service
	log   *zap.Logger
	slots chan struct{}

	mu        sync.Mutex
	sizes     *layers.DiskUsage // guarded by mu; nil: not known yet
	measured  time.Time         // guarded by mu
	measuring chan struct{}     // guarded by mu; closed when the running measurement is done
}

func newMetrics(svc Service, log *zap.Logger) *metricsHandler {
	return &metricsHandler{svc: svc, log: log, slots: make(chan struct{}, scrapesAtOnce)}
}

// ServeHTTP implements http.Handler.
func (h *metricsHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	select {
	case h.slots <- struct{}{}:
		defer func() { <-h.slots }()
	default:
		http.Error(w, "too many ask at once", http.StatusServiceUnavailable)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), scrapeTimeout)
	defer cancel()
	var doc bytes.Buffer
	err := h.write(ctx, &doc)
	logCall(h.log, "metrics", err)
	if err != nil {
		writeError(w, err)
		return
	}
	w.Header().Set("Content-Type", metrics.ContentType)
	_, _ = w.Write(doc.Bytes()) // a client that is gone does not want it
}

func (h *metricsHandler) write(ctx context.Context, doc *bytes.Buffer) error {
	info, err := h.svc.Info(ctx, Empty{})
	if err != nil {
		return err
	}
	list, err := h.svc.List(ctx, Empty{})
	if err != nil {
		return err
	}
	mounts, err := h.svc.Stats(ctx, StatsRequest{})
	if err != nil {
		return err
	}
	w := metrics.NewWriter(doc)
	w.Family("plyfs_build_info", metrics.Gauge, "The daemon; always 1.")
	w.Sample(1, metrics.Label{Name: "version", Value: info.Version})
	writeStates(w, list)
	if u := h.storeSizes(ctx); u != nil {
		writeSizes(w, u)
	}
	writeMounts(w, mounts)
	return w.Flush()
}

// writeStates writes how many containers and mounts there are in each state, also those
// in which there are none: so that a series does not vanish.
func writeStates(w *metrics.Writer, list []Status) {
	n := map[string]int{}
	for _, s := range list {
		n[s.State]++
	}
	w.Family("plyfs_mounts", metrics.Gauge, "Containers and read-only mounts of images by state.")
	for _, state := range []string{StateCreated, StateStarting, StateMounted, StateDetached, StateDead, StateBroken, StateWanted} {
		w.Sample(float64(n[state]), metrics.Label{Name: "state", Value: state})
	}
}

func writeSizes(w *metrics.Writer, u *layers.DiskUsage) {
	for _, f := range []struct {
		name, help string
		n          int
	}{
		{"plyfs_images", "Images in the store.", u.Images.Count},
		{"plyfs_layers", "Layers in the store.", u.Layers.Count},
		{"plyfs_containers", "Containers in the store.", u.Containers.Count},
	} {
		w.Family(f.name, metrics.Gauge, f.help)
		w.Sample(float64(f.n))
	}
	w.Family("plyfs_store_bytes", metrics.Gauge, "Bytes that the store takes on disk, by what they are for.")
	for _, p := range []struct {
		what string
		n    int64
	}{
		{"layers", u.Layers.Size},
		{"containers", u.Containers.Size},
		{"chains", u.Chains},
		{"blobs", u.Blobs},
		{"init", u.Init},
		{"stage", u.Stage},
		{"trash", u.Trash},
		{"database", u.Database},
		{"records", u.Records},
		{"other", u.Other},
	} {
		w.Sample(float64(p.n), metrics.Label{Name: "what", Value: p.what})
	}
}

// storeSizes returns what is known of the sizes; nil if nothing is yet.
func (h *metricsHandler) storeSizes(ctx context.Context) *layers.DiskUsage {
	h.mu.Lock()
	if h.measuring == nil && (h.sizes == nil || time.Since(h.measured) > sizesAge) {
		done := make(chan struct{})
		h.measuring = done
		go h.measure(context.WithoutCancel(ctx), done)
	}
	running := h.measuring
	h.mu.Unlock()
	if running != nil {
		patience := time.NewTimer(sizesWait)
		defer patience.Stop()
		select {
		case <-running:
		case <-patience.C:
		case <-ctx.Done():
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sizes
}

// measure finds the sizes out.
func (h *metricsHandler) measure(ctx context.Context, done chan struct{}) {
	ctx, cancel := context.WithTimeout(ctx, sizesTimeout)
	defer cancel()
	u, err := h.svc.DiskUsage(ctx, Empty{})
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		h.log.Warn("sizes of the store for metrics", zap.Error(err))
	} else {
		h.sizes, h.measured = &u, time.Now()
	}
	h.measuring = nil
	close(done)
}

// writeMounts writes what servers have counted.
func writeMounts(w *metrics.Writer, all []MountStats) {
	more := max(len(all)-maxMetricMounts, 0)
	all = all[:len(all)-more]
	w.Family("plyfs_mounts_left_out", metrics.Gauge, "Mounts without series of their own, because there are too many.")
	w.Sample(float64(more))
	w.Family("plyfs_mount_info", metrics.Gauge, "A mount; always 1.")
	for _, m := range all {
		w.Sample(1, append(labelsOf(m), metrics.Label{Name: "container", Value: m.Container}, metrics.Label{Name: "image", Value: m.ImageID.String()},
			metrics.Label{Name: "state", Value: m.State}, metrics.Label{Name: "io", Value: m.IO}, metrics.Label{Name: "read_only", Value: strconv.FormatBool(m.ReadOnly)})...)
	}
	each := func(name, kind, help string, value func(m MountStats) float64) {
		w.Family(name, kind, help)
		for _, m := range all {
			w.Sample(value(m), labelsOf(m)...)
		}
	}
	each("plyfs_mount_up", metrics.Gauge, "Whether the server of the mount has answered.", func(m MountStats) float64 {
		if m.Counters == nil {
			return 0
		}
		return 1
	})
	each("plyfs_mount_start_time_seconds", metrics.Gauge, "When it was mounted, in seconds since 1970.", func(m MountStats) float64 { return float64(m.Mounted.Unix()) })
	each("plyfs_mount_restarts_total", metrics.Counter, "Servers of the mount that have died and were followed by another.", func(m MountStats) float64 { return float64(m.Restarts) })

	var answered []MountStats
	for _, m := range all {
		if m.Counters != nil {
			answered = append(answered, m)
		}
	}
	all = answered
	for _, f := range mountFamilies {
		each(f.name, f.kind, f.help, func(m MountStats) float64 { return f.value(m.Counters) })
	}
	w.Family("plyfs_opens_total", metrics.Counter, "Files opened, by how their data reaches programs.")
	for _, m := range all {
		w.Sample(float64(m.Counters.Opens.Passed), append(labelsOf(m), metrics.Label{Name: "how", Value: "passthrough"})...)
		w.Sample(float64(m.Counters.Opens.Cached), append(labelsOf(m), metrics.Label{Name: "how", Value: "cached"})...)
	}
	writeRequests(w, all)
}

// mountFamilies are the counters that have no labels but those of the mount.
var mountFamilies = []struct {
	name, kind, help string
	value            func(*counters.Snapshot) float64
}{
	{"plyfs_requests_in_flight", metrics.Gauge, "Requests being answered.", func(s *counters.Snapshot) float64 { return float64(s.Answering) }},
	{"plyfs_requests_in_flight_max", metrics.Gauge, "The most requests that were answered at once.", func(s *counters.Snapshot) float64 { return float64(s.AnsweringMost) }},
	{"plyfs_read_bytes_total", metrics.Counter, "Bytes of files that the server gave to programs.", func(s *counters.Snapshot) float64 { return float64(s.BytesRead) }},
	{"plyfs_written_bytes_total", metrics.Counter, "Bytes of files that the server got from programs.", func(s *counters.Snapshot) float64 { return float64(s.BytesWritten) }},
	{"plyfs_copy_ups_total", metrics.Counter, "Objects copied to the writable layer.", func(s *counters.Snapshot) float64 { return float64(s.CopyUps.Count) }},
	{"plyfs_copy_ups_metadata_total", metrics.Counter, "Of these, files copied without their data.", func(s *counters.Snapshot) float64 { return float64(s.CopyUps.Metadata) }},
	{"plyfs_copy_ups_completed_total", metrics.Counter, "Of those, files that have got their data later.", func(s *counters.Snapshot) float64 { return float64(s.CopyUps.Completed) }},
	{"plyfs_copy_up_bytes_total", metrics.Counter, "Bytes of data copied, or shared, by copy-ups.", func(s *counters.Snapshot) float64 { return float64(s.CopyUps.Bytes) }},
	{"plyfs_invalidations_total", metrics.Counter, "Messages to the kernel to forget something.", func(s *counters.Snapshot) float64 { return float64(s.Invalidations) }},
	{"plyfs_stored_files_total", metrics.Counter, "Small files whose data the kernel was given unasked.", func(s *counters.Snapshot) float64 { return float64(s.Stored) }},
}

// writeRequests writes the families that have a label for the operation. Names of
// operations are ours: see [counters.OpNames].
func writeRequests(w *metrics.Writer, all []MountStats) {
	op := func(m MountStats, o counters.Operation) []metrics.Label {
		return append(labelsOf(m), metrics.Label{Name: "op", Value: o.Name})
	}
	w.Family("plyfs_request_errors_total", metrics.Counter, "Requests answered with an error, by its class; not_found, no_data and not_offered are ordinary answers.")
	for _, m := range all {
		for _, o := range m.Counters.Operations {
			for _, c := range counters.Classes() {
				if n := o.Errors[c.String()]; n > 0 {
					w.Sample(float64(n), append(op(m, o), metrics.Label{Name: "class", Value: c.String()})...)
				}
			}
		}
	}
	w.Histograms("plyfs_request_duration_seconds", "Time to make the answer to a request of the kernel, without its way there and back.")
	for _, m := range all {
		for _, o := range m.Counters.Operations {
			w.Histogram(bucketsOf(o.Time), float64(o.Time.Nanoseconds)/1e9, o.Count, op(m, o)...)
		}
	}
}

// bucketsOf returns every second bucket, which is enough for quantiles over many mounts,
// and half of the series.
func bucketsOf(h counters.Histogram) []metrics.Bucket {
	var out []metrics.Bucket
	n := uint64(0)
	for i, c := range h.Buckets {
		n += c
		if bound := counters.Bound(i); i%2 == 0 && bound != 0 {
			out = append(out, metrics.Bucket{Bound: bound.Seconds(), Count: n})
		}
	}
	return out
}

// labelsOf returns the labels that all series of a mount have.
func labelsOf(m MountStats) []metrics.Label {
	return []metrics.Label{{Name: "mount", Value: m.ID}, {Name: "target", Value: string(m.Target)}}
}
