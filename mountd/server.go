package mountd

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"reflect"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd/events"
)

// NewHandler serves svc as the API of wire.go. Connections must come with the
// peer's user, see connContext.
func NewHandler(svc Service, log *zap.Logger) http.Handler {
	if log == nil {
		log = zap.NewNop()
	}
	return newHandler(svc, newMetrics(svc, log), log)
}

// newHandler is NewHandler with metrics that are served elsewhere, too.
func newHandler(svc Service, metrics http.Handler, log *zap.Logger) http.Handler {
	a := &api{mux: http.NewServeMux(), log: log}
	a.register(svc)
	a.mux.HandleFunc("GET /"+apiVersion+"/openapi.json", func(w http.ResponseWriter, _ *http.Request) {
		doc, err := OpenAPI()
		if err != nil {
			writeError(w, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(doc) // a client that is gone does not want it
	})
	a.mux.Handle("GET "+metricsPath, metrics)
	a.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, markedf(layers.ErrUnsupported, "the daemon has no call %q: is it older than the command?", r.URL.Path))
	})
	return authorise(a.mux)
}

// api collects the calls of the API, and serves them if it has a mux.
type api struct {
	mux    *http.ServeMux // nil: the calls are only described
	log    *zap.Logger
	routes []route
}

// routes describes every call.
func routes() []route {
	a := &api{}
	a.register(&Client{}) // of which nothing is called
	return a.routes
}

func (a *api) register(svc Service) {
	call(a, "info", "Say who serves", svc.Info)
	call(a, "images", "List images", svc.Images)
	call(a, "history", "List the steps that made an image", svc.History)
	call(a, "inspect", "Describe an image or a container", svc.Inspect)
	call(a, "layers", "List the layers of an image, or all", svc.Layers)
	call(a, "analyze", "Say what each layer of an image does, and which of its bytes nobody sees", svc.Analyze)
	call(a, "tag", "Give an image one more name", svc.Tag)
	call(a, "rmi", "Remove a name, or an image", svc.RemoveImage)
	call(a, "create", "Make a container", svc.Create)
	call(a, "rm", "Delete a container with its data", svc.Remove)
	call(a, "list", "List containers and mounts with their state", svc.List)
	call(a, "stats", "Say what mounts are asked for, and how long the answers take", svc.Stats)
	call(a, "explain", "Say which layer serves a path, and what hides the others", svc.Explain)
	call(a, "mount", "Mount an image or a container", svc.Mount)
	call(a, "restore", "Mount again what is wanted and has ended", svc.Restore)
	call(a, "umount", "Unmount, and wait until everything is on the disk", svc.Unmount)
	call(a, "diff", "List what a container has changed, or the difference of two images", svc.Diff)
	call(a, "findbuild", "Find the image that a step of a build has made before", svc.FindBuild)
	call(a, "recordbuild", "Say which image a step of a build has made", svc.RecordBuild)
	call(a, "gc", "Remove what nothing needs", svc.GC)
	call(a, "prune", "Remove images that nothing uses", svc.Prune)
	call(a, "rebuild", "Make the database anew from what lies beside it", svc.Rebuild)
	call(a, "compact", "Write the database anew without the space it does not use", svc.Compact)
	call(a, "copy-database", "Keep a copy of the database", svc.CopyDatabase)
	call(a, "df", "Say where the bytes of the store are", svc.DiskUsage)

	follow(a, route{name: "events", summary: "Follow what happens to the store"}, func(ctx context.Context, r *EventsRequest, started func(), f func(events.Event) error) error {
		r.Started = started
		return svc.Events(ctx, *r, f)
	})

	stream(a, route{name: "load", summary: "Load images from an archive, which is the body", body: true}, func(ctx context.Context, r LoadRequest, in io.Reader, f *frameWriter) ([]layers.LoadedImage, error) {
		return svc.Load(ctx, r, layers.Source{Reader: in, Size: r.Size}, f.progress)
	})
	stream(a, route{name: "import", summary: "Make an image of a tar, which is the body", body: true}, func(ctx context.Context, r ImportRequest, in io.Reader, f *frameWriter) (layers.Image, error) {
		return svc.Import(ctx, r, layers.Source{Reader: in, Size: r.Size}, f.progress)
	})
	confide(a, "pull", "Fetch an image from a registry", svc.Pull)
	confide(a, "push", "Give an image to a registry", svc.Push)
	stream(a, route{name: "save", summary: "Write images as an archive"}, func(ctx context.Context, r SaveRequest, _ io.Reader, f *frameWriter) (Empty, error) {
		return Empty{}, svc.Save(ctx, r, f, f.progress)
	})
	stream(a, route{name: "export", summary: "Write the tree of a container or image as a tar"}, func(ctx context.Context, r NameRequest, _ io.Reader, f *frameWriter) (Empty, error) {
		return Empty{}, svc.Export(ctx, r, f)
	})
	stream(a, route{name: "commit", summary: "Make an image of a container"}, func(ctx context.Context, r CommitRequest, _ io.Reader, f *frameWriter) (layers.Image, error) {
		return svc.Commit(ctx, r, f.progress)
	})
	stream(a, route{name: "check", summary: "Verify the store, and repair it"}, func(ctx context.Context, r CheckRequest, _ io.Reader, f *frameWriter) (layers.Report, error) {
		return svc.Check(ctx, r, f.progress)
	})
}

