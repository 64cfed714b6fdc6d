package mountd

import (
	"encoding"
	"encoding/json"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/unionfs/explain"
	"github.com/plyfs/plyfs/unionfs/trace"
)

// route is one call of the API.
type route struct {
	name    string
	summary string
	request reflect.Type
	answer  reflect.Type
	stream  bool // answered by frames
	body    bool // of a stream: what comes with the request is an archive
	secret  bool // of a stream: the request is the body
	lines   bool // asked for by GET, and answered by a JSON object a line
}

// method is how the call is asked for.
func (r route) method() string {
	if r.lines {
		return http.MethodGet
	}
	return http.MethodPost
}

// OpenAPI returns the description of the API in the form of OpenAPI 3.1. It is made of the
// types that the server decodes and encodes, so it cannot say anything else.
func OpenAPI() ([]byte, error) {
	d := describer{schemas: map[string]any{}, types: map[string]reflect.Type{}}
	paths := map[string]any{}
	for _, r := range routes() {
		paths["/"+apiVersion+"/"+r.name] = map[string]any{strings.ToLower(r.method()): d.operation(r)}
	}
	d.schema(reflect.TypeFor[layers.Progress]())
	if d.err != nil {
		return nil, d.err
	}
	return json.MarshalIndent(map[string]any{
		"openapi": "3.1.0",
		"info": map[string]any{
			"title": "plyfs", "version": apiVersion,
			"description": "HTTP/1.1 over the unix socket of `plyfs daemon`. Only root and the user that the daemon runs as are served. " +
				"Calls that are streams take the request in the parameter `r` and answer with frames: one byte of kind, four bytes of length (big endian), " +
				"content. D is data of an archive, P a record of progress (" + ref("Progress") + "), R the result and E an error (" + ref("ErrorBody") + "); one of these two is last. " +
				"A stream that ends without was cut off.",
		},
		"servers":    []any{map[string]any{"url": "http+unix://socket"}},
		"paths":      paths,
		"components": map[string]any{"schemas": d.schemas},
	}, "", "  ")
}

func ref(name string) string { return "#/components/schemas/" + name }

// describer collects the types that calls use.
type describer struct {
	schemas map[string]any
	types   map[string]reflect.Type
	err     error
}

func (d *describer) operation(r route) map[string]any {
	op := map[string]any{"operationId": r.name, "summary": r.summary}
	failed := map[string]any{"description": "an error", "content": jsonContent(d.schema(reflect.TypeFor[ErrorBody]()))}
	responses := map[string]any{"default": failed}
	op["responses"] = responses
	answer := d.schema(r.answer)
	if r.lines {
		op["parameters"] = []any{map[string]any{"name": "r", "in": "query", "content": jsonContent(d.schema(r.request))}}
		responses["200"] = map[string]any{
			"description": "an object a line, until the time that was asked for, or the daemon stops",
			"content":     map[string]any{"application/jsonl": map[string]any{"x-line": answer}},
		}
		return op
	}
	if !r.stream {
		op["requestBody"] = map[string]any{"required": true, "content": jsonContent(d.schema(r.request))}
		responses["200"] = map[string]any{"description": "done", "content": jsonContent(answer)}
		return op
	}
	request := d.schema(r.request)
	switch {
	case r.secret:
		op["requestBody"] = map[string]any{"required": true, "content": jsonContent(request)}
		request = d.schema(reflect.TypeFor[Empty]())
	case r.body:
		op["requestBody"] = map[string]any{"required": true, "content": map[string]any{"application/octet-stream": map[string]any{}}}
	}
	op["parameters"] = []any{map[string]any{"name": "r", "in": "query", "required": true, "content": jsonContent(request)}}
	responses["200"] = map[string]any{
		"description": "frames, of which the last is the result or an error",
		"content":     map[string]any{"application/vnd.plyfs.frames": map[string]any{"x-result": answer}},
	}
	return op
}

func jsonContent(schema any) map[string]any {
	return map[string]any{"application/json": map[string]any{"schema": schema}}
}

// copiedObject is the form of trace.Copied.
type copiedObject struct {
	Time      time.Time `json:"time"`
	Path      Path      `json:"path"`
	Op        string    `json:"op"`
	Detail    Path      `json:"detail,omitempty"`
	Pid       uint32    `json:"pid,omitempty"`
	Command   Path      `json:"command,omitempty"`
	Container string    `json:"container,omitempty"`
	UID       uint32    `json:"uid"`
	From      string    `json:"from,omitempty"`
	Dirs      int       `json:"dirs,omitempty"`
}

