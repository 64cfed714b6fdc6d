package snapshotter

import (
	"context"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// server translates between gRPC and a Store. The name of the snapshotter in requests
// says nothing here: each has its own socket.
type server struct {
	api.UnimplementedSnapshotsServer
	s *Store
}

// Register makes a gRPC server answer for the snapshots of s.
func Register(g grpc.ServiceRegistrar, s *Store) { api.RegisterSnapshotsServer(g, server{s: s}) }

var none = &emptypb.Empty{}

func (v server) Prepare(ctx context.Context, r *api.PrepareSnapshotRequest) (*api.PrepareSnapshotResponse, error) {
	ms, err := v.s.Prepare(ctx, r.GetKey(), r.GetParent(), r.GetLabels())
	if err != nil {
		return nil, grpcError(err)
	}
	return &api.PrepareSnapshotResponse{Mounts: mountsOut(ms)}, nil
}

func (v server) View(ctx context.Context, r *api.ViewSnapshotRequest) (*api.ViewSnapshotResponse, error) {
	ms, err := v.s.View(ctx, r.GetKey(), r.GetParent(), r.GetLabels())
	if err != nil {
		return nil, grpcError(err)
	}
	return &api.ViewSnapshotResponse{Mounts: mountsOut(ms)}, nil
}

func (v server) Mounts(ctx context.Context, r *api.MountsRequest) (*api.MountsResponse, error) {
	ms, err := v.s.Mounts(ctx, r.GetKey())
	if err != nil {
		return nil, grpcError(err)
	}
	return &api.MountsResponse{Mounts: mountsOut(ms)}, nil
}

func (v server) Commit(ctx context.Context, r *api.CommitSnapshotRequest) (*emptypb.Empty, error) {
	return none, grpcError(v.s.Commit(ctx, r.GetName(), r.GetKey(), r.GetParent(), r.GetLabels()))
}

func (v server) Remove(ctx context.Context, r *api.RemoveSnapshotRequest) (*emptypb.Empty, error) {
	return none, grpcError(v.s.Remove(ctx, r.GetKey()))
}

func (v server) Stat(_ context.Context, r *api.StatSnapshotRequest) (*api.StatSnapshotResponse, error) {
	in, err := v.s.Stat(r.GetKey())
	if err != nil {
		return nil, grpcError(err)
	}
	return &api.StatSnapshotResponse{Info: infoOut(in)}, nil
}

func (v server) Update(_ context.Context, r *api.UpdateSnapshotRequest) (*api.UpdateSnapshotResponse, error) {
	in, err := v.s.Update(r.GetInfo().GetName(), r.GetInfo().GetLabels(), r.GetUpdateMask().GetPaths())
	if err != nil {
		return nil, grpcError(err)
	}
	return &api.UpdateSnapshotResponse{Info: infoOut(in)}, nil
}

// listAtOnce is how many snapshots one message of List holds.
const listAtOnce = 100

func (v server) List(r *api.ListSnapshotsRequest, out api.Snapshots_ListServer) error {
	var batch []*api.Info
	send := func() error {
		if len(batch) == 0 {
			return nil
		}
		err := out.Send(&api.ListSnapshotsResponse{Info: batch})
		batch = nil
		return err
	}
	err := v.s.Walk(r.GetFilters(), func(in Info) error {
		if batch = append(batch, infoOut(in)); len(batch) < listAtOnce {
			return nil
		}
		return send()
	})
	if err != nil {
		return grpcError(err)
	}
	return send()
}

func (v server) Usage(_ context.Context, r *api.UsageRequest) (*api.UsageResponse, error) {
	u, err := v.s.Usage(r.GetKey())
	if err != nil {
		return nil, grpcError(err)
	}
	return &api.UsageResponse{Size: u.Size, Inodes: u.Inodes}, nil
}

func (v server) Cleanup(ctx context.Context, _ *api.CleanupRequest) (*emptypb.Empty, error) {
	return none, grpcError(v.s.Cleanup(ctx))
}

func mountsOut(ms []Mount) []*types.Mount {
	out := make([]*types.Mount, 0, len(ms))
	for _, m := range ms {
		out = append(out, &types.Mount{Type: m.Type, Source: m.Source, Options: m.Options})
	}
	return out
}

func infoOut(in Info) *api.Info {
	kind := map[Kind]api.Kind{View: api.Kind_VIEW, Active: api.Kind_ACTIVE, Committed: api.Kind_COMMITTED}[in.Kind]
	return &api.Info{
		Name: in.Name, Parent: in.Parent, Kind: kind, Labels: in.Labels,
		CreatedAt: timestamppb.New(in.Created), UpdatedAt: timestamppb.New(in.Updated),
	}
}
