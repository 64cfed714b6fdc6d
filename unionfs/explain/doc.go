// Package explain says why a union shows what it shows: which layer an object comes
// from, what every other layer has under the same name, and which rule hides it.
//
// It needs the layers only, not a mount, and changes nothing: everything is read below
// one descriptor for each layer, with openat2 and without following links. It can look
// at the layers of a live mount, too; what is being written at that moment may be seen
// half-way.
//
// # Words
//
//	place     a directory of one layer in which a name is looked up. It has the path of
//	          the directory in the mount, except below a renamed directory (redirect).
//	entry     what a layer has at a place: an object, a whiteout, or both
//	role      what becomes of an entry: it serves the name, is merged into a directory,
//	          has the data of a file whose attributes alone are above (metacopy),
//	          deletes the name (whiteout), or is hidden
//	rule      a short code that says why, see the constants Rule…
//
// # Rules
//
// They are those of package unionfs, of which the decoding of layers is shared (package
// whiteout, whiteout/override) and the rest is short. From the topmost layer down:
//
//   - the first object of the name serves it; if it is no directory, what lies below is
//     shadowed; so it is below a whiteout;
//   - a directory goes on collecting directories (whiteout/merge), until one of them is
//     opaque, or a layer has something else there;
//   - a directory with a redirect takes what lies below it from another path, a file with
//     metacopy its data, if the mount follows such attributes; if it does not, looking at
//     the object is refused;
//   - a file with several hard links that was copied up under another of its names is
//     served by the copy (link index).
//
// What is hidden is looked at as well, and what lies below a hidden directory: the rule
// that hides it is then that of the directory, with "parent-" before it.
//
// # Paths
//
// A path is one in the mount. Its last component is not followed if it is a symbolic
// link; links before it are, inside the root of the mount, as a program does whose root
// it is, and are listed in Report.Links. ".." is resolved after them.
//
// # Limits
//
// A call looks at most at maxLooks places, follows maxLinks links, and keeps maxNames
// names of a directory; of an object it shows maxXattrs private attributes. Every layer
// takes a descriptor. Layers whose files tell neither owner nor mode (stores of users made
// by old versions) are shown as their files are, and so are the owners of symbolic links
// in stores of users.
package explain
