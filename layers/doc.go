// Package layers is the layer and image store: image archives in, directories
// to mount out, and back again byte for byte.
//
// # On disk
//
//	plyfs.db                       the rows (package metadata)
//	layers/<cacheID>/diff/         content of one layer, whiteouts kept; none if adopted
//	layers/<cacheID>/tarsplit.zst  everything of the layer's tar but file contents
//	layers/<cacheID>/dup/<n>       contents that a later entry of the tar replaced
//	layers/<cacheID>/layer.json    sidecar: enough to make the rows anew
//	layers/<cacheID>/layer.idx     index of the layer (package metadata/chainindex)
//	chains/<chainID>-<id>.idx      merged indexes, a cache
//	blobs/sha256/<hex>             a compressed layer that is kept
//	blobs/partial/<hex>            a download, or what one has left; a cache
//	rw/<mountID>/{upper,work}      a container's writable layer
//	rw/<mountID>/container.json    sidecar: the container's row
//	rw/<mountID>/history           what was copied up, when and by whom: written by the server of
//	                               its mount, bounded, and of no meaning to anything but explain
//	images/<imageID>.json          sidecar: everything the database knows of an image
//	copies/plyfs.db.<time>         the last three copies of the database
//	plyfs.db.damaged-<time>        a database that was made anew, as it was before
//	lost/<mountID>                 writable layers that belonged to nobody
//	stage/<id>/                    unfinished work
//	trash/<name>.<n>               being deleted
//	reserve                        space given up when a full disk must be freed
//
// As root, layers are in the overlay dialect (character device 0:0,
// trusted.overlay.opaque=y) with the owners of the tar, without privileges in the
// userxattr dialect, and as follows.
//
// # Stores without privileges
//
// All files of a user's store are his, also in a user namespace where he could
// give them to others: one store serves his shell and all of his namespaces, and
// rm -rf removes it. No file has setuid or setgid, he can read and write every
// one, and an empty file stands for a device, fifo or socket. What an object is
// instead is told elsewhere, so that mounts, diff, commit and export have the same
// owners, modes, types and attributes as in a store of root, and make the same
// layers:
//
//	object                                  told by
//	file, directory, device, fifo, socket   user.containers.override_stat, if there is
//	                                        more to tell than "root, with this mode"
//	their security.*, trusted.* and ACLs    attributes under the same prefix
//	symbolic link: owner, attributes        the layer's index, and its tar-split record
//	symbolic link of an upper               nothing, if it belongs to root; else it is an
//	                                        empty file, as a device
//
// The names are those of package whiteout/override, and uppers use them too. An
// image cannot write them: what it brings under such a name is kept under another
// one. In a store of root they mean nothing.
//
// On a file system without user attributes layers are in the aufs dialect, as their
// tars are, and uppers in auto-user.
//
// A layer is virtual if it has no such attributes: an older version has unpacked it,
// or the file system knows none. Then the index tells everything. One that is made
// anew takes it from the tar-split record, and of what no tar mentions it knows
// nothing: a copy that a hard link into a lower layer has become (in other layers:
// a copy of a symbolic link) belongs to root from then on.
//
// # Adopted layers
//
// The content of a layer may stay in the store of another engine (Adopt, package
// layers/foreign). Its directory has no diff/ then; the sidecar and the row say where the
// content is, and what the directory was: inode and change time. Whoever opens it
// compares them. The rest is as with other layers: an index, made from the directory;
// a tar-split record, converted from the engine's or made by reading its archive. A layer
// of which there is neither has no record, and cannot be saved.
//
//   - Nothing is written, removed or locked in the other store, ever.
//   - Only what belongs to root or to us and nobody else can write is used where it lies:
//     its directories up to / first, and unless one of them shuts others out, every object.
//   - No image says that a part of an object is elsewhere: a layer with a redirect or a
//     metacopy is refused by reference, and copied as its tar has it. The upper of a
//     container is believed, as its kernel or mount program has written it; what it says
//     so is written out, and it is copied.
//   - By reference, diffIDs are those that the engine has noted, and they agree with its
//     chainIDs and with the config; Verify and copies read the content.
//   - Its own directory is for its own chain (Cache.Bind): in another one it is unpacked.
//
// A container's upper becomes a layer on top of its image, below a fresh writable layer
// (Container.Top is above the image's top chain then). A commit has that layer, too; diff
// goes by what is written from then on.
//
// # One directory, several chains
//
// Whiteouts are kept, not applied, so the content of a diffID is the same
// wherever it lies, and a directory serves every chain that has it; except for
// what a tar leaves to the layers below (attributes of directories it does not
// mention, hard links to lower files, an opaque root). A digest of what was
// taken, Cache.Bind, tells which chains may share.
//
// # Indexes
//
// A layer's index says what lstat, readlink and listxattr say about each object
// of its directory, so that nobody has to ask them; in a store without
// privileges it has the types, modes, owners and attributes of the tar instead of
// what the files have. It is written with the layer. One that is missing (an older
// store), damaged, or of a directory that this one is a copy of, is made anew
// when it is needed.
//
// A chain's index is the merged tree of its layers, made by the first mount of
// an image or container. Its id is a digest of the directories that were indexed,
// so it is never taken for the index of another stack that has the same chainID,
// and it does not depend on who asks. Where it cannot be made, mounts do without,
// and without what only an index tells.
//
// # Writable layers are not image layers
//
// The upper of a container may say that a part of it is elsewhere in the layers
// below: redirect, metacopy, and the index of hard links in work/index, in the
// form of kernel overlayfs. An image cannot say that, and nobody else is
// believed (import escapes such attributes). So commit, diff and export show
// and write what such an object shows:
//
//	redirect   the whole tree of the renamed directory, behind an opaque marker
//	           if the layers below have something in its place
//	metacopy   a file with its data; data that is missing is an error
//	index      every name of the file, as hard links
//
// Hard links between a renamed directory and what is outside it stay hard
// links: the layer has the names outside as well.
//
// # Build cache
//
// A step of a build is known by its parent image and by what of its container's
// configuration counts (BuildStep); a row leads from that to the image it made, and
// goes with the image. What a step copies is part of its command, as a digest
// (CopyDigest). Nothing runs here: a builder asks, runs, commits and records.
//
// # Invariants
//
//   - Nothing is in layers/ that has not been read to its end, hashed, and made
//     durable. A diffID in the database is the digest of what was read (of a layer that is
//     adopted by reference: what its engine says it was).
//   - Data is durable before the row that names it; the row is gone before the
//     data is deleted.
//   - Rows come before directories in stage/: a name there without a row is
//     garbage.
//   - No path from an archive reaches the kernel as it is. It is resolved in a
//     tree in memory that mirrors the stage; the kernel sees canonical paths,
//     walked without following a link (openat2 below the stage's descriptor).
//   - One parser reads a tar. What is unpacked is what is written out again.
//
// # Locks
//
// There are none but the database's and those of blobs. A transaction does no
// I/O; everything that takes time happens between transactions, protected by
// rows: an ingest keeps a stage, a lease keeps layers that no image names yet.
// Both name their process by boot, pid and start time, and are swept when it is
// gone. Two processes that make the same layer find out in the transaction that
// inserts it; the second throws its copy away.
//
// A pull holds a lock on the digest that it pulls, for which others that pull the
// same wait, and no other lock that anybody waits for while he holds one.
// A partial blob is locked (flock) by the process that writes it; another one
// that wants the same uses a file of its own. blobs/ is locked, before the
// database, by who puts a kept blob into place and writes its row, or deletes the
// file of one whose row is gone: they are named after their content, so that
// nothing but the row tells whether a file is still garbage.
//
// # Registries
//
// A pull makes of a manifest what Load makes of an archive: each layer is a
// member that is read once, hashed, decompressed, hashed and unpacked into a
// stage. The bytes come from a partial blob and then from the registry, and what
// comes from the registry is written behind the partial blob, where the next pull
// finds it if this one does not end well. That a partial blob is the beginning of
// the right one is seen at the end, by the digest of the whole; if it was not, it
// is removed and the pull begins anew.
//
// The blob that a layer came from is noted only if both digests have been seen
// here. A manifest may claim any blob for a diffID that the store has; whoever
// pushes an image with this layer must not spread that.
//
// Manifests, and the indexes that led to them, are kept with the image, byte for
// byte.
//
// # Goroutines
//
// An archive is read once, in order. Reading, decompressing, hashing, parsing,
// finishing small files and compressing the tar-split record are goroutines of
// their own, joined by bounded queues; and while a layer is read, those before
// it may still be unpacked: as many as there are processors, each with at most
// 24 MiB of its compressed form in memory. The parser alone makes names, so they
// come into being in the order of the tar; small files get their content and
// attributes behind it, and it waits for them before it takes one away again.
//
// # Sidecars
//
// The database is right; sidecars say the same once more, so that it can be made anew
// ([Store.Rebuild]). Those of layers are written before their rows and never change,
// but when a check corrects them. Those of images and containers follow each
// transaction that changes their rows: [Store] writes them after the commit and before
// the call returns, under a lock (flock of images/) below which the rows are read anew,
// so the last one to write has seen the last transaction. Who changes rows does nothing
// for it: [metadata.Tx] notes what was touched. A sidecar without a row is what is left
// of a lost row, and a repair puts the image back; so the sidecar of an image that was
// removed is trash until its name is gone for good.
//
// A rebuild takes layers from their directories, which must have a tar-split record with
// the right digest, rows of layers from the sidecars of whatever has them, images and
// containers from theirs; then what can be read of the old database, page by page and
// without bbolt; then from the newest copy what only a database knows, and images that
// no sidecar knows but whose layers are all there.
//
// # Damage
//
// A content directory in which something is wrong is marked (Cache.Broken). Nobody says
// "already present" of it: a load unpacks the layer again, and the transaction that adds
// it gives the new directory to every chain that had the old one. Where the contents are
// whole and only the objects are not what the tar says, a check does the same from the
// layer's own record. A row that cannot be decoded is left out of lists, and counted as a
// name all the same: what it named is not taken for garbage.
//
// # Deleting
//
// With Options.OnTrash nobody waits for the files of what is removed: they are in the
// trash once the transaction is committed, and whoever calls [Store.Purge] deletes them.
//
// # Crash
//
//	step (Load, Import, Commit, init layer)     if we die after it
//	ingest row committed                        row of a dead owner: swept
//	unpacked into stage/<id>, digests compared  same, with the directory
//	bound, finished, syncfs                     same
//	sidecar and index written, syncfs           same
//	renamed to layers/<id>                      same: the ingest row still names it
//	both directories synced                     same
//	layer rows committed, ingest rows deleted   complete, kept by the lease
//	image rows committed, lease deleted         complete; K6 if the sidecar is missing
//	sidecars of the images written, synced      complete
//
// From the first syncfs on, the layers that an image adds go through these steps
// together: each is on the disk before there is a row for any of them, and the
// rows come in one transaction.
//
//	step (adopt)                                if we die after it
//	layers, as above; renamed, no diff/         as above
//	image row                                   the image is complete; others follow
//	container: layer, then create               the lease of a dead owner releases the layer
//
//	step (pull)                                 if we die after it
//	layers arrive in blobs/partial and stages   stages: swept; blobs: the next pull goes on
//	partial blobs removed (not to be kept)      as Load after its first step
//	layers made, as above                       same
//	kept blobs synced, renamed, synced          files without a row: deleted by gc
//	image, manifest and blob rows committed     complete
//
//	step (create)                               if we die after it
//	container row, state creating               row of a dead owner: swept
//	rw/<mountID> renamed into place, synced     same
//	state ready                                 complete
//
//	step (remove)                               if we die after it
//	rows deleted, trash rows added              trash: deleted by the next sweep
//	renamed to trash/, deleted                  same
//	directories synced                          same
//	trash rows deleted                          complete
//
//	step (copy, compact, rebuild of the         if we die after it
//	database)
//	temporary file written, synced              litter: removed by gc after an hour
//	(rebuild) old database linked aside         as before, with one more name
//	renamed over the database, synced           complete; who waits for the lock of the
//	                                            old file opens the new one
//
//	step (index of a chain)                     if we die after it
//	temporary file in chains/                   garbage after an hour: deleted by gc
//	synced, renamed, directory synced           complete; without a chain: deleted by gc
//
// Leases of a dead owner release their layers: what no image came to name is
// deleted. A failed Load therefore leaves the store as it was.
//
// # Differences from other tools
//
//   - A directory the tar does not mention takes all attributes, its time too,
//     from the layers below; where there is none, 0755, root, and the time of the
//     first entry that needs it. (Others use the time of unpacking.)
//   - A hard link to a file of a lower layer becomes a copy. (Docker and podman
//     refuse such layers.)
//   - A path through a symbolic link that only a lower layer has makes a real
//     directory, as kernel overlayfs shows such layers.
//   - Extended attributes named {trusted,user}.overlay.* or user.fuseoverlayfs.*,
//     and without privileges user.containers.override_*, are stored escaped;
//     security.selinux and system.nfs4_acl are dropped.
//   - Without privileges, capabilities and ACLs are kept as the tar has them: no
//     kernel has looked at them. A name of more than 230 bytes that has to be kept
//     under a prefix is lost.
//   - The init layer adds what the image lacks and changes nothing it has.
package layers
