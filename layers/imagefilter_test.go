package layers

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/plyfs/plyfs/metadata"
)

// TestImageFilters lists images by each condition.
func TestImageFilters(t *testing.T) {
	s := openStore(t)
	made := func(day int, labels map[string]string, refs ...string) img {
		return img{refs: refs, layers: [][]byte{layerTar(t, file("f", strings.Join(refs, " ")))}, config: func(i *ocispec.Image) {
			at := time.Date(2020, 1, day, 0, 0, 0, 0, time.UTC)
			i.Created, i.Config.Labels = &at, labels
		}}
	}
	load(t, s, outerTar(t, oldDocker(t,
		made(1, map[string]string{"a": "1", "empty": ""}, "old:1", "example.com/team/app:1"),
		made(2, map[string]string{"a": "2", "b": "x=y"}, "mid:1"),
		made(3, nil, "new:1", "new:2"),
		made(4, map[string]string{"a": "1"}))))
	for _, tc := range []struct {
		o    ImagesOptions
		want string
	}{
		{ImagesOptions{}, "<none> new:1 new:2 mid:1 example.com/team/app:1 old:1"},
		{ImagesOptions{Name: "new"}, "new:1 new:2"},
		{ImagesOptions{Name: "*/*/app"}, "example.com/team/app:1"},
		{ImagesOptions{Name: "*:1"}, "new:1 mid:1 old:1"},
		{ImagesOptions{Filters: []string{"dangling=true"}}, "<none>"},
		{ImagesOptions{Filters: []string{"dangling=0"}}, "new:1 new:2 mid:1 example.com/team/app:1 old:1"},
		{ImagesOptions{Filters: []string{"label=a"}}, "<none> mid:1 example.com/team/app:1 old:1"},
		{ImagesOptions{Filters: []string{"label=a=1"}}, "<none> example.com/team/app:1 old:1"},
		{ImagesOptions{Filters: []string{"label=b=x=y"}}, "mid:1"},
		{ImagesOptions{Filters: []string{"label=empty="}}, "example.com/team/app:1 old:1"},
		{ImagesOptions{Filters: []string{"label=a", "label=b"}}, "mid:1"},
		{ImagesOptions{Filters: []string{"since=old:1"}}, "<none> new:1 new:2 mid:1"},
		{ImagesOptions{Filters: []string{"before=mid:1"}}, "example.com/team/app:1 old:1"},
		{ImagesOptions{Filters: []string{"since=old:1", "before=new:2"}}, "mid:1"},
		{ImagesOptions{Filters: []string{"reference=new:2", "reference=old*"}}, "new:2 old:1"},
		{ImagesOptions{Name: "new", Filters: []string{"reference=*:2"}}, "new:2"},
		{ImagesOptions{Filters: []string{"dangling=true", "label=a=2"}}, ""},
	} {
		list, err := s.ListImages(t.Context(), tc.o)
		must(t, err)
		var got []string
		for _, i := range list {
			name := i.Repository + ":" + i.Tag
			if i.Tag == noTag {
				name = noTag
			}
			got = append(got, name)
		}
		if d := cmp.Diff(tc.want, strings.Join(got, " ")); d != "" {
			t.Errorf("%+v: %s", tc.o, d)
		}
	}
	for _, tc := range []struct {
		filter string
		is     error
	}{
		{"dangling", ErrInvalid},
		{"dangling=maybe", ErrInvalid},
		{"label=", ErrInvalid},
		{"nothing=1", ErrInvalid},
		{"reference=[", ErrInvalid},
		{"since=missing:1", ErrNotFound},
		{"before=BAD", ErrInvalid},
	} {
		if _, err := s.ListImages(t.Context(), ImagesOptions{Filters: []string{tc.filter}}); !errors.Is(err, tc.is) {
			t.Errorf("%s: %v", tc.filter, err)
		}
	}
	if !slices.IsSorted(FilterKeys) {
		t.Error("not in order:", FilterKeys)
	}
	// Steps between images are hidden.
	build(t, s, "new:1", "step", "make all")
	build(t, s, "step", "result", "make install")
	_, err := s.RemoveImage(t.Context(), "step", RemoveOptions{NoPrune: true})
	must(t, err)
	count := func(all bool, filters ...string) int {
		list, err := s.ListImages(t.Context(), ImagesOptions{Filters: filters, All: all})
		must(t, err)
		return len(list)
	}
	if some, all := count(false), count(true); all != some+1 {
		t.Errorf("%d with steps, %d without", all, some)
	}
	if some, all := count(false, "dangling=true"), count(true, "dangling=true"); all != some {
		t.Errorf("a step dangles: %d with steps, %d without", all, some)
	}
}

// TestImagesByDigest finds the line of an image by what a registry calls it.
func TestImagesByDigest(t *testing.T) {
	s := openStore(t)
	load(t, s, outerTar(t, oldDocker(t, img{refs: []string{"app:1", "app:2", "other:1"}, layers: [][]byte{layerTar(t, file("f", "1"))}})))
	i, err := s.ResolveImage(t.Context(), "app:1")
	must(t, err)
	d, none := digest.FromString("manifest"), digest.FromString("nothing")
	must(t, s.update(t.Context(), func(tx *metadata.Tx) error {
		_, err := tx.SetRef("docker.io/library/app@"+d.String(), metadata.Ref{ImageID: i.ID, Updated: time.Now()})
		return err
	}))
	for name, want := range map[string]int{
		"app@" + d.String(): 2, "app:3@" + d.String(): 2, "app@sha256:*": 2, "app": 2,
		"app@" + none.String(): 0, "other@" + d.String(): 0, "other@*": 0,
	} {
		if got, err := s.Images(t.Context(), name); err != nil || len(got) != want {
			t.Errorf("%s: %d lines, not %d: %v", name, len(got), want, err)
		}
	}
}