// add notes a call, and serves it if calls are served.
func (a *api) add(r route, h http.HandlerFunc) {
	a.routes = append(a.routes, r)
	if a.mux != nil {
		a.mux.HandleFunc(r.method()+" /"+apiVersion+"/"+r.name, h)
	}
}

// call registers one method with a JSON request and a JSON answer.
func call[Req, Resp any](a *api, name, summary string, f func(context.Context, Req) (Resp, error)) {
	a.add(route{name: name, summary: summary, request: reflect.TypeFor[Req](), answer: reflect.TypeFor[Resp]()}, func(w http.ResponseWriter, hr *http.Request) {
		var r Req
		if err := json.NewDecoder(http.MaxBytesReader(w, hr.Body, maxJSON)).Decode(&r); err != nil {
			writeError(w, markedf(ErrUsage, "request %q: %w", name, err))
			return
		}
		resp, err := f(hr.Context(), r)
		logCall(a.log, name, err)
		if err != nil {
			writeError(w, err)
			return
		}
		writeJSONBody(w, http.StatusOK, resp)
	})
}

// confide registers one method whose request is the body, since it holds secrets, and
// whose answer is a sequence of frames.
func confide[Req, Resp any](a *api, name, summary string, f func(context.Context, Req, layers.ProgressFunc) (Resp, error)) {
	r := route{name: name, summary: summary, secret: true, request: reflect.TypeFor[Req]()}
	stream(a, r, func(ctx context.Context, _ Empty, in io.Reader, out *frameWriter) (resp Resp, err error) {
		req, err := confided[Req](in)
		if err != nil {
			return resp, err
		}
		return f(ctx, req, out.progress)
	})
}

// stream registers one method whose answer is a sequence of frames.
func stream[Req, Resp any](a *api, is route, f func(ctx context.Context, r Req, in io.Reader, out *frameWriter) (Resp, error)) {
	is.stream, is.answer = true, reflect.TypeFor[Resp]()
	if is.request == nil {
		is.request = reflect.TypeFor[Req]()
	}
	a.add(is, func(w http.ResponseWriter, hr *http.Request) {
		var r Req
		if err := json.Unmarshal([]byte(hr.URL.Query().Get("r")), &r); err != nil {
			writeError(w, markedf(ErrUsage, "request %q: %w", is.name, err))
			return
		}
		rc := http.NewResponseController(w)
		if err := rc.EnableFullDuplex(); err != nil { // progress flows while the archive arrives
			writeError(w, err)
			return
		}
		w.Header().Set("Content-Type", "application/vnd.plyfs.frames")
		w.WriteHeader(http.StatusOK)
		if err := rc.Flush(); err != nil {
			return // the client is gone
		}
		out := newFrameWriter(w, rc.Flush)
		result, err := f(hr.Context(), r, hr.Body, out)
		logCall(a.log, is.name, err)
		if err == nil {
			err = out.json(frameResult, result)
		} else {
			body, _ := encodeError(err)
			err = out.json(frameError, body)
		}
		if err == nil {
			// The client stops sending when it has read the result; closing
			// before that could take the result from it.
			_, _ = io.Copy(io.Discard, hr.Body)
		}
	})
}

// confided reads a request that is the body. What is wrong with it is not repeated: it
// holds secrets.
func confided[Req any](in io.Reader) (r Req, err error) {
	if json.NewDecoder(io.LimitReader(in, maxJSON)).Decode(&r) != nil {
		return r, markedf(ErrUsage, "the request cannot be read")
	}
	// net/http notices that the client has gone only when the body is at its end.
	_, _ = io.Copy(io.Discard, io.LimitReader(in, maxJSON))
	return r, nil
}

func logCall(log *zap.Logger, name string, err error) {
	if err == nil || errors.Is(err, context.Canceled) {
		log.Debug("call", zap.String("op", name), zap.Error(err))
		return
	}
	log.Info("call failed", zap.String("op", name), zap.Error(err))
}

func writeError(w http.ResponseWriter, err error) {
	body, status := encodeError(err)
	writeJSONBody(w, status, body)
}

func writeJSONBody(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // a client that is gone does not want it
}

type peerKey struct{}

// connContext notes who is at the other end of a connection.
func connContext(ctx context.Context, c net.Conn) context.Context {
	cred, err := peerOf(c)
	if err != nil {
		return ctx
	}
	return context.WithValue(ctx, peerKey{}, cred)
}

func peerOf(c net.Conn) (*unix.Ucred, error) {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.New("not a unix socket")
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var serr error
	if err := raw.Control(func(fd uintptr) {
		cred, serr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	return cred, serr
}

// authorise lets in root and the user the daemon runs as, whatever the mode of
// the socket has become.
func authorise(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		cred, ok := r.Context().Value(peerKey{}).(*unix.Ucred)
		if !ok || cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
			writeError(w, markedf(ErrRefused, "this daemon serves user %d and root only", os.Geteuid()))
			return
		}
		next.ServeHTTP(w, r)
	})
}
