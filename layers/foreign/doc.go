// Package foreign reads the stores of other engines: which images, layers and
// containers they hold, and where. It changes nothing in them, and knows nothing
// of the store that takes over what it finds (package layers does that).
//
// # Kinds
//
//	docker            image/DRIVER/{imagedb,layerdb,repositories.json}; drivers overlay2,
//	                  fuse-overlayfs and aufs keep layers, overlay and vfs whole trees
//	docker graph      graph/ID/{json,layersize}, repositories-DRIVER, aufs/{diff,layers}:
//	                  Docker before 1.10
//	registry v1       images/ID/{ancestry,json,layer}, repositories/NAMESPACE/NAME/tag_TAG
//	containers        DRIVER-{images,layers,containers}: podman, buildah, skopeo, CRI-O
//	containerd        io.containerd.metadata.v1.bolt/meta.db, the content store, and the
//	                  snapshots of overlayfs and fuse-overlayfs
//
// Stores of devicemapper, btrfs, zfs and windowsfilter are recognised by name and
// refused: their layers are no directories.
//
// # What is believed
//
// Nothing beyond what the package has checked. A file of a store is opened below a
// descriptor of its root without following links, has a limit, and every name in it
// that becomes a part of a path is one component of known characters. An image is
// offered if the digest of its config is its ID, and if each layer it names is
// there, has the diffID of the config and is on the layer below it; whether the
// content of a layer has that digest is for the caller to find out. What is damaged
// is left out, with the reason, and the rest is offered.
//
// # Versions
//
// Docker before 1.10 knew no content digests. The config of such an image is made by
// the rules with which Docker 1.10 migrated its graph, so that the IDs are those
// that Docker gave, wherever the tars of the layers are the same.
package foreign
