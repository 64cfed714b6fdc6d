// Package metadata is the database of a plyfs store: which layers, images,
// names, containers and mounts there are. It stores plain records and knows no
// file system; package layers gives them their meaning.
//
// # Schema
//
// One bbolt file, one level of buckets. Values are JSON; index values are
// empty. Keys are text; parts of a composite key are joined by a NUL byte.
//
//	meta           schema, uuid, created
//	layers         chainID → Layer
//	cache          cacheID → Cache (a content directory)
//	configs        imageID → the image config, byte for byte
//	images         imageID → Image
//	refs           canonical reference → Ref
//	containers     container ID → Container
//	live           bootID, target → Live
//	ingests        id → Ingest (a stage somebody is filling)
//	leases         id → Lease (work in progress that keeps layers alive)
//	lease_layer    lease ID, chainID → ""
//	trash          number → Trash (paths to delete)
//	manifests      imageID, digest → a manifest of the image, byte for byte
//	blobs          digest → Blob (a compressed layer that is kept)
//	buildcache     parent imageID, hash of a config → imageID
//	wanted         target → Wanted (a mount to be made again when it has ended)
//
// Indexes, each a function of the buckets above ([Tx.Check] recomputes them):
//
//	cache_chain       cacheID, chainID      layer_child       parent, chainID
//	cache_diff        diffID, cacheID       layer_diff        diffID, chainID
//	layer_blob        blob digest, chainID  image_chain       chainID, imageID
//	image_child       parent, imageID       ref_image         imageID, reference
//	container_name    name → container ID   container_chain   chainID, container ID
//	container_image   imageID, container ID container_mount   mountID → container ID
//	manifest_digest   digest, imageID       buildcache_image  imageID, key of buildcache
//
// A database of an older minor version is brought up to date when it is opened,
// in one transaction; one of a newer minor version is only read, of another major
// version refused. Before that, Options.BeforeMigration may keep a copy.
//
// # Damage
//
// A file that bbolt cannot use, or that contradicts itself, is [ErrFile]: panics and
// faults of bbolt are caught where it runs ([DB.View], [DB.Update]). [DB.CheckFile] and
// [Salvage] read the file without bbolt, page by page, and believe nothing. A row that
// cannot be decoded is left out of lists; [Tx.BadRows] names it.
//
// # Invariants
//
//   - A layer's chainID is the function of its parent and diffID that the image
//     specification gives; its parent exists; its cache row exists.
//   - A cache row is named by at least one layer.
//   - sha256(config) is the imageID; an image's top layer exists.
//   - A reference names an existing image. A container's layer exists.
//   - No counts are stored. Whether something is still needed is read from the
//     indexes in the transaction that deletes it.
//
// # Transactions
//
// The file is opened for each transaction and closed after it, so that several
// processes share a store without a daemon: [DB.View] takes the shared, and
// [DB.Update] the exclusive lock of the file. The functions given to them do no
// file I/O, hashing or waiting ([DB.CopyTo] alone writes a file meanwhile). Who has
// waited for the lock looks whether the file is still the database: [DB.Compact] and
// [DB.Rebuild] put another one in its place. Nothing read in a transaction stays valid
// after it: what may have changed is read again by the transaction that writes.
//
// # Lock order
//
// DB.mu (which keeps goroutines of one process from polling each other's file
// lock), then the file lock. Neither is held while calling anything but the
// transaction function and OnWait.
//
// # Crash
//
//	step                                   after the crash
//	database written under a temporary     litter beside the database, removed by the
//	name, not yet linked                   next creation
//	transaction not committed              as before the transaction
//	transaction committed                  durable: bbolt syncs data, then the meta page
package metadata
