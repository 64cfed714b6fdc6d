package mountd

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/unionfs"
	"github.com/plyfs/plyfs/unionfs/trace"
	"github.com/plyfs/plyfs/whiteout"
)

var flagWrite = flag.Bool("openapi.write", false, "write docs/openapi.json anew")

const openapiFile = "../docs/openapi.json"

// TestOpenAPIFile: the description in docs is the one that a daemon gives.
func TestOpenAPIFile(t *testing.T) {
	doc, err := OpenAPI()
	if err != nil {
		t.Fatal(err)
	}
	doc = append(doc, '\n')
	if *flagWrite {
		if err := os.WriteFile(openapiFile, doc, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(openapiFile)
	if err != nil || !bytes.Equal(have, doc) {
		t.Errorf("docs/openapi.json is old (%v): go test ./mountd -run OpenAPIFile -openapi.write", err)
	}
}

// TestRoutes: every method of a service is a call.
func TestRoutes(t *testing.T) {
	svc := reflect.TypeFor[Service]()
	if n := len(routes()); n != svc.NumMethod()-1 { // Close
		t.Errorf("%d calls for %d methods", n, svc.NumMethod()-1)
	}
	names := map[string]bool{}
	for _, r := range routes() {
		if names[r.name] || r.summary == "" {
			t.Errorf("call %+v", r)
		}
		names[r.name] = true
	}
}

// TestOpenAPI compares what Go encodes with what the description says, for any content.
func TestOpenAPI(t *testing.T) {
	raw, err := OpenAPI()
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Paths map[string]map[string]struct {
			RequestBody struct {
				Content map[string]struct{ Schema any }
			}
			Parameters []struct {
				Content map[string]struct{ Schema any }
			}
			Responses map[string]struct {
				Content map[string]struct {
					Schema any
					Result any `json:"x-result"`
					Line   any `json:"x-line"`
				}
			}
		}
		Components struct{ Schemas map[string]any }
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		t.Fatal(err)
	}
	v := validator{doc.Components.Schemas}
	rng := rand.New(rand.NewPCG(1, 2))
	for _, r := range routes() {
		op := doc.Paths["/v1/"+r.name][strings.ToLower(r.method())]
		request, answer := op.RequestBody.Content["application/json"].Schema, op.Responses["200"].Content["application/json"].Schema
		if r.stream {
			answer = op.Responses["200"].Content["application/vnd.plyfs.frames"].Result
			if !r.secret {
				request = op.Parameters[0].Content["application/json"].Schema
			}
		}
		if r.lines {
			request, answer = op.Parameters[0].Content["application/json"].Schema, op.Responses["200"].Content["application/jsonl"].Line
		}
		for range 200 {
			for _, c := range []struct {
				what   string
				typ    reflect.Type
				schema any
			}{{"request", r.request, request}, {"answer", r.answer, answer}, {"error", reflect.TypeFor[ErrorBody](), op.Responses["default"].Content["application/json"].Schema}} {
				value := reflect.New(c.typ).Elem()
				fill(rng, value, 0)
				body, err := json.Marshal(value.Interface())
				if err != nil {
					t.Fatal(err)
				}
				var any any
				if err := json.Unmarshal(body, &any); err != nil {
					t.Fatal(err)
				}
				if err := v.check(any, c.schema); err != nil {
					t.Fatalf("%s of %s: %v: %s", c.what, r.name, err, body)
				}
			}
		}
	}
	// And it says something.
	for _, wrong := range []any{"text", 1.0, map[string]any{"name": 1.0}, map[string]any{}, map[string]any{"name": "a", "other": "b"}} {
		if v.check(wrong, map[string]any{"$ref": ref("NameRequest")}) == nil {
			t.Errorf("%v is a NameRequest", wrong)
		}
	}
}

// fill gives v any content.
func fill(rng *rand.Rand, v reflect.Value, depth int) {
	switch x := v.Addr().Interface().(type) {
	case *time.Time:
		*x = time.Unix(rng.Int64N(1e9), 0)
		return
	case *digest.Digest:
		*x = digest.FromString(fmt.Sprint(rng.Uint64()))
		return
	case *json.RawMessage:
		*x = json.RawMessage(`{"a":[1]}`)
		return
	case *Path:
		*x = Path([]string{"/a", "/\xff"}[rng.IntN(2)])
		return
	case *whiteout.Dialect, *unionfs.IO, *layers.ProgressFunc:
		return
	}
	few := rng.IntN(3)
	if depth > 4 {
		few = 0
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString([]string{"", "a", "ü\n"}[rng.IntN(3)])
	case reflect.Bool:
		v.SetBool(rng.IntN(2) == 0)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(rng.Int64N(100))
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(rng.Uint64N(100))
	case reflect.Float32, reflect.Float64:
		v.SetFloat(rng.Float64())
	case reflect.Pointer:
		if few > 0 {
			v.Set(reflect.New(v.Type().Elem()))
			fill(rng, v.Elem(), depth+1)
		}
	case reflect.Slice:
		if rng.IntN(4) > 0 {
			v.Set(reflect.MakeSlice(v.Type(), few, few))
		}
		for i := range v.Len() {
			fill(rng, v.Index(i), depth+1)
		}
	case reflect.Map:
		if rng.IntN(4) > 0 {
			v.Set(reflect.MakeMap(v.Type()))
			for i := range few {
				e := reflect.New(v.Type().Elem()).Elem()
				fill(rng, e, depth+1)
				v.SetMapIndex(reflect.ValueOf(fmt.Sprint(i)).Convert(v.Type().Key()), e)
			}
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if f := v.Field(i); f.CanSet() {
				fill(rng, f, depth+1)
			}
		}
	}
}

// validator knows as much of JSON Schema as the description uses.
type validator struct{ schemas map[string]any }

func (v validator) check(value, schema any) error {
	s, ok := schema.(map[string]any)
	if !ok {
		return fmt.Errorf("no schema: %v", schema)
	}
	if r, ok := s["$ref"].(string); ok {
		name := strings.TrimPrefix(r, ref(""))
		return v.check(value, v.schemas[name])
	}
	if any, ok := s["anyOf"].([]any); ok {
		var err error
		for _, one := range any {
			if err = v.check(value, one); err == nil {
				return nil
			}
		}
		return err
	}
	types, ok := s["type"]
	if !ok {
		return nil // anything
	}
	is := "null"
	switch x := value.(type) {
	case string:
		is = "string"
	case bool:
		is = "boolean"
	case float64:
		if is = "number"; x == float64(int64(x)) && types == "integer" {
			is = "integer"
		}
	case []any:
		is = "array"
		for _, e := range x {
			if err := v.check(e, s["items"]); err != nil {
				return err
			}
		}
	case map[string]any:
		is = "object"
		if err := v.members(x, s); err != nil {
			return err
		}
	}
	if list, ok := types.([]any); ok && slices.Contains(list, any(is)) || types == is {
		return nil
	}
	return fmt.Errorf("%v is %s, expected %v", value, is, types)
}

func (v validator) members(x, s map[string]any) error {
	props, closed := s["properties"].(map[string]any)
	for k, e := range x {
		schema, ok := props[k]
		if !ok {
			if schema = s["additionalProperties"]; schema == nil && closed {
				return fmt.Errorf("unknown member %q", k)
			}
		}
		if err := v.check(e, schema); err != nil {
			return fmt.Errorf("%s: %w", k, err)
		}
	}
	required, _ := s["required"].([]any)
	for _, k := range required {
		if _, ok := x[k.(string)]; !ok {
			return fmt.Errorf("member %q is missing", k)
		}
	}
	return nil
}

// TestSocketUnit: the unit listens where commands look for the daemon of root's store.
func TestSocketUnit(t *testing.T) {
	unit, err := os.ReadFile("../cmd/plyfs/dist/systemd/system.socket")
	if err != nil {
		t.Fatal(err)
	}
	want := "\nListenStream=/run/plyfs/" + filepath.Base(RunDir("/var/lib/plyfs")) + "/" + socketName + "\n"
	if !strings.Contains(string(unit), want) {
		t.Errorf("expected %q in\n%s", want, unit)
	}
}

// TestCopiedObject: what is described is what is sent.
func TestCopiedObject(t *testing.T) {
	tags := func(of reflect.Type) (tags []string) {
		for i := range of.NumField() {
			tags = append(tags, of.Field(i).Tag.Get("json"))
		}
		return tags
	}
	if d := cmp.Diff(tags(reflect.TypeFor[trace.Copied]()), tags(reflect.TypeFor[copiedObject]())); d != "" {
		t.Error(d)
	}
}