var (
	textType   = reflect.TypeFor[encoding.TextMarshaler]()
	jsonType   = reflect.TypeFor[json.Marshaler]()
	timeType   = reflect.TypeFor[time.Time]()
	digestType = reflect.TypeFor[digest.Digest]()
	pathType   = reflect.TypeFor[Path]()
	inLayer    = reflect.TypeFor[explain.Path]()
	changeType = reflect.TypeFor[Change]()
	copiedType = reflect.TypeFor[*trace.Copied]()
	rawType    = reflect.TypeFor[json.RawMessage]()
)

// schema describes a type; a struct with a name is described once.
func (d *describer) schema(t reflect.Type) map[string]any {
	switch {
	case t == timeType:
		return map[string]any{"type": "string", "format": "date-time"}
	case t == digestType:
		return map[string]any{"type": "string", "pattern": "^([a-z0-9]+:[0-9a-f]+)?$"}
	case t == pathType || t == inLayer:
		object := d.schema(reflect.TypeFor[layers.PathObject]())
		return map[string]any{"description": "a path of any bytes: an object if it is not valid UTF-8", "anyOf": []any{map[string]any{"type": "string"}, object}}
	case t == changeType:
		return d.schema(reflect.TypeFor[changeObject]())
	case t == copiedType:
		return d.schema(reflect.TypeFor[*copiedObject]())
	case t == rawType:
		return map[string]any{}
	case t.Implements(textType):
		return map[string]any{"type": "string"}
	case t.Implements(jsonType) || reflect.PointerTo(t).Implements(jsonType) && t.Kind() != reflect.Pointer:
		d.fail("%s encodes itself: say how", t)
		return nil
	}
	switch t.Kind() {
	case reflect.Pointer:
		return map[string]any{"anyOf": []any{d.schema(t.Elem()), map[string]any{"type": "null"}}}
	case reflect.String:
		return map[string]any{"type": "string"}
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return map[string]any{"type": "integer"}
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return map[string]any{"type": "integer", "minimum": 0}
	case reflect.Float32, reflect.Float64:
		return map[string]any{"type": "number"}
	case reflect.Interface:
		return map[string]any{}
	case reflect.Slice, reflect.Array:
		if t.Elem().Kind() == reflect.Uint8 {
			return map[string]any{"type": []any{"string", "null"}, "contentEncoding": "base64"}
		}
		return map[string]any{"type": []any{"array", "null"}, "items": d.schema(t.Elem())}
	case reflect.Map:
		return map[string]any{"type": []any{"object", "null"}, "additionalProperties": d.schema(t.Elem())}
	case reflect.Struct:
		return d.object(t)
	}
	d.fail("%s cannot be JSON", t)
	return nil
}

func (d *describer) fail(format string, a ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("describe the API: "+format, a...)
	}
}

// object describes a struct.
func (d *describer) object(t reflect.Type) map[string]any {
	if t.Name() == "" {
		return d.members(t)
	}
	name := strings.ToUpper(t.Name()[:1]) + t.Name()[1:]
	if t == reflect.TypeFor[changeObject]() {
		name = changeType.Name()
	}
	if have, ok := d.types[name]; ok && have != t { // of another package
		name = t.PkgPath()[strings.LastIndexByte(t.PkgPath(), '/')+1:] + name
	}
	if d.types[name] == nil {
		d.types[name] = t
		d.schemas[name] = nil // it may name itself
		d.schemas[name] = d.members(t)
	}
	return map[string]any{"$ref": ref(name)}
}

func (d *describer) members(t reflect.Type) map[string]any {
	props, required := map[string]any{}, []string{}
	d.collect(t, props, &required)
	s := map[string]any{"type": "object", "properties": props}
	if len(required) > 0 {
		slices.Sort(required)
		s["required"] = required
	}
	return s
}

// collect adds the members of a struct, those of embedded ones included.
func (d *describer) collect(t reflect.Type, props map[string]any, required *[]string) {
	for i := range t.NumField() {
		f := t.Field(i)
		tag, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous && tag == "" {
			if e := f.Type; e.Kind() == reflect.Struct {
				d.collect(e, props, required)
				continue
			}
		}
		if !f.IsExported() || tag == "-" {
			continue
		}
		if tag == "" {
			tag = f.Name
		}
		props[tag] = d.schema(f.Type)
		if !strings.Contains(options, "omitempty") && !strings.Contains(options, "omitzero") {
			*required = append(*required, tag)
		}
	}
}
