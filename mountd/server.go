package mountd

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers"
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
	mux := http.NewServeMux()
	call(mux, log, "info", svc.Info)
	call(mux, log, "images", svc.Images)
	call(mux, log, "history", svc.History)
	call(mux, log, "inspect", svc.Inspect)
	call(mux, log, "layers", svc.Layers)
	call(mux, log, "tag", svc.Tag)
	call(mux, log, "rmi", svc.RemoveImage)
	call(mux, log, "create", svc.Create)
	call(mux, log, "rm", svc.Remove)
	call(mux, log, "list", svc.List)
	call(mux, log, "stats", svc.Stats)
	call(mux, log, "mount", svc.Mount)
	call(mux, log, "umount", svc.Unmount)
	call(mux, log, "diff", svc.Diff)
	call(mux, log, "findbuild", svc.FindBuild)
	call(mux, log, "recordbuild", svc.RecordBuild)
	call(mux, log, "gc", svc.GC)
	call(mux, log, "prune", svc.Prune)
	call(mux, log, "rebuild", svc.Rebuild)
	call(mux, log, "compact", svc.Compact)
	call(mux, log, "copy-database", svc.CopyDatabase)
	call(mux, log, "df", svc.DiskUsage)

	stream(mux, log, "load", func(ctx context.Context, r LoadRequest, in io.Reader, f *frameWriter) (any, error) {
		return svc.Load(ctx, r, layers.Source{Reader: in, Size: r.Size}, f.progress)
	})
	stream(mux, log, "import", func(ctx context.Context, r ImportRequest, in io.Reader, f *frameWriter) (any, error) {
		return svc.Import(ctx, r, layers.Source{Reader: in, Size: r.Size}, f.progress)
	})
	stream(mux, log, "pull", func(ctx context.Context, _ Empty, in io.Reader, f *frameWriter) (any, error) {
		r, err := confided[PullRequest](in)
		if err != nil {
			return nil, err
		}
		return svc.Pull(ctx, r, f.progress)
	})
	stream(mux, log, "push", func(ctx context.Context, _ Empty, in io.Reader, f *frameWriter) (any, error) {
		r, err := confided[PushRequest](in)
		if err != nil {
			return nil, err
		}
		return svc.Push(ctx, r, f.progress)
	})
	stream(mux, log, "save", func(ctx context.Context, r SaveRequest, _ io.Reader, f *frameWriter) (any, error) {
		return Empty{}, svc.Save(ctx, r, f, f.progress)
	})
	stream(mux, log, "export", func(ctx context.Context, r NameRequest, _ io.Reader, f *frameWriter) (any, error) {
		return Empty{}, svc.Export(ctx, r, f)
	})
	stream(mux, log, "commit", func(ctx context.Context, r CommitRequest, _ io.Reader, f *frameWriter) (any, error) {
		return svc.Commit(ctx, r, f.progress)
	})
	stream(mux, log, "check", func(ctx context.Context, r CheckRequest, _ io.Reader, f *frameWriter) (any, error) {
		return svc.Check(ctx, r, f.progress)
	})
	mux.Handle("GET "+metricsPath, metrics)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, markedf(layers.ErrUnsupported, "the daemon has no call %q: is it older than the command?", r.URL.Path))
	})
	return authorise(mux)
}

// call registers one method with a JSON request and a JSON answer.
func call[Req, Resp any](mux *http.ServeMux, log *zap.Logger, name string, f func(context.Context, Req) (Resp, error)) {
	mux.HandleFunc("POST /"+apiVersion+"/"+name, func(w http.ResponseWriter, hr *http.Request) {
		var r Req
		if err := json.NewDecoder(http.MaxBytesReader(w, hr.Body, maxJSON)).Decode(&r); err != nil {
			writeError(w, markedf(ErrUsage, "request %q: %w", name, err))
			return
		}
		resp, err := f(hr.Context(), r)
		logCall(log, name, err)
		if err != nil {
			writeError(w, err)
			return
		}
		writeJSONBody(w, http.StatusOK, resp)
	})
}

// stream registers one method whose answer is a sequence of frames.
func stream[Req any](mux *http.ServeMux, log *zap.Logger, name string,
	f func(ctx context.Context, r Req, in io.Reader, out *frameWriter) (any, error),
) {
	mux.HandleFunc("POST /"+apiVersion+"/"+name, func(w http.ResponseWriter, hr *http.Request) {
		var r Req
		if err := json.Unmarshal([]byte(hr.URL.Query().Get("r")), &r); err != nil {
			writeError(w, markedf(ErrUsage, "request %q: %w", name, err))
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
		logCall(log, name, err)
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
