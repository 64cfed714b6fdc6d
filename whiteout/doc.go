// Package whiteout knows how a layer says "this name is deleted" and "this
// directory hides what lies below it".
//
// # Dialects
//
//	dialect    whiteout of NAME                         opaque directory
//	overlay    NAME is a character device 0:0           trusted.overlay.opaque=y
//	userxattr  NAME is a character device 0:0           user.overlay.opaque=y
//	aufs       a file .wh.NAME beside it                a file .wh..wh..opq inside
//	auto       any of these, mixed                      any, and user.fuseoverlayfs.opaque=y
//
// The overlay and userxattr dialects have a second form of whiteout, for
// places where device nodes cannot be made: in a directory whose opaque
// attribute is "x", an empty regular file that carries overlay.whiteout
// (kernel: Documentation/filesystems/overlayfs.rst, "Nesting overlayfs mounts").
//
// # Laws
//
//   - A dialect belongs to a whole layer. On an overlay-dialect layer ".wh.x"
//     is an ordinary name and shown as such: a process in a container must not
//     be able to hide files by naming them cleverly.
//   - Nothing is a whiteout unless the layer's dialect says so; an unknown
//     value of an attribute is data.
//   - In the aufs dialect a layer may hold both NAME and .wh.NAME: the whiteout
//     then hides only what lies in the layers below (image-spec, layer.md).
//   - Attributes that carry the dialect are private: a user of the mount
//     neither sees nor sets them. What a user stores under such a name is kept
//     escaped ("trusted.overlay.x" as "trusted.overlay.overlay.x", as the
//     kernel does since 6.7), so FromDisk(ToDisk(n)) == n for every n, and no
//     name a user can give reaches a private one.
//
// The package reads and writes by directory descriptor only and imports
// nothing of plyfs. The rule that combines layers is in whiteout/merge.
package whiteout
